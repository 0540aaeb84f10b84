"""FlexQuant's shape: the smoothed entropy of the output says how many units run low."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.unbound import Family, PolicyContext, RulePolicy, check_width
from flexquant_rl.engine.control.decision import Decision, joined_rows
from flexquant_rl.engine.errors import InputError

# Float32 cannot divide by much less.
_SMALLEST_SPREAD_NATS = 1e-3
_MOST_UNITS = 100_000


@dataclass(frozen=True)
class EntropyThreshold:
    """The surer the model, the more units run low, least sensitive first.

    The paper's abstract fixes the signals and the granularity. The map from entropy to a number of units is ours:
    linear around a threshold, with hysteresis, optionally one-way (low units never return).

    Attributes:
        threshold_nats: At this entropy half of the units run low; above it fewer, below it more.
        spread_nats: Range of entropies from all units low to none low.
        hysteresis_units: Changes of at most so many units are not made.
        one_way: Whether units that have gone low stay low until the episode ends.
        low_width: Width of the low units.
        high_width: Width of the others.
    """

    family: ClassVar[Family] = Family("entropy", "entropy", "#E69F00", "^")

    threshold_nats: float
    spread_nats: float = 2.0
    hysteresis_units: int = 1
    one_way: bool = False
    low_width: int = 4
    high_width: int = 8

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold_nats):
            raise InputError(f"threshold_nats={self.threshold_nats} is not finite; give an entropy in nats, e.g. 1.5")
        if not _SMALLEST_SPREAD_NATS <= self.spread_nats < math.inf:
            raise InputError(
                f"spread_nats={self.spread_nats:g} is not a finite range of at least {_SMALLEST_SPREAD_NATS:g} nats; "
                "the default is 2"
            )
        if not 0 <= self.hysteresis_units <= _MOST_UNITS:
            raise InputError(
                f"hysteresis_units={self.hysteresis_units} must be 0 to {_MOST_UNITS}; 0 makes every change"
            )
        check_width("low_width", self.low_width)
        check_width("high_width", self.high_width)
        if self.low_width >= self.high_width:
            raise InputError(f"low_width={self.low_width} must be below high_width={self.high_width}; lower it")

    def bind(self, context: PolicyContext) -> RulePolicy:
        """See `UnboundPolicy`; units are ranked by their sensitivity at the low width."""
        name, schema = policy_name(self), context.schema
        context.column(self.high_width, name)
        order = context.profile.sensitivity[:, context.column(self.low_width, name)].argsort(stable=True)
        rank = order.argsort()
        is_low = rank < torch.arange(schema.num_units + 1)[:, None]
        by_num_low = torch.where(is_low, self.low_width, self.high_width).split(1)  # U + 1 times [1, U]
        entropy_at, position_at = schema.index("token_entropy_ema"), schema.index("position")
        widths_at = slice(schema.num_global + schema.index_in_unit("last_width"), None, schema.num_per_unit)
        low_signal = schema.width_signal(self.low_width)

        def decide(signals: Tensor) -> Decision:
            # In plain numbers: behind a step, which leaves nothing in the caches, an operation of torch takes 20 us.
            widths = []
            for row in signals.tolist():
                before = None if row[position_at] == 0 else row[widths_at].count(low_signal)
                entropy_ema_nats = schema.nats(row[entropy_at])
                widths.append(by_num_low[self._num_low(schema.num_units, entropy_ema_nats, before)])
            return Decision(joined_rows(widths).to(signals.device))

        return RulePolicy(name, decide)

    def _num_low(self, num_units: int, entropy_ema_nats: float, before: int | None) -> int:
        """How many of U units run low; `before`: how many did at the last step, None where there was none."""
        share_low = 0.5 + (self.threshold_nats - entropy_ema_nats) / self.spread_nats
        wanted = round(min(max(share_low, 0.0), 1.0) * num_units)
        if before is None:
            return wanted
        num_low = wanted if abs(wanted - before) > self.hysteresis_units else before
        return max(num_low, before) if self.one_way else num_low
