"""Rounds of drafts and verification on one cache: low widths propose tokens, the verify widths settle them.

Between rounds a row holds its settled tokens, with keys and values of the verify widths, and its upcoming token. Drafts
are read behind them at their own widths; a verify step cuts them off again and reads all of them in one pass. With
nothing pending it is an ordinary step. Where the last tokens stood in the text before, what followed them there is
verified at once, and nobody decides. docs/verified.md describes a round in full.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import DraftController
from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.draft_counts import DraftCounts
from flexquant_rl.engine.control.draft_limits import MOST_PENDING, check_ngram_drafts, next_ngram_drafts
from flexquant_rl.engine.control.drafts import Draft, RoundState
from flexquant_rl.engine.control.verified_signals import RoundHistory
from flexquant_rl.engine.decoding.decoder import Decoder, ExtendOutput, greedy_tokens
from flexquant_rl.engine.decoding.next_token import Sampler
from flexquant_rl.engine.decoding.ngram import NgramIndex
from flexquant_rl.engine.decoding.verification import settled_tokens


@dataclass(frozen=True)
class Settled:
    """What a verify step settles.

    Attributes:
        token_ids: The accepted drafts and the token gained, which nobody has read yet.
        bit_widths: `[U]` int64 of the pass.
        round_ms: Wall clock of the round, drafts and policy included.
        logits: `[len(token_ids), vocab]` float32, what each token was chosen from or judged by.
    """

    token_ids: list[int]
    bit_widths: Tensor
    round_ms: float
    logits: Tensor


@dataclass
class _Row:
    """The round of one row. The cache holds a token behind the `length` settled ones for every draft step."""

    upcoming: int
    length: int
    text: NgramIndex | None
    ngram_drafts: int
    eos_token_ids: tuple[int, ...] = ()
    drafts: list[Draft] = field(default_factory=list)
    mark: Any = None
    round_ms: float = 0.0
    counts: DraftCounts = field(default_factory=DraftCounts)
    history: RoundHistory = field(default_factory=RoundHistory)

    @property
    def is_found(self) -> bool:
        """Whether the pending drafts were found in the text."""
        return bool(self.drafts) and self.drafts[0].is_found


class Rounds:
    """Runs the rounds of a decoder's rows; each row is at a place of its own in its round.

    Args:
        decoder: Holds R rows.
        controller: Decides for R rows.
        sampler: Chooses the tokens of R rows.
        ngram_drafts: Drafts of a round at most that are found in the text so far, fewer behind a lookup that was
            mostly wrong; 0 looks none up; default: what the policy was made with.

    Raises:
        InputError: If `ngram_drafts` is negative or more than a round can hold.
    """

    def __init__(
        self, decoder: Decoder, controller: DraftController, sampler: Sampler, *, ngram_drafts: int | None = None
    ) -> None:
        ngram_drafts = controller.ngram_drafts if ngram_drafts is None else ngram_drafts
        check_ngram_drafts(ngram_drafts)
        self._decoder = decoder
        self._controller = controller
        self._sampler = sampler
        self._ngram_drafts = ngram_drafts
        self._num_rows = len(decoder.lengths)
        self._rows: dict[int, _Row] = {}

    def begin(self, row: int, prompt_ids: Sequence[int], upcoming: int, *, eos_token_ids: tuple[int, ...] = ()) -> None:
        """Starts a row that holds a prompt and whose controller is started.

        Args:
            row: Index of the row.
            prompt_ids: The prompt.
            upcoming: The token that follows it.
            eos_token_ids: Nothing is drafted behind any of these.
        """
        text = NgramIndex([*prompt_ids, upcoming]) if self._ngram_drafts else None
        self._rows[row] = _Row(upcoming, int(self._decoder.lengths[row]), text, self._ngram_drafts, eos_token_ids)

    def counts(self, row: int) -> DraftCounts:
        """What the rounds of a row have come to since it began."""
        return self._rows[row].counts

    def state(self, row: int, num_wanted: int) -> RoundState:
        """What a policy sees of the round of a row; `num_wanted` as for `step`, 0 where the row has ended."""
        state = self._rows[row]
        return RoundState(tuple(state.drafts), self._room(row, num_wanted), state.history)

    def step(self, row: int, num_wanted: int) -> Settled | None:
        """Drafts or verifies: what is found in the text at once, all else as the controller decides.

        Args:
            row: Index of the row.
            num_wanted: Tokens that the row is to go on by at most, at least 1; drafts beyond them would be for nothing.

        Returns:
            What a verify step settled; None after a draft.

        Raises:
            ValueError: If the controller drafts where there is no room.
        """
        began = time.perf_counter()
        state = self._rows[row]
        if not state.drafts:
            self.look_up(row, num_wanted)
        decision = (
            Decision(self._controller.verify_bit_widths[None])
            if state.is_found
            else self._controller.decide_round(row, self.state(row, num_wanted))
        )
        if decision.verify:
            token_ids, logits = self.verify(row, decision.bit_widths[0])
            round_ms = state.round_ms + (time.perf_counter() - began) * 1e3
            settled = Settled(token_ids, decision.bit_widths[0], round_ms, logits)
            state.round_ms = 0.0
            return settled
        if not self._room(row, num_wanted):
            raise ValueError("the policy drafts where no draft fits (RoundState.room is 0); let it verify there")
        self.draft(row, decision.bit_widths[0])
        state.round_ms += (time.perf_counter() - began) * 1e3
        return None

    def look_up(self, row: int, num_wanted: int) -> None:
        """Begins a round with what followed the last tokens where they stood before, if they did.

        Args:
            row: Index of the row.
            num_wanted: As for `step`.
        """
        state = self._rows[row]
        room = self._room(row, num_wanted)
        if not room or state.text is None:
            return
        state.drafts += map(Draft, state.text.continuation(min(room, state.ngram_drafts), state.eos_token_ids))

    def draft(self, row: int, bit_widths: Tensor) -> Draft:
        """Reads the newest token at `[U]` draft widths; the one that follows is pending from then on."""
        state = self._rows[row]
        if state.mark is None:
            state.mark = self._controller.mark()
        newest = state.drafts[-1].token_id if state.drafts else state.upcoming
        output = self._read(row, [newest], bit_widths)
        draft = self._choose(row, output.logits[0, -1], bit_widths)
        self._observe(row, output, bit_widths, [draft.token_id])
        draft = replace(draft, top1_probability=self._controller.top1_probability(row))
        state.drafts.append(draft)
        state.counts.num_draft_steps += 1
        return draft

    def verify(self, row: int, bit_widths: Tensor) -> tuple[list[int], Tensor]:
        """Reads the upcoming token and all drafts at `[U]` verify widths and ends the round.

        Returns:
            The accepted drafts and the token gained, K in all, and the logits `[K, vocab]` that they follow from.
        """
        state = self._rows[row]
        if state.drafts and not state.is_found:  # they were read as they were made
            self._cut(row)
        draft_ids = [draft.token_id for draft in state.drafts]
        output = self._read(row, [state.upcoming, *draft_ids], bit_widths)
        kept = settled_tokens(output.logits[0], draft_ids, [draft.probs for draft in state.drafts], self._sampler, row)
        state.length += len(kept)
        if len(kept) <= len(draft_ids):  # what was not accepted is still held
            self._cut(row)
        if state.mark is not None:
            self._controller.rollback(state.mark, torch.tensor([row]))
        self._observe(row, output, bit_widths, kept)
        state.counts.add_round(len(draft_ids), len(kept) - 1, is_found=state.is_found)
        if state.is_found:
            state.ngram_drafts = next_ngram_drafts(self._ngram_drafts, len(draft_ids), len(kept) - 1)
        else:  # what a policy did not decide says nothing of its drafts
            state.history = state.history.after(len(draft_ids), len(kept) - 1)
        state.upcoming, state.mark = kept[-1], None
        state.drafts.clear()
        if state.text is not None:
            for token_id in kept:
                state.text.add(token_id)
        return kept, output.logits[0, : len(kept)]

    def _room(self, row: int, num_wanted: int) -> int:
        """Drafts that still fit: a verify pass settles one token more than there are drafts, and holds them all."""
        state = self._rows[row]
        if state.is_found or (state.drafts and state.drafts[-1].token_id in state.eos_token_ids):
            return 0
        most = min(num_wanted - 1, self._decoder.max_length - state.length - 1, MOST_PENDING)
        return max(0, most - len(state.drafts))

    def _read(self, row: int, token_ids: list[int], bit_widths: Tensor) -> ExtendOutput:
        rows = None if self._num_rows == 1 else torch.tensor([row])
        if len(token_ids) > 1:
            return self._decoder.extend(torch.tensor([token_ids]), bit_widths, rows=rows)
        # A step of one row takes a shorter way than a pass over several tokens.
        step = self._decoder.step(torch.tensor(token_ids), bit_widths, rows=rows)
        return ExtendOutput(step.logits[:, None], step.residual_update[:, None], step.crest[:, None])

    def _cut(self, row: int) -> None:
        """Leaves a row its settled tokens."""
        lengths = self._decoder.lengths.clone()
        lengths[row] = self._rows[row].length
        self._decoder.truncate(lengths)

    def _choose(self, row: int, logits: Tensor, bit_widths: Tensor) -> Draft:
        if self._sampler.is_greedy(row):
            return Draft(int(greedy_tokens(logits[None])), bit_widths, logits)
        probs = self._sampler.distribution(logits, row)
        return Draft(self._sampler.draw(probs, row), bit_widths, logits, probs)

    def _observe(self, row: int, output: ExtendOutput, bit_widths: Tensor, next_ids: list[int]) -> None:
        """Tells the controller what a pass put out at each token that has a next one."""
        if not self._controller.uses_signals:
            return
        for place, token_id in enumerate(next_ids):
            self._controller.update(output.at(place), bit_widths[None], torch.tensor([token_id]), torch.tensor([row]))
