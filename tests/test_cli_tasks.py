"""`fq tasks` on a tiny model: its table, its rows, that nothing is asked twice, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_runner import Finished, run, tree, write_text

from flexquant_rl import cli
from flexquant_rl.agents.commands import tasks as command
from flexquant_rl.agents.runs.run import locked_run
from flexquant_rl.agents.tasks import extra

TEXT_TASK = ("--tasks", "continuation", "--limit", 4, "--timed-tokens", 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", num_chunks=8)


@pytest.fixture(scope="module")
def nested(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nested") / "model"
    assert run(cli.main, "quantize", tiny_model_dir, out).code == 0
    return out


def ask(model: Path, *options: object) -> Finished:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    return run(cli.main, "tasks", model, *options)


def test_policies_answer_the_same_documents_once(
    nested: Path, tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, (first, more) = tmp_path / "out", (("full", "fixed:8", "fixed:3"), ("draft:3,length=2",))
    asked = (*TEXT_TASK, "--text", text, "--reference", tiny_model_dir, "--out", out)
    begun = ask(nested, "--policy", *first, *asked)
    result = begun.result
    assert [row["policy"] for row in result["rows"]] == [*first]
    assert {row["num_documents"] for row in result["rows"]} == {4}
    assert result["time_share_measured"].keys() == {"fixed:8", "fixed:3"}
    lines = (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({tuple(json.loads(line)["document_ids"]) for line in lines}) == 1

    def again(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(command._TasksRun, "_ask", again)
    monkeypatch.setattr(command, "time_policies", again)
    assert ask(nested, "--policy", *first, *asked).result["rows"] == result["rows"]
    monkeypatch.undo()
    grown = ask(nested, "--policy", *first, *more, *asked)
    assert grown.result["rows"][:3] == result["rows"]
    assert "fixed:8: done before" in grown.err
    assert "continuation: draft:3,length=2 answers as fixed:8 on 4 of 4 documents" in grown.result["findings"]
    assert "against static in equal measured time" in grown.out
    report = (out / "report.md").read_text(encoding="utf-8")
    assert all(f"`{policy}`" in report for policy in (*first, *more))
    assert set(tree(out)) == {
        *("report.md", "rows.jsonl", "times.jsonl", "tasks.json", "timed_prompts.json", "tasks"),
        *("tasks/continuation.jsonl", "tasks/continuation.yaml"),
    }


def write_task(
    folder: Path, name: str, rows: Sequence[tuple[str, str]], *, metric: str, **own: object
) -> tuple[object, ...]:
    """Writes a task of the harness over rows of a question and an answer, and returns the options that ask it."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / name).mkdir()
    (folder / name / f"{name}.yaml").write_text(json.dumps(task | own), encoding="utf-8")
    return ("--tasks", name, "--include", folder / name, "--policy", "fixed:4", "--timed-tokens", 0)


