"""Mistakes in calls of the other `fq` commands end with exit code 2 and one line. Nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cli_runner import run, tree
from mistakes import Cases, Inputs, Mistake, check_mistake, make_run
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flexquant_rl import cli
from flexquant_rl.engine.control import runner

case = Cases()

# The other commands


@case
def checkpoint_exists(inputs: Inputs) -> Mistake:
    arguments = ("quantize", inputs.model, inputs.nested)
    return Mistake(cli.main, arguments, f"{inputs.nested} exists and is not empty", "choose another")


@case
def checkpoint_below_a_file(inputs: Inputs) -> Mistake:
    file = inputs.write("precious.txt", b"thesis")
    return Mistake(cli.main, ("quantize", inputs.model, file / "out"), str(file), "choose another place")


@case
def quantizing_twice(inputs: Inputs) -> Mistake:
    arguments = ("quantize", inputs.nested, inputs.own / "out")
    return Mistake(cli.main, arguments, f"{inputs.nested} is a nested checkpoint already", "give the model")


@case
def quantizing_to_nonsense_widths(inputs: Inputs) -> Mistake:
    return Mistake(
        cli.main, ("quantize", inputs.model, "out", "--bit-widths", 0, 8), "(0, 8)", "ascending, within 1..8"
    )


@case
def quantizing_with_missing_text(inputs: Inputs) -> Mistake:
    arguments = ("quantize", inputs.model, "out", "--text", "none.txt")
    return Mistake(cli.main, arguments, "none.txt is not a file", "--text takes text files")


@case
def profiling_nowhere(inputs: Inputs) -> Mistake:
    arguments = ("profile", "some-hub-name", "--text", inputs.text)
    return Mistake(cli.main, arguments, "some-hub-name is not a directory", "give --out FILE")


@case
def profiling_on_little_text(inputs: Inputs) -> Mistake:
    text = inputs.write("short.txt", b"too short")
    return Mistake(cli.main, ("profile", inputs.model, "--text", text), "short.txt", "give more text")


@case
def analysing_nothing(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, ("analyse", "--text", inputs.text), "no MODEL is given", "name a directory")


@case
def analysing_little_text(inputs: Inputs) -> Mistake:
    text = inputs.write("short.txt", b"too short")
    arguments = ("analyse", inputs.model, "--text", text, "--window-tokens", 64)
    return Mistake(cli.main, arguments, "short.txt: the", "give more text (or, shorter windows with --window-tokens)")


@case
def analysing_with_an_unknown_strategy(inputs: Inputs) -> Mistake:
    arguments = ("analyse", inputs.model, "--text", inputs.text, "--strategies", "rtn", "awq")
    return Mistake(cli.main, arguments, "'awq' is no strategy", "use rtn, rtn-rotated")


@case
def analysing_with_a_strange_group_size(inputs: Inputs) -> Mistake:
    arguments = ("analyse", inputs.model, "--text", inputs.text, "--strategies", "rtn:16")
    return Mistake(cli.main, arguments, "'rtn:16': group_size=16", "use one of 32, 64, 128")


@case
def examining_what_is_not_analysed(inputs: Inputs) -> Mistake:
    arguments = ("analyse", inputs.model, "--text", inputs.text, "--strategies", "rtn", "--examine", "gptq")
    return Mistake(cli.main, arguments, "--examine gptq is none of --strategies", "name it there too")


@case
def analysing_weights_that_are_not_numbers(inputs: Inputs) -> Mistake:
    model = inputs.copy(inputs.model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    arguments = ("analyse", model, "--text", inputs.text, "--window-tokens", 24)
    return Mistake(cli.main, arguments, "model.layers.1.mlp.up_proj.weight holds 1 NaN", "repair the checkpoint")


@case
def analysing_no_windows(inputs: Inputs) -> Mistake:
    arguments = ("analyse", inputs.model, "--text", inputs.text, "--windows", 0)
    return Mistake(cli.main, arguments, "--windows 0", "must be at least 1")


@case
def analysing_into_other_things(inputs: Inputs) -> Mistake:
    folder = inputs.own / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("words")
    arguments = ("analyse", inputs.model, "--text", inputs.text, "--out", folder)
    return Mistake(cli.main, arguments, f"{folder} exists and is no analysis", "choose another --out")


@case
def calibrating_by_nonsense_weights(inputs: Inputs) -> Mistake:
    calibration = ("--calibration", inputs.text, inputs.text, "--calibration-weights", 1, -1)
    arguments = ("analyse", inputs.model, "--text", inputs.text, *calibration)
    return Mistake(cli.main, arguments, "--calibration-weights 1 -1", "each must be a positive number")


@case
def calibrating_on_little_text(inputs: Inputs) -> Mistake:
    short = inputs.write("short.txt", b"too short")
    arguments = ("analyse", inputs.model, "--text", inputs.text, "--window-tokens", 24, "--calibration", short)
    return Mistake(cli.main, arguments, "short.txt: its training split", "give more text with --calibration FILE")


@case
def quantising_on_little_text(inputs: Inputs) -> Mistake:
    short = inputs.write("short.txt", b"too short")
    arguments = ("quantize", inputs.model, inputs.own / "out", "--calibration", short)
    return Mistake(cli.main, arguments, "short.txt: its training split", "give more text with --calibration FILE")


@case
def rows_of_no_analysis(inputs: Inputs) -> Mistake:
    arguments = ("analyse", "--from-rows", inputs.model)
    return Mistake(cli.main, arguments, f"{inputs.model} is not an analysis", "give a directory that fq analyse wrote")


@case
def rows_and_a_model(inputs: Inputs) -> Mistake:
    arguments = ("analyse", inputs.model, "--from-rows", inputs.own)
    return Mistake(cli.main, arguments, f"--from-rows {inputs.own} measures nothing", f"leave {inputs.model} out")


@case
def exporting_no_run(inputs: Inputs) -> Mistake:
    return Mistake(
        cli.main, ("export", inputs.model, "out"), f"{inputs.model} is not a run", "pass a directory of train"
    )


@case
def exporting_too_early(inputs: Inputs) -> Mistake:
    run_dir = make_run(inputs)
    return Mistake(cli.main, ("export", run_dir, "out"), f"{run_dir} holds no finished policy", f"--resume {run_dir}")


@case
def timing_nothing(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, ("bench", "env", "--rounds", 0), "rounds=0", "--rounds 1 or more")


@case
def timing_a_shape_that_is_not_stored(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, ("bench", "gemv", "--shape", 64, 100), "shape=64 100", "--shape 4096 4096")


@case
def timing_nonsense_widths(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, ("bench", "gemv", "--bit-widths", 4, 9), "(4, 9)", "within 1..8")


@case
def timing_heads_that_do_not_fit(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, ("bench", "decode", "--hidden-size", 100), "hidden_size=100", "--hidden-size 768")


@pytest.mark.parametrize("build", case.builders, ids=lambda build: build.__name__)
def test_mistake(build: Callable[[Inputs], Mistake], inputs: Inputs) -> None:
    check_mistake(build(inputs), inputs)


def full_disk_for_safetensors(*arguments: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_full_disk_while_quantizing(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexquant_rl.engine.files.save_file", full_disk_for_safetensors)
    finished = run(cli.main, "quantize", inputs.model, inputs.own / "out")
    assert "No space left on device" in finished.error
    assert "free some space" in finished.error
    assert tree(inputs.own) == {}


def test_machine_too_busy_to_time_steps(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(step: Callable[[], object], device: torch.device) -> float:
        step()
        return -1.0

    monkeypatch.setattr(runner, "clock_ms", never)
    finished = run(cli.main, "profile", inputs.model, "--text", inputs.text, "--out", inputs.own / "profile.json")
    assert "takes -1 ms" in finished.error
    assert "--source roofline" in finished.error
    assert tree(inputs.own) == {}
