"""Policies of drafts as they are deployed: a network or a rule, with its levels and its card. Needs torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.control.draft_limits import check_ngram_drafts
from flexquant_rl.engine.control.drafting_net import DraftingNet, LearnedDrafting
from flexquant_rl.engine.control.drafting_rules import (
    DraftingContext,
    DraftingRule,
    Plain,
    rule_from_dict,
    rule_to_dict,
)
from flexquant_rl.engine.control.drafts import DraftPolicy
from flexquant_rl.engine.control.policy import PolicyCard
from flexquant_rl.engine.control.served_drafts import ServedDrafts
from flexquant_rl.engine.control.verified_signals import VERIFIED_SCHEMA_VERSION, VerifiedSchema
from flexquant_rl.engine.control.verify_costs import VerifyCosts

_NET = "net."
_LEVELS, _VERIFY = "level_bit_widths", "verify_bit_widths"


@dataclass(frozen=True)
class DraftsFacts:
    """What an exported policy of drafts is, and what it was made with.

    Attributes:
        rule: The rule; None where a network decides.
        costs: What steps cost where it was trained or tuned; None where nobody asked.
        acceptance: `L` shares of drafts that agree on training sequences; None where nothing was recorded.
        speedup_validation: Speed on validation sequences over plain decoding, by those costs; None where not known.
    """

    rule: DraftingRule | None
    costs: VerifyCosts | None = None
    acceptance: tuple[float, ...] | None = None
    speedup_validation: float | None = None


@dataclass(frozen=True, eq=False)
class DeployedDrafts(ServedDrafts):
    """A policy of drafts for one model.

    Attributes:
        card: What it belongs to; it has no dial.
        facts: What it is.
    """

    card: PolicyCard
    facts: DraftsFacts

    @property
    def never_drafts(self) -> bool:
        """Whether it is plain decoding at the verify widths, for which no round is needed."""
        return isinstance(self.facts.rule, Plain)

    @property
    def verify_width(self) -> int:
        """The largest of the verify widths, which are one stored width in all recordings."""
        return int(self.verify_bit_widths.max())


def may_draft(policy: Policy | DraftPolicy) -> bool:
    """Whether a policy has rounds; the rule `plain` is a policy of drafts and has none."""
    return isinstance(policy, DraftPolicy) and not (isinstance(policy, DeployedDrafts) and policy.never_drafts)


def deploy_rule(
    name: str,
    schema: VerifiedSchema,
    levels: Tensor,
    verify_bit_widths: Tensor,
    card: PolicyCard,
    facts: DraftsFacts,
    ngram_drafts: int = 0,
) -> DeployedDrafts:
    """A rule for one model.

    Args:
        name: As it appears in tables.
        schema: What observations are.
        levels: `[L, U]` int64, the allocations that draft.
        verify_bit_widths: `[U]` int64.
        card: The model's.
        facts: Has the rule, and the costs and acceptance that it may weigh.
        ngram_drafts: See `ServedDrafts`.

    Raises:
        ValueError: If the rule weighs costs or acceptance that are not known.
    """
    assert facts.rule is not None, "a network is deployed by deploy_net"
    acceptance = None if facts.acceptance is None else np.array(facts.acceptance)
    decide = facts.rule.bind(DraftingContext(schema, facts.costs, acceptance))
    sees = facts.rule.sees
    return DeployedDrafts(name, schema, levels, verify_bit_widths, decide, sees, card, facts, ngram_drafts=ngram_drafts)


def deploy_net(
    name: str,
    net: DraftingNet,
    levels: Tensor,
    verify_bit_widths: Tensor,
    card: PolicyCard,
    facts: DraftsFacts,
    ngram_drafts: int = 0,
) -> DeployedDrafts:
    """A copy of a network for one model; arguments as for `deploy_rule`."""
    decide, sees = net.policy(), net.sees
    return DeployedDrafts(
        name, net.schema, levels, verify_bit_widths, decide, sees, card, facts, ngram_drafts=ngram_drafts
    )


def drafts_tensors(policy: DeployedDrafts) -> dict[str, Tensor]:
    """What a policy consists of: its levels and verify widths, and the network's weights and normalisation."""
    tensors = {_LEVELS: policy.level_bit_widths, _VERIFY: policy.verify_bit_widths}
    if isinstance(policy.decide, LearnedDrafting):
        tensors |= {f"{_NET}{name}": tensor for name, tensor in policy.decide.net.state_dict().items()}
    return tensors