def test_a_task_of_ones_own(nested: Path, tmp_path: Path) -> None:
    options = write_task(
        tmp_path,
        "mine",
        [("ab0", "x"), ("ab1", "x"), ("ab2", "x")],
        metric="exact_match",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["q"], "max_gen_toks": 4},
    )
    done = ask(nested, *options, "--out", tmp_path / "out")
    (row,) = done.result["rows"]
    assert (row["task"], row["metric"], row["num_documents"]) == ("mine", "exact_match", 3)
    assert done.result["time_share_measured"] == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--policy", "full"), "is a nested checkpoint; name the model that it was made from with --reference DIR"),
        (("--policy", "fixed:4", "fixed:4"), "--policy names something twice"),
        (("--tasks", "gsm8k", "--policy", "fixed:4"), "task gsm8k is made of files; name them with --gsm8k FILE"),
        (("--limit", 1), "--limit 1 must be at least 2"),
        (("--include", "nowhere"), "--include nowhere is not a directory"),
        (("--gsm8k", "rows.jsonl"), "--gsm8k rows.jsonl is for task gsm8k, which is not asked; add it to --tasks"),
        (("--policy", "fixed:7"), "width 7 is not stored"),
        (("--policy", "fixed:4", "--timed-tokens", 100_000), "leaves no room for a prompt in the model's context of"),
        (("--policy", "entropy:1.5", "--timed-tokens", -1), "--timed-tokens -1 must be at least 0"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    nested: Path, options: tuple[object, ...], said: str, tmp_path: Path
) -> None:
    assert said in ask(nested, *options, "--out", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_rows_of_another_plan_are_kept_apart(nested: Path, text: Path, tmp_path: Path) -> None:
    asked = ("--policy", "fixed:4", "--tasks", "continuation", "--text", text, "--timed-tokens", 0, "--out", tmp_path)
    assert ask(nested, *asked, "--limit", 2).code == 0
    assert "rows of another plan (documents differs)" in ask(nested, *asked, "--limit", 3).error


def test_rows_of_other_settings_are_made_anew(nested: Path, text: Path, tmp_path: Path) -> None:
    out, policy = tmp_path / "out", tmp_path / "policy"
    assert run(cli.main, "export", "fixed:4", policy, "--model", nested).code == 0
    asked = (*TEXT_TASK, "--text", text, "--policy", policy, "--out", out)
    first = ask(nested, *asked)
    times = (out / "times.jsonl").read_text(encoding="utf-8")
    assert "done before" in ask(nested, *asked).err
    assert (out / "times.jsonl").read_text(encoding="utf-8") == times
    with_threads = ask(nested, *asked, "--threads", 1)
    assert f"{policy}: asked anew on continuation, the row that is there is of other --threads" in with_threads.err
    assert "timing anew" in with_threads.err
    assert with_threads.result["rows"][0]["threads"] == 1
    more_tokens = ask(nested, *asked, "--threads", 1, "--timed-tokens", 5)
    assert "done before" in more_tokens.err
    assert "timing anew" in more_tokens.err
    shutil.rmtree(policy)
    assert run(cli.main, "export", "fixed:3", policy, "--model", nested).code == 0
    changed = ask(nested, *asked)
    assert "the row that is there is of a policy that was another one then" in changed.err
    assert first.result["rows"][0]["policy"] == changed.result["rows"][0]["policy"]
    assert len((out / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_a_run_that_was_killed_before_its_prompts_were_kept(nested: Path, text: Path, tmp_path: Path) -> None:
    asked = (*TEXT_TASK, "--text", text, "--policy", "fixed:4", "--out", tmp_path)
    assert ask(nested, *asked).code == 0
    (tmp_path / "timed_prompts.json").unlink()
    (tmp_path / "times.jsonl").unlink()
    assert ask(nested, *asked).result["time_share_measured"].keys() == {"fixed:4"}
    (tmp_path / "timed_prompts.json").write_text('{"continuation": [1]}', encoding="utf-8")
    assert "timed_prompts.json cannot be read (a prompt is no text)" in ask(nested, *asked).error


def test_nothing_is_timed_without_prompts(nested: Path, text: Path, tmp_path: Path) -> None:
    asked = ("--tasks", "continuation", "--limit", 4, "--text", text, "--policy", "fixed:4", "--out", tmp_path)
    assert ask(nested, *asked, "--timed-tokens", 0).code == 0
    (tmp_path / "timed_prompts.json").write_text('{"continuation": ["", ""]}', encoding="utf-8")
    done = ask(nested, *asked)
    assert "no policy is timed: every prompt of these tasks is empty" in done.err
    assert done.result["time_share_measured"] == {}


def test_a_directory_is_claimed_by_one_process(
    nested: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (*TEXT_TASK, "--text", text, "--policy", "fixed:4", "--out", tmp_path / "out")
    monkeypatch.setattr(command, "claim", lambda *_: pytest.fail("claimed beside another process"))
    (tmp_path / "out").mkdir()
    with locked_run(tmp_path / "out"):
        assert "another process is working on" in ask(nested, *asked).error


def test_a_continuation_that_does_not_fit_names_its_task(nested: Path, tmp_path: Path) -> None:
    options = write_task(
        tmp_path,
        "long",
        [("ab0", "x" * 3000), ("ab1", "x" * 3000)],
        metric="acc",
        output_type="multiple_choice",
        doc_to_choice="{{[a, 'y']}}",
        doc_to_target=0,
    )
    error = ask(nested, *options, "--out", tmp_path / "out").error
    assert re.search(r"task long: a continuation of 300\d tokens does not fit into \d+; leave the task out", error)


def test_without_the_extra_it_says_so(nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra.importlib.util, "find_spec", lambda name: None)
    error = run(cli.main, "tasks", nested).error
    assert re.search(r"lm-evaluation-harness, which is not installed; pip install 'flexquant-rl\[eval\]'", error)
