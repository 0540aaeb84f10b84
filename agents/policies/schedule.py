"""High widths for the first tokens of a continuation and low ones after them, as in PMPD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.unbound import Family, PolicyContext, check_width
from flexquant_rl.engine.control.decision import PositionPolicy, joined_rows
from flexquant_rl.engine.errors import InputError

_MOST_TOKENS = 1_000_000


@dataclass(frozen=True)
class Schedule:
    """Two static allocations, the faster one after the first tokens; it looks at nothing but the position.

    Attributes:
        first: Tokens of a continuation at the high width.
        high: Their mean width, bits: a stored width for all units, or the point of the static front nearest to it.
        low: Mean width of all later tokens, bits.
    """

    family: ClassVar[Family] = Family("schedule", "schedule", "#CC79A7", "P")

    first: int
    high: float = 8
    low: float = 4

    def __post_init__(self) -> None:
        if not 0 <= self.first <= _MOST_TOKENS:
            raise InputError(
                f"first={self.first} must be 0 to {_MOST_TOKENS} tokens; 0 reads every token at the low width"
            )
        check_width("high", self.high)
        check_width("low", self.low)
        if self.low >= self.high:
            raise InputError(f"low={self.low:g} must be below high={self.high:g}; lower it")

    def bind(self, context: PolicyContext) -> PositionPolicy:
        """See `UnboundPolicy`."""
        name = policy_name(self)
        low, high = (context.allocation(mean, name)[None] for mean in (self.low, self.high))

        def at(positions: Tensor) -> Tensor:
            return joined_rows([high if position < self.first else low for position in positions.tolist()])

        return PositionPolicy(name, at, context.schema.tokens_decoded)
