"""What drafts and passes over several tokens take on this device, as a profile holds it beside its table of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexquant_rl.engine.control.signals import check_widths
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.errors import InputError


@dataclass(frozen=True)
class DraftTimes:
    """Times of one model on one device, with one decoder and number of threads.

    Attributes:
        draft_widths: The widths that draft, ascending.
        verify_width: The width of the passes.
        costs: Times of a draft step at each of these widths, of the end of a round of 1 to D + 1 tokens, of a decision.
    """

    draft_widths: tuple[int, ...]
    verify_width: int
    costs: VerifyCosts

    def __post_init__(self) -> None:
        check_widths(self.draft_widths)
        if len(self.costs.draft_ms) != len(self.draft_widths):
            raise ValueError(f"{len(self.costs.draft_ms)} times of drafts at {len(self.draft_widths)} widths")

    @property
    def depth(self) -> int:
        """D, drafts of a round at most."""
        return len(self.costs.verify_ms) - 1

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """Every width that was timed, ascending."""
        return (*self.draft_widths, self.verify_width)

    def shares(self) -> dict[str, Any]:
        """The times for people: a plain step at the verify width in ms, and shares of it by width and by tokens."""
        costs = self.costs
        by_width = zip(map(str, self.draft_widths), costs.draft_ms, strict=True)
        return {
            "verify_width": self.verify_width,
            "plain_step_ms": costs.plain_ms,
            "draft_share_by_width": {width: ms / costs.plain_ms for width, ms in by_width},
            "pass_share_by_tokens": {str(m): ms / costs.plain_ms for m, ms in enumerate(costs.verify_ms, start=1)},
            "network_share": costs.controller_ms / costs.plain_ms,
        }

    def costs_of(self, draft_widths: Sequence[int], verify_width: int, depth: int) -> VerifyCosts:
        """The costs of some of these widths as levels, and of rounds of so many drafts.

        Raises:
            InputError: If one of them was not timed.
        """
        if verify_width != self.verify_width:
            raise InputError(
                f"the profile times passes at {self.verify_width} bits, and those of this run are at {verify_width}; "
                f"verify at {self.verify_width} bits"
            )
        missing = [width for width in draft_widths if width not in self.draft_widths]
        if missing:
            timed = ", ".join(map(str, self.draft_widths))
            raise InputError(f"the profile has no time of a draft at {missing[0]} bits; draft at some of {timed}")
        if depth > self.depth:
            raise InputError(
                f"the profile times rounds of up to {self.depth} drafts, and this run has up to {depth}; run "
                f"`fq profile --depth {depth}`"
            )
        draft_ms = tuple(self.costs.draft_ms[self.draft_widths.index(width)] for width in draft_widths)
        return replace(self.costs, draft_ms=draft_ms, verify_ms=self.costs.verify_ms[: depth + 1])

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "draft_widths": list(self.draft_widths),
            "verify_width": self.verify_width,
            "costs": self.costs.to_dict(),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> DraftTimes:
        """Reads the JSON form.

        Raises:
            KeyError, TypeError, ValueError: If it is not what `to_dict` writes.
        """
        verify_width, draft_widths, costs = data["verify_width"], tuple(data["draft_widths"]), data["costs"]
        if type(verify_width) is not int or not isinstance(costs, dict):
            raise ValueError("the times of drafts have no verify width or no costs")
        times = DraftTimes(draft_widths, verify_width, VerifyCosts.from_dict(costs))
        if draft_widths[-1] >= verify_width or times.costs.source != "measured":
            raise ValueError("the times of drafts are not measured ones of widths below the verify width")
        return times
