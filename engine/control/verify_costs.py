"""What drafts and passes of verification cost: milliseconds by level and by tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flexquant_rl.engine.control.verified_signals import Sees
from flexquant_rl.engine.errors import InputError

_LOOKING = ("controller_ms", "confidence_ms", "settled_ms")


@dataclass(frozen=True)
class VerifyCosts:
    """Times of one model on one device, all from one source.

    Attributes:
        source: `modelled` (given) or `measured` (by the clock); the two never share a column.
        full_ms: A plain step at the largest width, the unit of every reward.
        plain_ms: A plain step at the verify width: what a policy that never drafts takes, for it needs no rounds.
        draft_ms: `[L]`, a draft step at each level.
        verify_ms: `[D + 1]`, the end of a round: its pass at the verify width over M = 1, 2, ... tokens, and its books.
            With M = 1 the pass is a plain step, and the books make it dearer than `plain_ms`.
        controller_ms: What signals and policy add to a decision; fixed rounds and the bound do not pay it.
        confidence_ms: What a rule adds that looks at no more than how sure the drafts are.
        settled_ms: What signals take of each token that a round settles whose drafts were looked up. In other rounds
            `controller_ms` contains it.
    """

    source: Literal["modelled", "measured"]
    full_ms: float
    plain_ms: float
    draft_ms: tuple[float, ...]
    verify_ms: tuple[float, ...]
    controller_ms: float = 0.0
    confidence_ms: float = 0.0
    settled_ms: float = 0.0

    def __post_init__(self) -> None:
        times = (self.full_ms, self.plain_ms, *self.draft_ms, *self.verify_ms)
        if not self.draft_ms or not self.verify_ms or not all(0 < ms < float("inf") for ms in times):
            raise InputError(f"costs {times} ms: give a finite time above 0 for every level and number of tokens")
        for name in _LOOKING:
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name):g} must not be negative")

    def check(self, num_levels: int, depth: int) -> None:
        """Raises InputError unless there is a time for each of so many levels and each round of so many drafts."""
        if len(self.draft_ms) != num_levels or len(self.verify_ms) <= depth:
            raise InputError(
                f"costs of {len(self.draft_ms)} levels and passes over up to {len(self.verify_ms)} tokens were given, "
                f"but the traces have {num_levels} levels and rounds of up to {depth + 1} tokens"
            )

    @property
    def of_itself(self) -> float:
        """A step at the verify width over the same step timed in another way, as a round without drafts: about 1."""
        return self.verify_ms[0] / self.plain_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> VerifyCosts:
        """Reads the JSON form; one that has no `plain_ms` yet is taken for one whose verify width is the largest.

        Raises:
            TypeError, ValueError: If it is not what `to_dict` writes.
        """
        data = {"plain_ms": data.get("full_ms"), **data}
        lists = {name: tuple(data.get(name, ())) for name in ("draft_ms", "verify_ms")}
        numbers = [*lists["draft_ms"], *lists["verify_ms"]]
        numbers += [data.get(name, 0.0) for name in ("full_ms", "plain_ms", *_LOOKING)]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError("times of drafts and passes are not finite numbers")
        if data.get("source") not in ("modelled", "measured"):
            raise ValueError("times of drafts and passes are not modelled or measured")
        return VerifyCosts(**{**data, **lists})

    def charging(self, sees: Sees) -> VerifyCosts:
        """These costs where each decision takes the time of a policy that sees so much."""
        own_ms: float = {"nothing": 0.0, "confidences": self.confidence_ms, "signals": self.controller_ms}[sees]
        return replace(self, controller_ms=own_ms, settled_ms=self.settled_ms if sees == "signals" else 0.0)

    def without_rounds(self) -> VerifyCosts:
        """These costs where nothing is ever drafted: each pass over one token is a plain step, as it is served."""
        return replace(self, verify_ms=(self.plain_ms, *self.verify_ms[1:]))


def modelled_costs(
    draft_shares: Sequence[float],
    verify_shares: Sequence[float],
    *,
    depth: int,
    controller_share: float = 0.0,
    plain_share: float = 1.0,
) -> VerifyCosts:
    """Costs in full-width steps (`full_ms` is 1); passes beyond those given go on in a straight line.

    Args:
        draft_shares: `[L]`, a draft step over a full-width step.
        verify_shares: A pass over M = 1, 2, ... tokens over a full-width step; two or more.
        depth: D, drafts of a round at most.
        controller_share: A decision over a full-width step.
        plain_share: A plain step at the verify width over a full-width step.

    Raises:
        InputError: If they are too few or no times.
    """
    if len(verify_shares) < 2:
        raise InputError(f"{len(verify_shares)} shares of a pass were given; give those of M = 1 and 2 at least")
    shares = [*verify_shares]
    while len(shares) <= depth:
        shares.append(2 * shares[-1] - shares[-2])
    return VerifyCosts("modelled", 1.0, plain_share, tuple(draft_shares), tuple(shares), controller_share)
