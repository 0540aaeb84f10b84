"""`fq record` from end to end: what it prints, how it goes on, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import Finished, run, tree, write_text

from flexquant_rl import cli
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.traces import read_traces
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.recording_prompts import plan_sequences

OPTIONS = ("--tokens", 40, "--prompt-tokens", 8, "--max-new-tokens", 8, "--depth", 2, "--widths", 3, 5)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


def record(*arguments: object) -> Finished:
    return run(cli.main, "record", *arguments)


def test_a_recording_and_the_same_command_again(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "traces"
    finished = record(tiny_model_dir, out, "--text", text, *OPTIONS, "--decoder", "hf")
    result = finished.result
    traces = read_traces(out)
    assert result["decoder"] == traces.plan.decoder == "hf"
    assert result["num_sequences"] == result["num_sequences_made_now"] == len(traces.sequences)
    assert result["num_tokens"] == sum(trace.num_tokens for trace in traces.sequences)
    assert set(result["acceptance_by_width"]) == {"3", "5"}
    assert {planned.split for planned in traces.plan.sequences} == {"train", "validation", "test"}
    documents = {planned.document: planned.split for planned in traces.plan.sequences}
    assert all(documents[planned.document] == planned.split for planned in traces.plan.sequences)
    before = tree(out)
    again = record(tiny_model_dir, out, "--text", text, *OPTIONS, "--decoder", "hf").result
    assert (again["num_sequences_made_now"], tree(out)) == (0, before)
    error = record(tiny_model_dir, out, "--text", text, *OPTIONS[2:], "--tokens", 80, "--decoder", "hf").error
    assert "holds a recording with other sequences" in error


def test_levels_between_stored_widths_need_a_profile(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "traces", (*OPTIONS[:-3], "--decoder", "hf", "--widths", 3, 3.5, 5)
    error = record(tiny_model_dir, out, "--text", text, *options).error
    assert "draft width 3.5 is an allocation between stored widths" in error
    assert "give --profile FILE, or choose stored widths" in error
    profile = tmp_path / "profile.json"
    run(cli.main, "profile", tiny_model_dir, "--source", "roofline", "--text", text, "--out", profile)
    result = record(tiny_model_dir, out, "--text", text, *options, "--profile", profile).result
    assert [*result["acceptance_by_width"]] == ["3", "3.5", "5"]
    plan = read_traces(out).plan
    assert plan.draft_widths == (3, 3.5, 5)
    assert len(set(plan.mixed[0])) > 1
    outside = record(tiny_model_dir, tmp_path / "x", "--text", text, *options[:-3], 2.5, "--profile", profile).error
    assert "draft width 2.5 is outside the stored widths 3 to 8" in outside


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", 0), "--tokens 0 must be at least 1"),
        (("--prompt-tokens", 0), "--prompt-tokens 0 must be at least 1"),
        (("--depth", 0), "depth=0 must be 1 to 15"),
        (("--widths", 3, 7), "width 7 is not stored"),
        (("--widths", 0.5), "draft width 0.5 is outside the stored widths 3 to 8"),
        (("--widths", 4, 3, 3), "draft widths 4 3 3 name 3 twice; name each once"),
        (("--verify-width", 3), "must be one or more below the verify width 3"),
        (("--max-new-tokens", 1), "leaves nothing to draft"),
        (("--max-new-tokens", 500), "128"),
        (("--threads", 0), "0"),
    ],
)
def test_what_is_refused(
    tiny_model_dir: Path, text: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "traces"
    options = (*OPTIONS[:2], "--prompt-tokens", 8)
    assert message in record(tiny_model_dir, out, "--text", text, *options, *arguments).error
    assert not out.exists()


def test_more_prompts_than_there_are(tiny_model_dir: Path, text: Path) -> None:
    """However many are asked for, each place of the text is a prompt at most once."""
    model = load_model(str(tiny_model_dir), QuantizationConfig(), keep_reference=False)
    every, more = (plan_sequences(model, [text], num_sequences=n, prompt_tokens=8) for n in (10**6, 10**12))
    assert every == more
    assert len({planned.prompt_ids for planned in every}) > 20
    few = plan_sequences(model, [text], num_sequences=10, prompt_tokens=8)
    assert {planned.prompt_ids for planned in few} <= {planned.prompt_ids for planned in every}


def test_a_directory_of_something_else_is_left_alone(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "note").touch()
    error = record(tiny_model_dir, tmp_path, "--text", text, *OPTIONS).error
    assert "exists and is not empty" in error
    assert [*tree(tmp_path)] == ["note"]
