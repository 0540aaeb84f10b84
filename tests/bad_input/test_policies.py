"""Mistakes about policies (`fq evaluate`, `fq generate`) end with exit code 2 and one line. Nothing is left behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mistakes import Cases, Inputs, Mistake, check_mistake, damage

from flexquant_rl import cli
from flexquant_rl.engine.files import file_sha256

case = Cases()

SEVEN_BITS = b"""
from dataclasses import dataclass
import torch
from flexquant_rl.agents.policies.unbound import RulePolicy
from flexquant_rl.engine.control.decision import Decision

@dataclass(frozen=True)
class Sevens:
    def bind(self, context):
        units = context.schema.num_units
        return RulePolicy("sevens", lambda signals: Decision(torch.full((len(signals), units), 7)))
"""

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
    return bad_policy(inputs, "zzz", "unknown policy 'zzz'", "known: fixed:BIT_WIDTH, random:MEAN_BIT_WIDTH")


@case
def policy_of_a_width_not_stored(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "fixed:7", "width 7 is not stored", "choose one of 3, 4, 5, 6, 8")


@case
def policy_without_a_number(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "knapsack:many", "mean_bit_width='many' is not a number", "write e.g. mean_bit_width=4.5")


@case
def policy_of_no_number(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "entropy:nan", "threshold_nats='nan' is not finite", "write e.g. threshold_nats=4.5")


@case
def policy_below_the_widths(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "random:1.5", "mean width 1.5 is outside the stored widths 3 to 8", "in between")


@case
def policy_with_an_unknown_key(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "entropy:1.5,oneway=true", "unknown key 'oneway'", "entropy has threshold_nats, spread")


@case
def policy_out_of_its_domain(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "entropy:1.5,spread_nats=-1", "spread_nats=-1", "the default is 2")


@case
def policy_of_no_module(inputs: Inputs) -> Mistake:
    return bad_policy(inputs, "no_such_module:Mine", "no module no_such_module here", "without .py")


@case
def policy_that_chooses_widths_not_stored(inputs: Inputs) -> Mistake:
    inputs.write("seven_bits.py", SEVEN_BITS)
    return bad_policy(inputs, "seven_bits:Sevens", "it chose width 7, which is not stored", "one of 3, 4, 5, 6, 8")


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
def evaluation_of_no_sequence(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, (*evaluation(inputs, "fixed:4"), "--sequences", 0), "--sequences 0", "at least 1")


# Generation


def generation(inputs: Inputs, *options: object, policy: Path | None = None, prompt: str = "abc") -> tuple[object, ...]:
    return ("generate", inputs.model, "--policy", policy or inputs.policy, "--prompt", prompt, *options)


@case
def prompt_too_long(inputs: Inputs) -> Mistake:
    return Mistake(
        cli.main, generation(inputs, prompt="a" * 120), "120 tokens of prompt and 64 new ones", "shorten the"
    )


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
def temperature_that_divides_to_no_number(inputs: Inputs) -> Mistake:
    arguments = generation(inputs, "--temperature", "1e-42")
    return Mistake(cli.main, arguments, "temperature=1e-42 is below 1e-06", "0 is greedy")


@case
def seed_beyond_64_bits(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, generation(inputs, "--seed", 2**64), f"seed={2**64} is not one of 64 bits", "use 0 to")


@case
def seed_below_zero(inputs: Inputs) -> Mistake:
    return Mistake(cli.main, generation(inputs, "--seed", -1), "seed=-1 is not one of 64 bits", "use 0 to")


@case
def prompt_not_utf_8(inputs: Inputs) -> Mistake:
    # How Python hands on the byte 0xff of a command line.
    arguments = generation(inputs, prompt="abc\udcff")
    return Mistake(cli.main, arguments, r"the prompt is not UTF-8 text ('\udcff' at character 3)", "convert it")


@case
def policy_with_a_dial_of_words(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    card = json.loads((policy / "policy.json").read_text())
    card["dial"][0]["speedup_modelled"] = "fast"
    (policy / "policy.json").write_text(json.dumps(card))
    arguments = generation(inputs, "--speed", 1.2, policy=policy)
    return Mistake(cli.main, arguments, "the dial's points are finite numbers", "export it again")


@case
def policy_of_more_signals_than_memory(inputs: Inputs) -> Mistake:
    policy = inputs.copy(inputs.policy)
    card = json.loads((policy / "policy.json").read_text())
    card["schema"]["num_embedding_dims"] = 10**12
    (policy / "policy.json").write_text(json.dumps(card))
    return bad_policy(inputs, policy, "counts are not whole numbers up to 65536", "export it again")


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
    return Mistake(cli.main, generation(inputs, policy=policy), f"{str(policy)!r} has no table", "give --kl-weight")


@pytest.mark.parametrize("build", case.builders, ids=lambda build: build.__name__)
def test_mistake(build: Callable[[Inputs], Mistake], inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # a policy of the user's own adds the current directory
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    check_mistake(build(inputs), inputs)
