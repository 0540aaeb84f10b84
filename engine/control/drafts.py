"""Drafts: tokens that low widths propose, what a policy sees of them, and what a policy of drafts is.

That the low bits of the same weights can draft was proposed in llama.cpp issue #3269 and, for hardware, by SPEQ
(arXiv 2510.18525). docs/verified.md describes the rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.draft_limits import MOST_PENDING
from flexquant_rl.engine.control.verified_signals import RoundHistory
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import is_whole_number, shown


@dataclass(frozen=True, eq=False)
class Draft:
    """One pending token.

    Attributes:
        token_id: The token.
        bit_widths: `[U]` int64 of the step that proposed it; None if it was found in the text so far.
        logits: `[vocab]` float32 that it was chosen from; None if it was found in the text so far.
        probs: `[vocab]` float32 that it was sampled from; None if there was no choice, as in greedy decoding.
        top1_probability: Of the logits, where the signals have it already.
    """

    token_id: int
    bit_widths: Tensor | None = None
    logits: Tensor | None = None
    probs: Tensor | None = None
    top1_probability: float | None = None

    @property
    def is_found(self) -> bool:
        """Whether it was found in the text so far."""
        return self.bit_widths is None

    @cached_property
    def confidence(self) -> float | None:
        """Probability of the likeliest token where this one was chosen, at temperature 1; None without logits."""
        if self.top1_probability is not None:
            return self.top1_probability
        if self.logits is None:
            return None
        # Here, because who only loads a policy needs no native library.
        from flexquant_rl.kernels.native_control import top_probability

        return top_probability(self.logits)


@dataclass(frozen=True)
class RoundState:
    """What a policy sees of the round of one row, besides the signals.

    Attributes:
        pending: The drafts so far, oldest first.
        room: Drafts that still fit, by the request, the context and `MOST_PENDING`. With 0 the policy must verify.
        history: What the rounds before came to.
    """

    pending: tuple[Draft, ...] = ()
    room: int = 0
    history: RoundHistory = field(default_factory=RoundHistory)

    @property
    def num_pending(self) -> int:
        """How many drafts there are."""
        return len(self.pending)


@runtime_checkable
class DraftPolicy(Protocol):
    """Decides before each step of a row whose drafts were not found in the text: verify now, or draft at these widths.

    Like a `Policy` it keeps no state between calls, so the same seed gives the same text. The rule `bandit` alone does:
    it learns across the requests of an engine, and what it samples for a seed depends on those before.
    """

    @property
    def name(self) -> str:
        """As it appears in tables, e.g. `draft:3,length=4`."""

    @property
    def uses_signals(self) -> bool:
        """Whether it looks at signals; if not, none are computed and it is given None."""

    @property
    def verify_bit_widths(self) -> Tensor:
        """`[U]` int64: the widths that its output is to equal, and those it verifies at."""

    def __call__(self, signals: Tensor | None, state: RoundState) -> Decision:
        """Signals `[1, dim]` float32 and the round of one row to a decision for it."""


def check_drafts(length: Any, min_confidence: Any) -> None:
    """Raises InputError on a length of rounds or a confidence that there is none of."""
    if not is_whole_number(length) or not 1 <= length <= MOST_PENDING:
        raise InputError(
            f"length={shown(length)} must be 1 to {MOST_PENDING} drafts, a whole number; 4 is a good start"
        )
    is_number = isinstance(min_confidence, float) or is_whole_number(min_confidence)
    if not is_number or not 0 <= min_confidence <= 1:
        given = f"{min_confidence:g}" if is_number else shown(min_confidence)
        raise InputError(f"confidence={given} is no probability; give 0 to 1, e.g. 0.4")
