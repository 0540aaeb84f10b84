"""The static allocation of a given mean width: the best that does not look at the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.unbound import Family, PolicyContext, check_width
from flexquant_rl.engine.control.decision import StaticAllocation


@dataclass(frozen=True)
class Knapsack:
    """The point of the static front whose mean width is nearest.

    Attributes:
        mean_bit_width: Parameter-weighted mean over the units, bits.
    """

    family: ClassVar[Family] = Family("knapsack", "knapsack (static)", "#0072B2", "s", is_static=True)

    mean_bit_width: float

    def __post_init__(self) -> None:
        check_width("mean_bit_width", self.mean_bit_width)

    def bind(self, context: PolicyContext) -> StaticAllocation:
        """See `UnboundPolicy`."""
        name = policy_name(self)
        context.check_mean(self.mean_bit_width, name)
        return StaticAllocation(name, context.front.nearest(self.mean_bit_width))
