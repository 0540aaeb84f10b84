"""Mistakes of the user end with exit code 2 and one line: the value, the rule, the fix. Nothing is left behind."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cli_runner import TINY_RUN, run, tree, write_text
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from flexquant_rl import cli, train
from flexquant_rl.agents.run import new_run
from flexquant_rl.agents.training import TrainConfig
from flexquant_rl.engine.checkpoint import load_model, save_checkpoint
from flexquant_rl.engine.cost import roofline_cost
from flexquant_rl.engine.files import file_sha256
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.profile import Profile
from flexquant_rl.engine.quantize import QuantizationConfig
from flexquant_rl.engine.signals import SignalSchema


@dataclass(frozen=True)
class Inputs:
    """Good inputs, shared by all cases and only read, and a folder for a case's own bad ones, which is its cwd too."""

    model: Path
    nested: Path
    text: Path
    policy: Path
    own: Path

    def copy(self, source: Path) -> Path:
        """A copy of a directory to damage."""
        return shutil.copytree(source, self.own / source.name)

    def write(self, name: str, content: bytes) -> Path:
        """A file of the case's own."""
        path = self.own / name
        path.write_bytes(content)
        return path


@dataclass(frozen=True)
class Mistake:
    """A command line, and what its error must say: the offending value and a fix."""

    main: Callable[[], int]
    arguments: tuple[object, ...]
    value: str
    fix: str


CASES: list[Callable[[Inputs], Mistake]] = []


def case(build: Callable[[Inputs], Mistake]) -> Callable[[Inputs], Mistake]:
    """Adds a case; its name is the test's id."""
    CASES.append(build)
    return build


@pytest.fixture(scope="module")
def nested(tiny_model_dir: Path) -> NestedCausalLM:
    return load_model(str(tiny_model_dir), QuantizationConfig())


def save_policy(model: NestedCausalLM, out: Path, *, fingerprint: str | None = None) -> Path:
    """An untrained policy of a model, as a run exports it."""
    fingerprint = fingerprint or model.fingerprint
    schema = SignalSchema(model.num_units, model.bit_widths)
    sensitivity = torch.rand(model.num_units, len(model.bit_widths), generator=torch.Generator().manual_seed(0))
    profile = Profile(roofline_cost(model), sensitivity, model.bit_widths, model.fingerprint, 9, "unquantised")
    dial = (DialPoint(100.0, 1.2, 0.01, 6.0), DialPoint(10.0, 1.8, 0.1, 4.0))
    card = PolicyCard(schema, fingerprint, tuple(unit.name for unit in model.units), dial)
    torch.manual_seed(0)
    LearnedPolicy(PrecisionNet(schema), card).save(out, profile)
    return out


