"""Exported policies of drafts: what is loaded decides as what was saved, and what is wrong is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexquant_rl.engine.control.artefact import load_policy, save_policy
from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts, DraftsFacts, deploy_net, deploy_rule
from flexquant_rl.engine.control.drafting_net import DraftingNet, normalisation
from flexquant_rl.engine.control.drafting_rules import (
    RULES,
    Bandit,
    ConfidenceStop,
    FixedRounds,
    ProfileGuided,
    rule_from_dict,
    rule_to_dict,
)
from flexquant_rl.engine.control.policy import PolicyCard
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.served_drafts import own_ngram_drafts
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.verified_signals import Observations, VerifiedSchema
from flexquant_rl.engine.control.verify_costs import VerifyCosts, modelled_costs
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import file_sha256

SCHEMA = VerifiedSchema(2, 3)
STORED = (3, 4, 8)
LEVELS = torch.tensor([[3, 3, 4], [4, 4, 4]])
VERIFY = torch.full((3,), 8)
CARD = PolicyCard(SignalSchema(3, STORED), "model-a", ("a", "b", "head"), config={"quantization": None})
COSTS = modelled_costs((0.4, 0.6), (1.0, 1.1), depth=3)


def make_net() -> DeployedDrafts:
    net = DraftingNet(SCHEMA)
    net.mean.uniform_(-1, 1)
    net.std.uniform_(0.5, 2)
    return deploy_net("ppo", net, LEVELS, VERIFY, CARD, DraftsFacts(None, COSTS, (0.5, 0.75), 1.25))


def make_frugal_net() -> DeployedDrafts:
    """Sees no more than confidences."""
    net = DraftingNet(SCHEMA)
    mean, std = normalisation(SCHEMA, torch.from_numpy(observations()), sees="confidences")
    net.mean.copy_(mean)
    net.std.copy_(std)
    return deploy_net("ppo", net, LEVELS, VERIFY, CARD, DraftsFacts(None, COSTS, (0.5, 0.75), 1.25))


def make_rule(rule: Any) -> DeployedDrafts:
    return deploy_rule("rule", SCHEMA, LEVELS, VERIFY, CARD, DraftsFacts(rule, COSTS, (0.5, 0.75), 1.25))


def save(policy: DeployedDrafts, path: Path) -> Path:
    cost = CostTable("roofline", 1.0, torch.ones(3, 3, dtype=torch.float64), STORED, "model-a", "cpu", None)
    save_policy(policy, Profile(cost, torch.zeros(3, 3), STORED, "model-a", 0, "8-bit"), path)
    return path


def observations(count: int = 200) -> Observations:
    """Random ones whose counts are whole."""
    rng = np.random.default_rng()
    found = rng.random((count, SCHEMA.dim)).astype(np.float32)
    for name in ("pending", "last_drafted", "last_accepted"):
        found[:, SCHEMA.index(name)] = rng.integers(0, SCHEMA.depth, count) / SCHEMA.depth
    return found


MIDDLE = [list(kind.grid(SCHEMA))[len(list(kind.grid(SCHEMA))) // 2] for kind in RULES]


@pytest.mark.parametrize(
    "policy",
    [make_net(), make_frugal_net(), *map(make_rule, MIDDLE)],
    ids=["net", "frugal net", *(one.family for one in MIDDLE)],
)
def test_what_is_loaded_decides_as_what_was_saved(policy: DeployedDrafts, tmp_path: Path) -> None:
    loaded = load_policy(save(policy, tmp_path / "p"), model_fingerprint="model-a", name="x")
    assert isinstance(loaded, DeployedDrafts)
    seen = observations()
    actions = loaded.decide(seen)
    assert actions.tolist() == policy.restarted().decide(seen).tolist()
    assert torch.equal(loaded.level_bit_widths, LEVELS)
    assert torch.equal(loaded.verify_bit_widths, VERIFY)
    assert (loaded.card, loaded.facts, loaded.schema, loaded.sees) == (CARD, policy.facts, SCHEMA, policy.sees)
    assert (loaded.name, loaded.verify_width) == ("x", 8)
    data = json.loads((tmp_path / "p" / "policy.json").read_text())
    assert data["kind"] == "drafts"
    assert data["drafts"]["levels"] == [3.333, 4.0]


def test_what_is_looked_up_is_saved_with_the_policy(tmp_path: Path) -> None:
    path = save(deploy_rule("rule", SCHEMA, LEVELS, VERIFY, CARD, DraftsFacts(FixedRounds(0, 2)), 5), tmp_path / "rule")
    file = path / "policy.json"
    data = json.loads(file.read_text())
    assert own_ngram_drafts(load_policy(path)) == data["drafts"].pop("ngram_drafts") == 5
    file.write_text(json.dumps(data))  # as policies were before anything was looked up
    assert own_ngram_drafts(load_policy(path)) == 0


def test_a_network_says_what_it_looks_at() -> None:
    frugal, seen = make_frugal_net(), observations()
    assert (frugal.sees, make_net().sees) == ("confidences", "signals")
    blind = seen.copy()
    blind[:, : SCHEMA.index("can_draft")] = 9
    blind[:, SCHEMA.index("embedding_0") :] = 9
    assert frugal.decide(blind).tolist() == frugal.decide(seen).tolist()


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trained for model model-a, but this one is model-b"):
        load_policy(save(make_net(), tmp_path / "p"), model_fingerprint="model-b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["drafts"]["schema"].update(version=99), "drafts for version 99 of their observation"),
        (lambda data: data["drafts"]["schema"].update(depth=5), "passes over up to 4 tokens"),
        (lambda data: data["drafts"]["schema"].update(num_levels=0), "sizes of the observation"),
        (lambda data: data.pop("drafts"), "drafts for version None"),
        (lambda data: data["drafts"].pop("rule"), "KeyError"),
        (lambda data: data["drafts"].update(costs={}), "not a whole policy of drafts"),
        (lambda data: data["drafts"].update(acceptance=[1, None]), "acceptance is not 2 finite numbers"),
        (lambda data: data["drafts"].update(ngram_drafts=2.5), "ngram_drafts=2.5 must be 0 to 15, a whole number"),
        (lambda data: data["drafts"].update(ngram_drafts=16), "ngram_drafts=16 must be 0 to 15"),
        (lambda data: data["drafts"].update(speedup_validation="fast"), "speedup_validation is no finite number"),
        (lambda data: data["drafts"].update(rule={"family": "none", "parameters": {}}), "KeyError"),
        (lambda data: data["drafts"].update(rule=rule_to_dict(FixedRounds(0, 1))), "a rule has no weights"),
        (lambda data: data.update(kind="other"), "kind 'other' is not learned, token, static or drafts"),
    ],
)
def test_a_card_that_is_wrong(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    path = save(make_net(), tmp_path / "p") / "policy.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        load_policy(path.parent)
    assert message in str(caught.value)
    assert "export" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("level_bit_widths", LEVELS.int()),
        ("level_bit_widths", LEVELS[:1]),
        ("level_bit_widths", LEVELS + 2),
        ("verify_bit_widths", VERIFY[:2]),
        ("net.mean", torch.zeros(3)),
        ("net.action_head.bias", torch.zeros(7)),
        ("net.more", torch.zeros(1)),
    ],
)
def test_tensors_that_are_wrong(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    path = save(make_net(), tmp_path / "p")
    weights = load_file(path / "policy.safetensors") | {name: tensor.contiguous()}
    save_file(weights, path / "policy.safetensors")
    data = json.loads((path / "policy.json").read_text())
    (path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="was edited or damaged"):
        load_policy(path)
    data["weights_sha256"] = file_sha256(path / "policy.safetensors")
    (path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="not a whole policy of drafts"):
        load_policy(path)


@pytest.mark.parametrize(
    "data",
    [
        {"family": "fixed", "parameters": {"level": 2, "length": 1}},
        {"family": "fixed", "parameters": {"level": 0, "length": 4}},
        {"family": "fixed", "parameters": {"level": 0.0, "length": 1}},
        {"family": "fixed", "parameters": {"level": 0}},
        {"family": "product", "parameters": {"level": 0, "threshold": float("nan")}},
        {"family": "product", "parameters": {"level": 0, "threshold": "0.5"}},
        {"family": "product", "parameters": {"level": 0, "threshold": 0.5, "more": 1}},
        {"family": "product"},
    ],
)
def test_rules_that_are_none(data: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        rule_from_dict(data, SCHEMA)


@pytest.mark.parametrize("rule", [ProfileGuided(1.0, 0.5), Bandit(0.1)])
def test_rules_that_weigh_costs_need_them(rule: Any) -> None:
    with pytest.raises(ValueError, match="weighs what steps cost, and no costs are known"):
        deploy_rule("r", SCHEMA, LEVELS, VERIFY, CARD, DraftsFacts(rule))
    deploy_rule("r", SCHEMA, LEVELS, VERIFY, CARD, DraftsFacts(ConfidenceStop(0, 0.4, 3)))


def test_costs_go_through_json() -> None:
    costs = replace(COSTS, controller_ms=0.1, confidence_ms=0.05, settled_ms=0.02)
    older = {name: value for name, value in costs.to_dict().items() if name != "plain_ms"}
    assert VerifyCosts.from_dict(older) == costs, "of a policy that was exported before"
    assert VerifyCosts.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs
    assert costs.charging("signals").settled_ms == 0.02
    assert costs.charging("confidences").settled_ms == costs.charging("nothing").settled_ms == 0
    changes = ({"source": "guessed"}, {"full_ms": None}, {"draft_ms": ["a"]}, {"controller_ms": -1.0})
    for change in (*changes, {"settled_ms": -1.0}):
        with pytest.raises(ValueError, match=r"times|controller_ms|settled_ms"):
            VerifyCosts.from_dict(costs.to_dict() | change)


IN_A_PLAIN_PROCESS = """
import json, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"gymnasium", "stable_baselines3", "tensorboard", "transformers"}:
            raise ModuleNotFoundError(f"serving must not import {name}")

sys.meta_path.insert(0, Absent())

import numpy as np
from flexquant_rl.engine.control.artefact import load_policy

policy = load_policy(sys.argv[1])
print(json.dumps(policy.decide(np.load(sys.argv[2])).tolist()))
"""


def test_loading_needs_no_learning_library(tmp_path: Path) -> None:
    policy, seen = make_net(), observations(20)
    np.save(tmp_path / "seen.npy", seen)
    command = [sys.executable, "-c", IN_A_PLAIN_PROCESS, str(save(policy, tmp_path / "p")), str(tmp_path / "seen.npy")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == policy.decide(seen).tolist()
