"""`fq quantize` with tuned scales: its defaults, interruptions and what it refuses."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import run, write_sentences

from flexquant_rl import cli
from flexquant_rl.agents.commands import quantize
from flexquant_rl.agents.runs.run import locked_run
from flexquant_rl.engine.checkpoint import load_checkpoint, load_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation import tuning
from flexquant_rl.engine.quantisation.unfinished import unfinished_directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Sentences for the character tokenizer."""
    return write_sentences(tmp_path / "text.txt", 300)


def options(source: object, out: Path, text: Path, steps: int = 3) -> tuple[object, ...]:
    tuning_options = ("--calibration", text, "--tune-steps", steps, "--method", "rtn")
    return ("quantize", source, out, "--group-size", 32, *tuning_options)


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_command_tunes(tiny_model_dir: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    finished = run(cli.main, *options(tiny_model_dir, out, text))
    result = finished.result
    assert result["tuning_steps"] == 3
    assert result["tuning_seconds"] > 0
    assert all(result["output_kl_nats"][b] <= kl for b, kl in result["output_kl_nats_before_tuning"].items())
    assert "tuning: 3 of 3 steps" in finished.err
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]
    model = load_model(str(out))  # as every other command, and training, loads it
    assert model.tuning is not None
    assert model.tuning.output_kl_after == result["output_kl_nats"]
    stored_config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored_config["tuning"]["steps"] == 3
    error = run(cli.main, *options(out, tmp_path / "twice", text)).error
    assert error == f"{out} is a nested checkpoint already; give the model that it was made from"
    assert not (tmp_path / "twice").exists()