@pytest.fixture(scope="module")
def shared(tiny_model_dir: Path, nested: NestedCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("good")
    save_checkpoint(nested, folder / "nested")
    policy = save_policy(nested, folder / "policy")
    return Inputs(tiny_model_dir, folder / "nested", write_text(folder / "text.txt"), policy, folder)


@pytest.fixture
def inputs(shared: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.chdir(tmp_path)  # where `runs/` would appear
    return Inputs(shared.model, shared.nested, shared.text, shared.policy, tmp_path)


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


def damage(path: Path, kind: str) -> None:
    """Cuts the end off a file, or flips one bit in its last quarter."""
    content = bytearray(path.read_bytes())
    if kind == "cut":
        del content[-100:]
    else:
        content[-len(content) // 8] ^= 4
    path.write_bytes(content)


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
    return bad_model(inputs, "no-such-model-anywhere", "no-such-model-anywhere", "check the directory or name")


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
    return bad_model(inputs, model, f"{model}: cannot be loaded", "check the directory")


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
def discount_above_one(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--ppo.gamma", 1.5, value="ppo.gamma=1.5", fix="from 0 to 1")


@case
def learning_rate_not_a_number(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--ppo.learning-rate", "nan", value="ppo.learning_rate=nan", fix="--ppo.learning-rate")


@case
def batch_of_one(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--ppo.batch-size", 1, value="ppo.batch_size=1", fix="at least 2")


@case
def unknown_device(inputs: Inputs) -> Mistake:
    return bad_option(inputs, "--device", "tpu", value="device='tpu'", fix="use cpu or cuda")


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


def make_run(inputs: Inputs, name: str = "run") -> Path:
    """The directory of a run that has not left a result yet."""
    with new_run(TrainConfig(model=str(inputs.model), text=(str(inputs.text),)), inputs.own / name) as run_dir:
        return run_dir


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


# Policies


def evaluation(inputs: Inputs, *policies: object) -> tuple[object, ...]:
    options = ("--text", inputs.text, "--sequences", 2, "--env.prompt-tokens", 8, "--env.max-new-tokens", 4)
    return ("evaluate", inputs.model, *options, "--policy", *policies)


def bad_policy(inputs: Inputs, policy: object, value: str, fix: str) -> Mistake:
    return Mistake(cli.main, evaluation(inputs, "fixed:4", policy), value, fix)


def with_profile(policy: Path, old: str, new: str) -> None:
    """Edits the profile that a policy carries, and its hash on the card."""
    profile, card = policy / "profile.json", json.loads((policy / "policy.json").read_text())
    assert old in profile.read_text()
    profile.write_text(profile.read_text().replace(old, new))
    (policy / "policy.json").write_text(json.dumps({**card, "profile_sha256": file_sha256(profile)}))


def another_models(inputs: Inputs) -> Path:
    """A policy of another model of the same shape."""
    policy = inputs.copy(inputs.policy)
    card = json.loads((policy / "policy.json").read_text())
    (policy / "policy.json").write_text(json.dumps({**card, "model_fingerprint": "e" * 64}))
    with_profile(policy, card["model_fingerprint"], "e" * 64)
    return policy


@case
def policy_misspelt(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "fixd:4", "unknown policy 'fixd:4'", "did you mean fixed:4?")


@case
def policy_unknown(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "zzz", "unknown policy 'zzz'", "known: fixed:NUMBER, knapsack:NUMBER")


@case
def policy_of_a_width_not_stored(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "fixed:7", "width 7 is not stored", "choose one of 3, 4, 5, 6, 8")


@case
def policy_without_a_number(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "knapsack:many", "'many' is not a number", "write e.g. knapsack:4")


@case
def policy_of_no_number(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "entropy:nan", "'nan' is not a number", "write e.g. entropy:4")


@case
def policy_below_the_widths(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "random:1.5", "random:1.5 is outside", "3 to 8")


@case
def policy_of_another_model(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, another_models(inputs), "e" * 12, "train a policy for this model")


@case
def policies_with_different_profiles(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    with_profile(policy, '"num_tokens": 9', '"num_tokens": 8')
    arguments = evaluation(inputs, "fixed:4", inputs.policy, policy)
    return Mistake(cli.main, arguments, f"{policy} carries another profile.json", "one at a time")


@case
def policy_with_an_edited_profile(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    damage(policy / "profile.json", "flip")
    return bad_policy(inputs, policy, f"{policy / 'profile.json'}: sha256", "export it again")


@case
def policy_with_nonsense_quantization(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    card = json.loads((policy / "policy.json").read_text())
    config = {"quantization": {"bit_widths": [3, 9]}}
    (policy / "policy.json").write_text(json.dumps({**card, "config": config}))
    return bad_policy(inputs, policy, "(3, 9)", "export the policy again")


@case
def policy_of_another_schema(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    card = json.loads((policy / "policy.json").read_text())
    card["schema"]["version"] = 99
    (policy / "policy.json").write_text(json.dumps(card))
    return bad_policy(inputs, policy, "signal schema 99", "train and export the policy again")


@case
def policy_cut(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    damage(policy / "policy.safetensors", "cut")
    return bad_policy(inputs, policy, f"{policy}: no readable policy", "export it again")


@case
def policy_flipped(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    damage(policy / "policy.safetensors", "flip")
    return bad_policy(inputs, policy, f"{policy / 'policy.safetensors'}: sha256", "export it again")


@case
def policy_without_card(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    (policy / "policy.json").unlink()
    return bad_policy(inputs, policy, f"{policy}: no readable policy", "export it again")


@case
def no_policy(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, evaluation(inputs), "--policy names no policy", "name one or more")


@case
def evaluation_on_an_unknown_device(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, (*evaluation(inputs, "fixed:4"), "--device", "tpu"), "device='tpu'", "use cpu or cuda")


@case
def evaluation_of_no_sequence(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, (*evaluation(inputs, "fixed:4"), "--sequences", 0), "test_sequences=0", "at least 1")


# Generation


def generation(inputs: Inputs, *options: object, policy: Path | None = None, prompt: str = "abc") -> tuple[object, ...]:
    return ("generate", inputs.model, "--policy", policy or inputs.policy, "--prompt", prompt, *options)


@case
def prompt_too_long(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, generation(inputs, prompt="a" * 120), "tokens (prompt and continuation)", "shorten the")


@case
def prompt_empty(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, generation(inputs, prompt=""), "the prompt is empty", "give at least one token")


@case
def speed_out_of_reach(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, generation(inputs, "--speed", 5), "speed 5 is outside 1 to 1.80", "--kl-weight")


@case
def speed_and_dial(inputs: Inputs) -> Mistake:
    arguments = generation(inputs, "--speed", 1.2, "--kl-weight", 30)
    return Mistake(cli.main, arguments, "--speed 1.2 and --kl-weight 30", "give one of them")


@case
def dial_below_zero(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, generation(inputs, "--kl-weight", -2), "kl_weight=-2", "positive and finite")


@case
def no_continuation(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, generation(inputs, "--max-new-tokens", 0), "max_new_tokens=0", "at least 1")


@case
def negative_temperature(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, generation(inputs, "--temperature", -1), "temperature=-1", "0 is greedy")


@case
def generation_without_a_policy(inputs: Inputs) -> Mistake:
    arguments = generation(inputs, policy=inputs.own / "none")
    return Mistake(cli.main, arguments, "none is not the directory", "fq export RUN OUT")


@case
def generation_with_another_models_policy(inputs: Inputs) -> Mistake:
    policy = another_models(inputs)
    return Mistake(cli.main, generation(inputs, policy=policy), "e" * 12, "train a policy for this model")


@case
def generation_with_another_models_profile(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    fingerprint = json.loads((policy / "profile.json").read_text())["fingerprint"]
    with_profile(policy, fingerprint, "e" * 64)
    return Mistake(cli.main, generation(inputs, policy=policy), f"profile.json: of model {'e' * 12}", "export it again")


@case
def generation_with_a_profile_of_another_shape(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    sensitivity = json.loads((policy / "profile.json").read_text())["sensitivity"]
    data = json.loads((policy / "profile.json").read_text()) | {"sensitivity": [*sensitivity, sensitivity[0]]}
    with_profile(policy, (policy / "profile.json").read_text(), json.dumps(data))
    return Mistake(cli.main, generation(inputs, policy=policy), "with 4 units", "export it again")


@case
def policy_without_a_dial_table(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    card = json.loads((policy / "policy.json").read_text())
    (policy / "policy.json").write_text(json.dumps({**card, "dial": []}))
    return Mistake(cli.main, generation(inputs, policy=policy), "'policy' has no table", "give --kl-weight")


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


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_mistake(build: Callable[[Inputs], Mistake], inputs: Inputs) -> None:
    mistake = build(inputs)
    good = [tree(path) for path in (inputs.model, inputs.nested, inputs.policy)]
    before = tree(inputs.own)
    finished = run(mistake.main, *mistake.arguments)
    assert mistake.value in finished.error
    assert mistake.fix in finished.error
    assert tree(inputs.own) == before
    assert [tree(path) for path in (inputs.model, inputs.nested, inputs.policy)] == good


def full_disk(*arguments: object, **keywords: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))


def full_disk_for_safetensors(*arguments: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_full_disk_while_quantizing(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexquant_rl.engine.files.save_file", full_disk_for_safetensors)
    finished = run(cli.main, "quantize", inputs.model, inputs.own / "out")
    assert "No space left on device" in finished.error
    assert "free some space" in finished.error
    assert tree(inputs.own) == {}


def test_full_disk_at_the_start_of_a_run(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", full_disk)
    finished = run(train.main, *training(inputs))
    assert "config.json" in finished.error
    assert "free some space" in finished.error
    assert tree(inputs.own) == {}


def test_machine_too_busy_to_time_steps(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "clock_ms", lambda step, device: -1.0)
    finished = run(cli.main, "profile", inputs.model, "--text", inputs.text, "--out", inputs.own / "profile.json")
    assert "takes -1 ms" in finished.error
    assert "--source roofline" in finished.error
    assert tree(inputs.own) == {}


def test_bug_keeps_its_traceback(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the user can mend is said in one line."""
    monkeypatch.setattr("flexquant_rl.agents.training.roofline_cost", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(train.main, *training(inputs))


@pytest.mark.parametrize("arguments", [("--seed", "many"), ("--sead", 1), ("--device",)], ids=str)
def test_usage_errors_are_explained(inputs: Inputs, arguments: tuple[object, ...]) -> None:
    finished = run(train.main, *training(inputs, *arguments))
    assert finished.code == 2
    assert "Traceback" not in finished.err
    assert str(arguments[0]) in finished.err
    assert tree(inputs.own) == {}
