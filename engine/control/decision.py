"""What the engine needs of a policy: a function from signals to the decision for the next step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """What a policy decides before a step, for each of B rows.

    Attributes:
        bit_widths: `[B, U]` int64, widths of the pass.
        verify: Whether the pass settles its token, and all that are pending. It always does for a `Policy`: every step
            is then one ordinary pass. A `DraftPolicy` (drafts.py) drafts with False.
    """

    bit_widths: Tensor
    verify: bool = True


class Policy(Protocol):
    """Maps signals to decisions.

    A policy keeps no state between calls: whatever it may remember (position, last widths, moving averages) is in the
    signals, so that rows can be batched, restarted and replayed freely.
    """

    @property
    def name(self) -> str:
        """As it appears in tables, e.g. `knapsack:4.5`."""

    def __call__(self, signals: Tensor) -> Decision:
        """`[B, dim]` float32 signals to a decision for B rows."""


class BlindPolicy:
    """A policy that looks at nothing that a step puts out, and so pays for no signals.

    Each kind has a controller of its own in `make_controller`, so a policy of the user's is one of these kinds, and not
    a subclass of this.
    """


@dataclass(frozen=True)
class StaticAllocation(BlindPolicy):
    """The same widths at every token.

    Attributes:
        name: As it appears in tables.
        bit_widths: `[U]` int64; or `[B, U]`, an allocation of its own for each of B rows.
    """

    name: str
    bit_widths: Tensor

    def __call__(self, signals: Tensor) -> Decision:
        """See `Policy`."""
        return Decision(self.bit_widths.to(signals.device).expand(len(signals), -1))


@dataclass(frozen=True)
class PositionPolicy(BlindPolicy):
    """Widths that the position alone decides: nothing that a step puts out is looked at.

    Attributes:
        name: As it appears in tables.
        at: Positions `[B]` int64 on the CPU, tokens of the continuation before the step, to widths `[B, U]` int64.
        tokens_decoded: Finds the positions in signals `[B, dim]`, for whoever has them (`SignalSchema`).
    """

    name: str
    at: Callable[[Tensor], Tensor]
    tokens_decoded: Callable[[Tensor], Tensor]

    def __call__(self, signals: Tensor) -> Decision:
        """See `Policy`."""
        return Decision(self.at(self.tokens_decoded(signals).cpu()).to(signals.device))


def looks(policy: Policy) -> bool:
    """Whether a policy looks at what steps put out, and so pays for the signals."""
    return not isinstance(policy, BlindPolicy)


def joined_rows(allocations: Sequence[Tensor]) -> Tensor:
    """The widths of B rows from those of each, `[1, U]`; of a single row those themselves, which takes no time."""
    return allocations[0] if len(allocations) == 1 else torch.cat([*allocations])
