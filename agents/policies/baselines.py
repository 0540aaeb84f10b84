"""Policies that learn nothing, behind the same protocol as the learned one, and the names that commands know."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexquant_rl.agents.policies.static_front import StaticFront
from flexquant_rl.engine.control.decision import Decision, Policy, StaticAllocation
from flexquant_rl.engine.control.policy import load_policy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.errors import InputError

_LOW_WIDTH, _HIGH_WIDTH = 4, 8


class RandomWidths:
    """Draws each unit's width anew at every token, from the two stored widths around a mean.

    The control for "any mix works". Not a pure function of the signals, the only such policy: it owns a seeded
    generator.

    Args:
        profile: Gives the stored widths.
        mean_bit_width: Expected width of every unit.
        seed: Of the draws.

    Raises:
        InputError: If the mean is outside the stored widths.
    """

    def __init__(self, profile: Profile, mean_bit_width: float, seed: int = 0) -> None:
        widths = profile.bit_widths
        if not widths[0] <= mean_bit_width <= widths[-1]:
            raise InputError(f"random:{mean_bit_width:g} is outside the stored widths {widths[0]} to {widths[-1]}")
        self.name = f"random:{mean_bit_width:g}"
        self._low = max(w for w in widths if w <= mean_bit_width)
        self._high = min(w for w in widths if w >= mean_bit_width)
        span = self._high - self._low
        self._share_high = (mean_bit_width - self._low) / span if span else 0.0
        self._num_units = len(profile.sensitivity)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, signals: Tensor) -> Decision:
        """See `Policy`."""
        draws = torch.rand(len(signals), self._num_units, generator=self._generator)
        return Decision(torch.where(draws < self._share_high, self._high, self._low))


@dataclass(frozen=True)
class EntropyThreshold:
    """FlexQuant's shape: the smoothed entropy of the output says how many units, least sensitive first, run low.

    The paper's abstract fixes the signals and the granularity; the map from entropy to a number of units is ours:
    linear between two thresholds, with hysteresis, optionally one-way (low units never return).

    Attributes:
        schema: Of the signals.
        rank: `[U]` int64, 0 for the least sensitive unit.
        threshold_nats: At this entropy half of the units run low; above it fewer, below it more.
        spread_nats: From all low to none low over this range.
        hysteresis_units: Changes of so few units, or fewer, are not made.
        one_way: Units that have gone low stay low until the episode ends.
        low_width: Width of the low units.
        high_width: Width of the others.
    """

    schema: SignalSchema
    rank: Tensor
    threshold_nats: float
    spread_nats: float = 2.0
    hysteresis_units: int = 1
    one_way: bool = False
    low_width: int = _LOW_WIDTH
    high_width: int = _HIGH_WIDTH

    @property
    def name(self) -> str:
        """As it appears in tables."""
        return f"entropy:{self.threshold_nats:g}"

    def __call__(self, signals: Tensor) -> Decision:
        """See `Policy`."""
        entropy = signals[:, self.schema.index("token_entropy_ema")] * 4
        num_units = self.schema.num_units
        share_low = 0.5 + (self.threshold_nats - entropy) / self.spread_nats
        wanted = (share_low.clamp(0, 1) * num_units).round().long()
        before = (self.schema.last_widths(signals) == self.low_width).sum(-1)
        first = self.schema.is_first_step(signals)
        num_low = torch.where(((wanted - before).abs() > self.hysteresis_units) | first, wanted, before)
        if self.one_way:
            num_low = torch.where(first, num_low, torch.maximum(num_low, before))
        is_low = self.rank.to(signals.device) < num_low[:, None]
        return Decision(torch.where(is_low, self.low_width, self.high_width))


@dataclass(frozen=True)
class PolicyContext:
    """What named policies are built from."""

    profile: Profile
    front: StaticFront
    schema: SignalSchema
    model_fingerprint: str


def _number(name: str, argument: str, context: PolicyContext) -> float:
    try:
        number = float(argument)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"policy {name!r}: {argument!r} is not a number; write e.g. {name.split(':')[0]}:4")
    return number


def _fixed(name: str, argument: str, context: PolicyContext) -> Policy:
    width = _number(name, argument, context)
    if width not in context.profile.bit_widths:
        stored = ", ".join(map(str, context.profile.bit_widths))
        raise InputError(f"policy {name!r}: width {argument} is not stored; choose one of {stored}")
    return StaticAllocation(name, torch.full((context.schema.num_units,), int(width)))


def _knapsack(name: str, argument: str, context: PolicyContext) -> Policy:
    mean = _number(name, argument, context)
    widths = context.profile.bit_widths
    if not widths[0] <= mean <= widths[-1]:
        raise InputError(f"policy {name!r}: mean width {argument} is outside the stored {widths[0]} to {widths[-1]}")
    return StaticAllocation(name, context.front.nearest(mean))


def _random(name: str, argument: str, context: PolicyContext) -> Policy:
    return RandomWidths(context.profile, _number(name, argument, context))


def _entropy(name: str, argument: str, context: PolicyContext) -> Policy:
    return entropy_threshold(context, _number(name, argument, context))


def entropy_threshold(context: PolicyContext, threshold_nats: float, *, one_way: bool = False) -> EntropyThreshold:
    """The FlexQuant-like policy over units ranked by their sensitivity at the low width."""
    widths = context.profile.bit_widths
    low = _LOW_WIDTH if _LOW_WIDTH in widths else widths[0]
    rank = torch.empty(context.schema.num_units, dtype=torch.int64)
    order = context.profile.sensitivity[:, widths.index(low)].argsort(stable=True)
    rank[order] = torch.arange(context.schema.num_units)
    return EntropyThreshold(
        context.schema, rank, threshold_nats, one_way=one_way, low_width=low, high_width=max(widths)
    )


_FAMILIES: dict[str, Callable[[str, str, PolicyContext], Policy]] = {
    "fixed": _fixed,
    "knapsack": _knapsack,
    "random": _random,
    "entropy": _entropy,
}


def check_policy_name(name: str) -> None:
    """Raises InputError if a name is neither `family:number` nor a directory; needs no model, so it can come first."""
    family, separator, argument = name.partition(":")
    if (separator and family in _FAMILIES) or Path(name).is_dir():
        return
    near = difflib.get_close_matches(family, _FAMILIES, n=1, cutoff=0.5)
    known = ", ".join(f"{family}:NUMBER" for family in _FAMILIES)
    hint = f"did you mean {near[0]}:{argument or '4'}?" if near else f"known: {known}"
    raise InputError(f"unknown policy {name!r}; {hint} (or the directory of an exported policy)")


def make_policy(name: str, context: PolicyContext) -> Policy:
    """Builds a policy from `family:number` or from the directory of an exported one.

    Raises:
        InputError: If the name is unknown, the number makes no sense, or the directory holds a damaged policy or one of
            another model or schema.
    """
    check_policy_name(name)
    family, separator, argument = name.partition(":")
    if separator and family in _FAMILIES:
        return _FAMILIES[family](name, argument, context)
    return load_policy(Path(name), model_fingerprint=context.model_fingerprint)