def test_command_tunes_by_default(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexquant_rl.agents.commands.quantize.default_steps", lambda num_weights: 2)
    start = ("quantize", tiny_model_dir, tmp_path / "out", "--method", "rtn", "--bit-widths", 3, 8)
    assert run(cli.main, *start, "--calibration", text).result["tuning_steps"] == 2
    assert "tuning_steps" not in run(cli.main, *start[:2], tmp_path / "free", *start[3:]).result


@pytest.mark.parametrize(("place", "count"), [("tuning.write_states", 2), ("tuning._Run.evaluate", 1)])
def test_interrupted_command_goes_on(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, place: str, count: int
) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    expected = run(cli.main, *options(tiny_model_dir, straight, text)).result
    calls = 0

    def interrupt_once(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    with monkeypatch.context() as patched:
        where, name = (tuning._Run, "evaluate") if "evaluate" in place else (tuning, "write_states")
        original = getattr(where, name)
        patched.setattr(where, name, interrupt_once)
        finished = run(cli.main, *options(tiny_model_dir, out, text))
    assert finished.code == 130
    assert finished.err.splitlines()[-1] == "interrupted; the same command goes on from there"
    assert not out.exists()
    assert (tmp_path / ".out.unfinished" / "start" / "model.safetensors").is_file()
    with monkeypatch.context() as patched:  # the nested weights are there already
        patched.setattr("flexquant_rl.engine.quantisation.unfinished.nest", None)
        result = run(cli.main, *options(tiny_model_dir, out, text)).result
    assert result["output_kl_nats"] == expected["output_kl_nats"]
    assert load_checkpoint(out).fingerprint == load_checkpoint(straight).fingerprint
    assert not (tmp_path / ".out.unfinished").exists()


def test_interrupted_before_anything_is_kept(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexquant_rl.engine.quantisation.unfinished.nest", interrupt)
    finished = run(cli.main, *options(tiny_model_dir, tmp_path / "out", text))
    assert (finished.code, finished.err.splitlines()[-1]) == (130, "interrupted")
    assert not (tmp_path / ".out.unfinished").exists()


def test_interrupted_while_perplexity_is_measured(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    with monkeypatch.context() as patched:
        patched.setattr("flexquant_rl.agents.commands.quantize.perplexity_by_width", interrupt)
        assert run(cli.main, *options(tiny_model_dir, out, text), "--text", text).code == 130
    assert not out.exists()
    assert run(cli.main, *options(tiny_model_dir, out, text), "--text", text).result["perplexity_by_width"]


def test_output_that_appears_meanwhile_costs_no_work(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    saved = quantize.save_checkpoint

    def late(model: NestedCausalLM, path: Path) -> int:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        return saved(model, path)

    with monkeypatch.context() as patched:
        patched.setattr(quantize, "save_checkpoint", late)
        error = run(cli.main, *options(tiny_model_dir, out, text)).error
    assert error == (
        f"{out} has appeared meanwhile and is not empty; move it away, and the same command goes on from there"
    )
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    out.rename(tmp_path / "elsewhere")
    with monkeypatch.context() as patched:  # nothing is quantised again
        patched.setattr("flexquant_rl.engine.quantisation.unfinished.nest", None)
        assert run(cli.main, *options(tiny_model_dir, out, text)).result["out"] == str(out)
    assert load_checkpoint(out).tuning is not None
    assert not (tmp_path / ".out.unfinished").exists()


def test_second_command_leaves_the_first_ones_work_alone(tiny_model_dir: Path, tmp_path: Path, text: Path) -> None:
    directory = unfinished_directory(tmp_path / "out")
    (directory / "kept").touch()
    with locked_run(directory):
        error = run(cli.main, *options(tiny_model_dir, tmp_path / "out", text)).error
    assert error.startswith(f"another process is working on {directory}")
    assert (directory / "kept").exists()


def test_text_to_judge_on_is_read_first(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexquant_rl.engine.quantisation.unfinished.nest", None)  # it is not reached
    missing = tmp_path / "none.txt"
    assert str(missing) in run(cli.main, *options(tiny_model_dir, tmp_path / "out", text), "--text", missing).error


def test_other_options_start_anew(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "write_states", interrupt)
        assert run(cli.main, *options(tiny_model_dir, out, text)).code == 130
    result = run(cli.main, *options(tiny_model_dir, out, text), "--bit-widths", 4, 8).result
    assert result["output_kl_nats"].keys() == {"4", "8"}
    assert load_checkpoint(out).bit_widths == (4, 8)


@pytest.mark.parametrize(
    "writes",
    [
        "flexquant_rl.engine.quantisation.unfinished.save_checkpoint",  # what tuning begins with
        "flexquant_rl.engine.quantisation.tuning.write_states",
        "flexquant_rl.agents.commands.quantize.save_checkpoint",
    ],
)
def test_full_disk(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, writes: str
) -> None:
    out = tmp_path / "out"

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "some.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(writes, full)
        error = run(cli.main, *options(tiny_model_dir, out, text)).error
    assert error == "some.safetensors: No space left on device; free some space and run the command again"
    assert not out.exists()
    # What can be gone on from stays, and nothing else does.
    unfinished = tmp_path / ".out.unfinished"
    assert not unfinished.exists() or (unfinished / "start.json").is_file()
    assert run(cli.main, *options(tiny_model_dir, out, text)).result["tuning_steps"] == 3


def test_a_damaged_beginning_is_made_anew(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(tuning._Run, "evaluate", interrupt)
        run(cli.main, *options(tiny_model_dir, out, text))
    (tmp_path / ".out.unfinished" / "start.json").write_text('"half of a dig')
    assert run(cli.main, *options(tiny_model_dir, out, text)).result["tuning_steps"] == 3


def test_rotated_and_weighed(tiny_model_dir: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    widths = ("--bit-widths", 3, 4, 8, "--width-weights", 8, 16, 1024)
    fitted = ("--group-size", 32, "--calibration", text, "--tune-steps", 2, *widths)
    result = run(cli.main, "quantize", tiny_model_dir, out, *fitted).result
    assert result["output_kl_nats"].keys() == {"3", "4", "8"}
    assert result["peak_memory_bytes"] > 1 << 20
    config = load_checkpoint(out).config
    assert (config.method, config.rotate, config.width_weights) == ("gptq", True, (8, 16, 1024))


@pytest.mark.parametrize(
    ("method", "asked", "rotated"),
    [("gptq", "auto", True), ("gptq", "no", False), ("rtn", "auto", False), ("rtn", "yes", True)],
)
def test_what_is_rotated(
    tiny_model_dir: Path, tmp_path: Path, text: Path, method: str, asked: str, rotated: bool
) -> None:
    fitted = ("--group-size", 32, "--calibration", text, "--tune-steps", 0, "--method", method, "--rotate", asked)
    assert run(cli.main, "quantize", tiny_model_dir, tmp_path / "out", *fitted).code == 0
    assert load_checkpoint(tmp_path / "out").config.rotate == rotated


def test_a_model_that_cannot_be_rotated_is_not(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexquant_rl.engine.quantisation.rotation.ROTATED_MODEL_TYPES", ("mamba",))
    start = ("quantize", tiny_model_dir, tmp_path / "out", "--group-size", 32, "--calibration", text)
    error = run(cli.main, *start, "--tune-steps", 0, "--rotate", "yes").error
    assert error.startswith("a rotation does not pass through the norms of model type 'llama', only through those")
    finished = run(cli.main, *start, "--tune-steps", 0)
    assert finished.code == 0
    assert "not rotated: a rotation does not pass through the norms of model type 'llama'" in finished.err
    assert not load_checkpoint(tmp_path / "out").config.rotate


def test_bad_input_leaves_nothing(
    tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outs"
    folder.mkdir()
    out = folder / "out"
    start = ("quantize", tiny_model_dir, out)
    error = run(cli.main, *start, "--calibration", text, "--tune-steps", -1).error
    assert error == "--tune-steps -1 must be 0 or more; 0 tunes nothing"
    error = run(cli.main, *start, "--tune-steps", 5).error
    assert error == "--tune-steps 5 fits scales to text; give it some with --calibration FILE"
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    assert "holds no window of 128 tokens; give more text" in run(cli.main, *options(tiny_model_dir, out, short)).error
    one = tmp_path / "one.txt"  # a single document is of a single split
    one.write_text("the cat sat on a red mat. " * 40)
    error = run(cli.main, *options(tiny_model_dir, out, one)).error
    assert "holds no window of 128 tokens; give more text" in error

    def bad(self: Any, width: int) -> None:
        raise InputError("lm_head: not finite")

    with monkeypatch.context() as patched:
        patched.setattr(tuning._Run, "_check_gradient", bad)
        assert run(cli.main, *options(tiny_model_dir, out, text)).error == "lm_head: not finite"
    nan = "flexquant_rl.engine.quantisation.token_weights.logit_probes"
    monkeypatch.setattr(nan, lambda logits, generator: torch.full_like(logits, torch.nan))
    error = run(cli.main, *options(tiny_model_dir, out, text)).error
    assert "calibration tokens are NaN or infinite, but must be finite to weigh the tokens; use other" in error
    assert not list(folder.iterdir())


def test_calibration_files_with_weights(tiny_model_dir: Path, tmp_path: Path, text: Path) -> None:
    other, out = write_sentences(tmp_path / "other.txt", 90), tmp_path / "out"
    start = ("quantize", tiny_model_dir, out, "--method", "rtn", "--tune-steps", 0, "--calibration", text, other)
    error = run(cli.main, *start, "--calibration-weights", 2).error
    assert error.startswith("--calibration-weights 2: 1 numbers for 2 files of --calibration; give one for each")
    error = run(cli.main, *start[:3], "--calibration-weights", 2).error
    assert error.startswith("--calibration-weights 2: 1 numbers for 0 files of --calibration")
    assert not out.exists()
    assert run(cli.main, *start, "--calibration-weights", 2, 1).result["calibration_tokens"] > 0
    stored = json.loads((out / "config.json").read_text())["quantization_config"]["calibration"]
    assert stored["files"] == ["text.txt", "other.txt"]
    assert stored["weights"] == [2, 1]
    calibration = load_checkpoint(out).calibration
    assert calibration is not None
    assert (calibration.files, calibration.weights) == (("text.txt", "other.txt"), (2, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_missing(tiny_model_dir: Path, tmp_path: Path, text: Path) -> None:
    error = run(cli.main, *options(tiny_model_dir, tmp_path / "out", text), "--device", "cuda").error
    assert error == "device=cuda, but torch sees no CUDA device; use --device cpu"


@pytest.mark.gpu
def test_a_gpu_does_what_the_cpu_does(tiny_model_dir: Path, tmp_path: Path, text: Path) -> None:
    start = ("quantize", tiny_model_dir)
    fitted = ("--group-size", 32, "--calibration", text, "--tune-steps", 4)
    found = [
        run(cli.main, *start, tmp_path / device, *fitted, "--device", device).result["output_kl_nats"]
        for device in ("cpu", "cuda")
    ]
    for width, kl in found[0].items():
        assert found[1][width] == pytest.approx(kl, rel=0.3), width