def drafts_to_dict(policy: DeployedDrafts) -> dict[str, Any]:
    """What its JSON says beside the card."""
    facts = policy.facts
    return {
        "schema": policy.schema.to_dict(),
        "levels": [_said(widths) for widths in policy.level_bit_widths],
        "verify_width": policy.verify_width,
        "ngram_drafts": policy.ngram_drafts,
        "rule": None if facts.rule is None else rule_to_dict(facts.rule),
        "costs": None if facts.costs is None else facts.costs.to_dict(),
        "acceptance": None if facts.acceptance is None else list(facts.acceptance),
        "speedup_validation": facts.speedup_validation,
    }


def drafts_version(data: Any) -> object:
    """The version of the observation that a JSON object is for; None where it says none."""
    schema = data.get("schema") if isinstance(data, dict) else None
    return schema.get("version") if isinstance(schema, dict) else None


def drafts_from(data: dict[str, Any], tensors: dict[str, Tensor], card: PolicyCard, name: str) -> DeployedDrafts:
    """Puts a policy together from its files.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError, AttributeError: If they do not hold one; InputError if its costs
            are none.
    """
    assert drafts_version(data) == VERIFIED_SCHEMA_VERSION, "the caller checks the version"
    schema = VerifiedSchema.from_dict(data["schema"])
    levels, verify = tensors[_LEVELS], tensors[_VERIFY]
    num_units = card.schema.num_units
    shapes = {_LEVELS: (schema.num_levels, num_units), _VERIFY: (num_units,)}
    for key, shape in shapes.items():
        if tensors[key].dtype != torch.int64 or tuple(tensors[key].shape) != shape:
            raise ValueError(f"{key} is not {list(shape)} int64")
        if not set(tensors[key].flatten().tolist()) <= set(card.schema.bit_widths):
            raise ValueError(f"{key} has a width that is not stored, {list(card.schema.bit_widths)} are")
    costs = None if data["costs"] is None else VerifyCosts.from_dict(data["costs"])
    if costs is not None:
        costs.check(schema.num_levels, schema.depth)
    rule = None if data["rule"] is None else rule_from_dict(data["rule"], schema)
    facts = DraftsFacts(rule, costs, _numbers(data["acceptance"], schema.num_levels), _speed(data))
    ngram_drafts = data.get("ngram_drafts", 0)  # none in policies from before they were looked up
    check_ngram_drafts(ngram_drafts)
    if rule is not None:
        if tensors.keys() != shapes.keys():
            raise ValueError("a rule has no weights")
        return deploy_rule(name, schema, levels, verify, card, facts, ngram_drafts)
    weights = {key.removeprefix(_NET): tensor for key, tensor in tensors.items() if key not in shapes}
    if weights["mean"].shape != (schema.dim,):  # before a net of any size is made
        raise ValueError(f"the network is not for observations of {schema.dim} numbers")
    net = DraftingNet(schema)
    net.load_state_dict(weights)
    return deploy_net(name, net, levels, verify, card, facts, ngram_drafts)


def _said(widths: Tensor) -> float:
    """A level in words of the JSON: its mean width."""
    return round(float(widths.double().mean()), 3)


def _numbers(values: Sequence[Any] | None, count: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    if len(values) != count or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ValueError(f"acceptance is not {count} finite numbers")
    return tuple(map(float, values))


def _speed(data: dict[str, Any]) -> float | None:
    speed = data["speedup_validation"]
    if speed is None:
        return None
    if type(speed) not in (int, float) or not math.isfinite(speed):
        raise ValueError("speedup_validation is no finite number")
    return float(speed)
