"""DP-LLM's choice in flight by name: which share of the tokens gets the higher of two widths in each unit.

A unit chooses by what it is about to read, within the pass. No policy of signals can do that and no decoder does, so
this family is not bound to a model: `agents/evaluation/relative_error.py` fits and judges it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from flexquant_rl.agents.policies.names import EXAMPLE, read_parameters
from flexquant_rl.agents.policies.unbound import Family, check_width
from flexquant_rl.engine.errors import InputError


@dataclass(frozen=True)
class RelativeError:
    """Two static allocations; in each unit the tokens of the largest relative error get the slower one's width.

    Attributes:
        share_high: Share of the tokens that get the high width, the same for all units, 0 to 1. The thresholds that
            give it are fitted to validation text.
        low: Mean width of the fast allocation, bits: a stored width for all units, or the nearest point of the front.
        high: Mean width of the slow allocation, bits.
    """

    family: ClassVar[Family] = Family("relative-error", "relative error (in flight)", "#7A5195", "v", is_in_flight=True)

    share_high: float = field(metadata={EXAMPLE: "0.5"})
    low: float = 4
    high: float = 5

    def __post_init__(self) -> None:
        if not 0 <= self.share_high <= 1:
            raise InputError(
                f"share_high={self.share_high:g} is no share of the tokens; choose one from 0 to 1, e.g. 0.5 for a "
                "mean width halfway between low and high"
            )
        check_width("low", self.low)
        check_width("high", self.high)
        if self.low >= self.high:
            raise InputError(f"low={self.low:g} must be below high={self.high:g}; lower it")


def parse_in_flight(name: str) -> RelativeError | None:
    """Reads the name of such a policy; None if it is another one's.

    Raises:
        InputError: If its parameters are wrong.
    """
    prefix, _, parameters = name.partition(":")
    return read_parameters(RelativeError, parameters, name) if prefix == RelativeError.family.name else None
