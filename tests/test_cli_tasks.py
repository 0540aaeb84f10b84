"""`fq tasks` on a tiny model: its table, its rows, that nothing is asked twice, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_runner import Finished, run, tree, write_text

from flexquant_rl import cli
from flexquant_rl.agents.commands import tasks as command
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


def test_a_task_of_ones_own(nested: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"q": "ab{n}", "a": "x"}}\n' for n in range(3)), encoding="utf-8")
    mine = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["q"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.yaml").write_text(json.dumps(mine), encoding="utf-8")
    options = ("--tasks", "mine", "--include", tmp_path / "mine", "--policy", "fixed:4", "--timed-tokens", 0)
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


def test_without_the_extra_it_says_so(nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra.importlib.util, "find_spec", lambda name: None)
    error = run(cli.main, "tasks", nested).error
    assert re.search(r"lm-evaluation-harness, which is not installed; pip install 'flexquant-rl\[eval\]'", error)
