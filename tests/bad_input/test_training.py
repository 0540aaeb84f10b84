"""Mistakes in calls of train.py end with exit code 2 and one line: value, rule, fix. Nothing is left behind."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import TINY_RUN, run, tree
from mistakes import Cases, Inputs, Mistake, check_mistake, damage, make_run
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from flexquant_rl import train

case = Cases()


def training(
    inputs: Inputs, *options: object, model: Path | str | None = None, text: Path | None = None
) -> tuple[object, ...]:
    """Arguments of a small run in a folder that does not exist yet."""
    run_dir = inputs.own / "new" / "run"
    return ("--model", model or inputs.model, "--text", text or inputs.text, "--run", run_dir, *TINY_RUN, *options)


def bad_model(inputs: Inputs, model: Path | str, value: str, fix: str) -> Mistake:
    return Mistake(train.main, training(inputs, model=model), value, fix)


def bad_text(inputs: Inputs, text: Path, value: str, fix: str) -> Mistake:
    return Mistake(train.main, training(inputs, text=text), value, fix)


def bad_option(inputs: Inputs, *options: object, value: str, fix: str) -> Mistake:
    return Mistake(train.main, training(inputs, *options), value, fix)


# Models


@case
def model_missing(inputs: Inputs) -> Mistake:
    return bad_model(
        inputs, inputs.own / "nowhere", "nowhere is not a directory", "pass a Hugging Face model directory"
    )


@case
def model_missing_in_a_run_without_a_name(inputs: Inputs) -> Mistake:
    return Mistake(train.main, ("--model", inputs.own / "nowhere"), "nowhere is not a directory", "pass a Hugging Face")


@case
def model_is_a_file(inputs: Inputs) -> Mistake:
    return bad_model(inputs, inputs.text, "text.txt is not a directory", "pass a Hugging Face model directory")


@case
def model_name_unknown(inputs: Inputs) -> Mistake:
    return bad_model(inputs, "no-such-model-anywhere", "no-such-model-anywhere", "check the name or the network")


@case
def model_without_config(inputs: Inputs) -> Mistake:
    (inputs.own / "hollow").mkdir()
    return bad_model(inputs, inputs.own / "hollow", "hollow has no config.json", "pass a Hugging Face model directory")


@case
def model_config_not_json(inputs: Inputs) -> Mistake:
    model = inputs.copy(inputs.model)
    (model / "config.json").write_text("{'single': 'quotes'}")
    return bad_model(inputs, model, f"{model / 'config.json'} is not valid JSON", "restore the file")


@case
def model_that_only_encodes(inputs: Inputs) -> Mistake:
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(inputs.own / "bert")
    return bad_model(inputs, inputs.own / "bert", "is a BertForMaskedLM, not a causal", "a decoder that generates text")


def model_with(inputs: Inputs, value: float) -> Path:
    model = inputs.copy(inputs.model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@case
def weights_with_nan(inputs: Inputs) -> Mistake:
    model = model_with(inputs, math.nan)
    return bad_model(inputs, model, "model.layers.1.mlp.up_proj.weight holds 1 NaN", "repair the checkpoint")


@case
def weights_with_infinity(inputs: Inputs) -> Mistake:
    model = model_with(inputs, math.inf)
    return bad_model(inputs, model, "model.layers.1.mlp.up_proj.weight holds 1 NaN or inf", "repair the checkpoint")


@case
def weights_cut(inputs: Inputs) -> Mistake:
    model = inputs.copy(inputs.model)
    damage(model / "model.safetensors", "cut")
    return bad_model(inputs, model, f"{model}: cannot be loaded", "download the model again")


@case
def weights_incomplete(inputs: Inputs) -> Mistake:
    model = inputs.copy(inputs.model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return bad_model(inputs, model, "missing or misshapen, e.g. model.layers.0.self_attn.q_proj", "is incomplete")


@case
def nested_cut(inputs: Inputs) -> Mistake:
    model = inputs.copy(inputs.nested)
    damage(model / "model.safetensors", "cut")
    return bad_model(
        inputs, model, f"{model / 'model.safetensors'}: damaged or cut short", "quantise the checkpoint again"
    )


@case
def nested_flipped(inputs: Inputs) -> Mistake:
    model = inputs.copy(inputs.nested)
    damage(model / "model.safetensors", "flip")
    return bad_model(inputs, model, "has sha256", "quantise the checkpoint again")


@case
def nested_config_edited(inputs: Inputs) -> Mistake:
    model = inputs.copy(inputs.nested)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config + " ")
    return bad_model(inputs, model, f"{model / 'config.json'}: sha256", "quantise the checkpoint again")


# Text


@case
def text_empty(inputs: Inputs) -> Mistake:
    return bad_text(inputs, inputs.write("empty.txt", b" \n"), "empty.txt is empty", "give a file with text")


@case
def text_missing(inputs: Inputs) -> Mistake:
    return bad_text(inputs, inputs.own / "none.txt", "none.txt is not a file", "--text takes text files")


@case
def text_too_short(inputs: Inputs) -> Mistake:
    return bad_text(inputs, inputs.write("short.txt", b"too short"), "no window of 13 tokens", "give more text")


@case
def text_not_utf8(inputs: Inputs) -> Mistake:
    return bad_text(inputs, inputs.write("latin.txt", b"caf\xe9 " * 99), "latin.txt is not UTF-8", "convert it")


@case
def text_rows_not_json(inputs: Inputs) -> Mistake:
    text = inputs.write("rows.jsonl", b'{"text": "one"}\n{"text": \n')
    return bad_text(inputs, text, "rows.jsonl line 2 is not JSON", "fix the line")


# Options


@case
def prompt_beyond_the_context(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--env.prompt-tokens", 500, value="504 tokens", fix="shorten the prompt")


@case
def no_seeds(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--seeds", 0, value="seeds=0", fix="--seeds 1 or more")


@case
def no_env_steps(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--env-steps", 0, value="env_steps=0", fix="--env-steps 1 or more")


@case
def negative_seed(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--seed", -1, value="seed=-1", fix="use 0 to")


@case
def no_new_tokens(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--env.max-new-tokens", 0, value="max_new_tokens=0", fix="must be at least 1")


@case
def infinite_dial(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--env.kl-weight", "inf", value="kl_weight=inf", fix="positive and finite")


@case
def episodes_without_text(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--env.source", "free", value="source=free", fix="env.source=replay")


@case
def probes_that_serving_does_not_make(inputs: Inputs) -> Mistake:
    value = "env.probe_every=4: probes are for agents of your own"
    return bad_option(inputs, "--env.probe-every", 4, value=value, fix="leave --env.probe-every out")


@case
def temperature_that_divides_to_no_number(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--env.temperature", "1e-42", value="temperature=1e-42 is below", fix="0 is greedy")


@case
def discount_above_one(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--ppo.gamma", 1.5, value="ppo.gamma=1.5", fix="from 0 to 1")


@case
def learning_rate_not_a_number(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--ppo.learning-rate", "nan", value="ppo.learning_rate=nan", fix="--ppo.learning-rate")


@case
def batch_of_one(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--ppo.batch-size", 1, value="ppo.batch_size=1", fix="at least 2")


@case
def no_cuda(inputs: Inputs) -> Mistake:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    return bad_option(inputs, "--device", "cuda", value="device=cuda", fix="--device cpu")


@case
def width_beyond_the_planes(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--quantization.bit-widths", 3, 9, value="(3, 9)", fix="use 3,8")


@case
def widths_without_the_largest(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--quantization.bit-widths", 3, 4, value="(3, 4)", fix="use 3,4,8")


@case
def one_width(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--quantization.bit-widths", 8, value="only width 8", fix="--quantization.bit-widths 4 8")


@case
def group_size_unknown(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--quantization.group-size", 48, value="group_size=48", fix="32, 64, 128")


# Runs


@case
def run_exists(inputs: Inputs) -> Mistake:
    run_dir = make_run(inputs)
    return bad_option(inputs, "--run", run_dir, value=f"{run_dir} holds a run already", fix=f"--resume {run_dir}")


@case
def run_is_another_folder(inputs: Inputs) -> Mistake:
    inputs.write("precious.txt", b"thesis")
    return bad_option(inputs, "--run", inputs.own, value=f"{inputs.own} exists and is not a run", fix="choose another")


@case
def run_is_a_file(inputs: Inputs) -> Mistake:
    file = inputs.write("precious.txt", b"thesis")
    return bad_option(inputs, "--run", file, value=f"{file} exists and is not a run", fix="choose another")


@case
def run_below_a_file(inputs: Inputs) -> Mistake:
    file = inputs.write("precious.txt", b"thesis")
    return bad_option(inputs, "--run", file / "run", value=str(file), fix="choose another place")


@case
def resume_of_no_run(inputs: Inputs) -> Mistake:
    return Mistake(train.main, ("--resume", inputs.own), f"{inputs.own} is not a run", "pass a directory of train.py")


@case
def resume_of_a_model(inputs: Inputs) -> Mistake:
    return Mistake(
        train.main, ("--resume", inputs.model), f"{inputs.model} is not a run", "pass a directory of train.py"
    )


@case
def resume_of_another_version(inputs: Inputs) -> Mistake:
    run_dir = make_run(inputs)
    data = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**data, "version": 99}))
    return Mistake(train.main, ("--resume", run_dir), "run version 99", "start a new run")


@case
def resume_of_a_run_with_a_number_in_quotes(inputs: Inputs) -> Mistake:
    run_dir = make_run(inputs)
    data = json.loads((run_dir / "config.json").read_text())
    data["config"]["env"]["prompt_tokens"] = "8"
    (run_dir / "config.json").write_text(json.dumps(data))
    value = f"{run_dir / 'config.json'}: env.prompt_tokens='8' must be an integer"
    return Mistake(train.main, ("--resume", run_dir), value, "start a new run")


@case
def resume_of_a_run_that_nests_too_deeply(inputs: Inputs) -> Mistake:
    run_dir = make_run(inputs)
    (run_dir / "config.json").write_text("[" * 100_000)
    return Mistake(train.main, ("--resume", run_dir), "nested too deeply", "pass a directory of train.py")


@case
def resume_with_other_options(inputs: Inputs) -> Mistake:
    return Mistake(train.main, ("--resume", make_run(inputs), "--env-steps", 5), "env_steps=5", "leave it out")


@case
def resume_with_another_name(inputs: Inputs) -> Mistake:
    return Mistake(train.main, ("--resume", make_run(inputs), "--run", "other"), "run=other", "leave it out")


@case
def resume_with_a_damaged_profile(inputs: Inputs) -> Mistake:
    run_dir = make_run(inputs)
    (run_dir / "profile.json").write_text("{")
    return Mistake(train.main, ("--resume", run_dir), f"{run_dir / 'profile.json'}: no readable profile", "fq profile")


@pytest.mark.parametrize("build", case.builders, ids=lambda build: build.__name__)
def test_mistake(build: Callable[[Inputs], Mistake], inputs: Inputs) -> None:
    check_mistake(build(inputs), inputs)


def full_disk(*arguments: object, **keywords: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))


def test_full_disk_at_the_start_of_a_run(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", full_disk)
    finished = run(train.main, *training(inputs))
    assert "config.json" in finished.error
    assert "free some space" in finished.error
    assert tree(inputs.own) == {}


def test_bug_keeps_its_traceback(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the user can mend is said in one line."""
    monkeypatch.setattr("flexquant_rl.agents.preparation.roofline_cost", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(train.main, *training(inputs, "--latency", "roofline"))


@pytest.mark.parametrize("arguments", [("--seed", "many"), ("--sead", 1), ("--device",)], ids=str)
def test_usage_errors_are_explained(inputs: Inputs, arguments: tuple[object, ...]) -> None:
    finished = run(train.main, *training(inputs, *arguments))
    assert finished.code == 2
    assert "Traceback" not in finished.err
    assert str(arguments[0]) in finished.err
    assert tree(inputs.own) == {}
