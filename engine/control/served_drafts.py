"""A policy of drafts at work: within a round it sees what it was trained to see, and the same function decides.

Rules and networks map one observation to one action (`drafting_rules.py`, `drafting_net.py`). Recordings play them over
many rows; here the signals and the history of one row's round become the very same observation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.draft_limits import NGRAM_DRAFTS, check_ngram_drafts
from flexquant_rl.engine.control.drafting_rules import (
    BanditPolicy,
    ConfidenceStop,
    DraftingContext,
    DraftingPolicy,
    DraftingRule,
    FixedRounds,
    Lookups,
)
from flexquant_rl.engine.control.drafts import Draft, RoundState, check_drafts
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.verified_signals import OUTPUT_NAMES, Observations, Sees, VerifiedSchema

_NO, _YES = np.zeros(1, dtype=np.bool_), np.ones(1, dtype=np.bool_)
_SURE = 1.0
"""Confidence of a draft that was found in the text: it counts as certain, as it does when sampled."""


@dataclass(frozen=True, eq=False)
class ServedDrafts:
    """A `DraftPolicy` that asks a function of the verified observation.

    Attributes:
        name: As it appears in tables.
        schema: What the observation is.
        level_bit_widths: `[L, U]` int64, the allocations that draft.
        verify_bit_widths: `[U]` int64.
        decide: The function.
        sees: What it looks at; nothing else is computed.
        ngram_drafts: Drafts of a round at most that it was made to have looked up in the text so far; 0 is none. Such
            rounds are verified at once, and it is not asked.
    """

    name: str
    schema: VerifiedSchema
    level_bit_widths: Tensor
    verify_bit_widths: Tensor
    decide: DraftingPolicy
    sees: Sees
    ngram_drafts: int = field(default=0, kw_only=True)
    _decisions: tuple[Decision, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.level_bit_widths) != self.schema.num_levels:
            raise ValueError(f"{len(self.level_bit_widths)} allocations for {self.schema.num_levels} levels")
        drafts = (Decision(widths[None], verify=False) for widths in self.level_bit_widths)
        # A step asks twice or so: the answers are made once.
        object.__setattr__(self, "_decisions", (Decision(self.verify_bit_widths[None]), *drafts))

    @property
    def uses_signals(self) -> bool:
        """See `DraftPolicy`."""
        return self.sees == "signals"

    def __call__(self, signals: Tensor | None, state: RoundState) -> Decision:
        """See `DraftPolicy`."""
        if state.room == 0 or state.num_pending >= self.schema.depth:
            return self._decisions[0]
        return self._decisions[int(self.decide(self.observe(signals, state))[0])]

    def restarted(self) -> ServedDrafts:
        """The policy for a row that begins a text: a bandit keeps which arm a row plays, all others keep nothing."""
        return replace(self, decide=self.decide.restarted()) if isinstance(self.decide, BanditPolicy) else self

    def observe(self, signals: Tensor | None, state: RoundState) -> Observations:
        """The observation `[1, dim]`, with zeros for what the policy does not look at.

        Args:
            signals: `[1, dim]` of `SignalSchema`; None where the policy looks at none.
            state: The round.
        """
        schema = self.schema
        values = self._blind if signals is None else signals.numpy()[:, self._columns]
        outputs, embedding = values[:, : len(OUTPUT_NAMES)], values[:, len(OUTPUT_NAMES) :]
        confidences = np.zeros((1, schema.depth), dtype=np.float32)
        if self.sees != "nothing":
            known = [_SURE if draft.confidence is None else draft.confidence for draft in state.pending]
            confidences[0, : len(known)] = known
        return schema.assemble(
            outputs,
            can_draft=_YES if state.room and state.num_pending < schema.depth else _NO,
            num_pending=np.array([state.num_pending]),
            confidences=confidences,
            level=np.array([self._level(state.pending[-1]) if state.pending else -1]),
            acceptance=state.history.acceptance[None],
            last_round=np.array([state.history.last_round]),
            embedding=embedding,
        )

    def _level(self, draft: Draft) -> int:
        if draft.bit_widths is not None:
            for level, decision in enumerate(self._decisions[1:]):
                if torch.equal(decision.bit_widths[0], draft.bit_widths):
                    return level
        return -1

    @cached_property
    def _blind(self) -> Observations:
        return np.zeros((1, len(OUTPUT_NAMES) + self.schema.num_embedding_dims), dtype=np.float32)

    @cached_property
    def _columns(self) -> NDArray[np.int64]:
        """Where the signals hold what an observation does; the signals of the token come first, whatever the model."""
        signals = SignalSchema(0, (), self.schema.num_embedding_dims)
        names = [*OUTPUT_NAMES, *(f"embedding_{index}" for index in range(self.schema.num_embedding_dims))]
        return np.array([signals.index(name) for name in names])


def drafts_at(
    name: str,
    draft_bit_widths: Tensor,
    verify_bit_widths: Tensor,
    *,
    length: int,
    min_confidence: float = 0.0,
    ngram_drafts: int = 0,
) -> ServedDrafts:
    """Drafts up to a length at the same widths, or until a draft is unsure: the rules `fixed` and `confidence`.

    Args:
        name: As it appears in tables.
        draft_bit_widths: `[U]` int64.
        verify_bit_widths: `[U]` int64.
        length: Drafts of a round at most, at least 1.
        min_confidence: Drafting ends with a draft whose confidence is below it; 0 never ends it.
        ngram_drafts: See `ServedDrafts`.

    Raises:
        InputError: If there are no such rounds, no such confidence or no such number of drafts that are looked up.
    """
    check_drafts(length, min_confidence)
    check_ngram_drafts(ngram_drafts)
    rule, schema = rule_at(length, min_confidence), VerifiedSchema(1, length)
    decide = rule.bind(DraftingContext(schema))
    levels = draft_bit_widths[None]
    return ServedDrafts(name, schema, levels, verify_bit_widths, decide, rule.sees, ngram_drafts=ngram_drafts)


def lookups_at(name: str, verify_bit_widths: Tensor, *, ngram_drafts: int = NGRAM_DRAFTS) -> ServedDrafts:
    """Nothing but what is found in the text so far, verified: the rule `lookups`.

    Args:
        name: As it appears in tables.
        verify_bit_widths: `[U]` int64.
        ngram_drafts: See `ServedDrafts`.

    Raises:
        InputError: If there is no such number of drafts that are looked up.
    """
    check_ngram_drafts(ngram_drafts)
    rule, schema = Lookups(), VerifiedSchema(1, 1)  # nothing drafts at the one level that an observation has at least
    decide = rule.bind(DraftingContext(schema))
    levels = verify_bit_widths[None].clone()  # files hold no tensor twice
    return ServedDrafts(name, schema, levels, verify_bit_widths, decide, rule.sees, ngram_drafts=ngram_drafts)


def own_ngram_drafts(policy: object) -> int:
    """Drafts of a round at most that a policy was made to have looked up; 0 of one that is none of ours."""
    return policy.ngram_drafts if isinstance(policy, ServedDrafts) else 0


def rule_at(length: int, min_confidence: float) -> DraftingRule:
    """The rule of `drafts_at`."""
    return ConfidenceStop(0, min_confidence, length) if min_confidence else FixedRounds(0, length)
