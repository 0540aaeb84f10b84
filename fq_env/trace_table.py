"""Recorded sequences as flat arrays, and which recorded draft stands for a draft of a round that mixes levels.

A round that starts at position p drafts token after token. As long as one level drafts, the record at p is exactly what
would happen. Where levels are mixed, the recorded chain of the level that drafts now is used, from the earliest
position of the round from which that chain has reproduced the drafts before it. Keys and values of the round's earlier
tokens are then those of that level, or those of the verify width before the chain began, in place of those of the
levels that really drafted them. Once a draft disagrees with the continuation nothing after it can be kept; what is seen
from there on is the chain that disagreed, whichever level goes on drafting.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from flexquant_rl.engine.control.draft_limits import check_ngram_drafts
from flexquant_rl.engine.control.signals import OUTPUT_SIGNALS
from flexquant_rl.engine.control.traces import NO_TOKEN, RecordingPlan, Traces
from flexquant_rl.engine.control.verified_signals import next_entropy_average
from flexquant_rl.engine.decoding.ngram import NgramIndex
from flexquant_rl.engine.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

_BEYOND = NO_TOKEN - 1  # agrees with nothing


class TraceTable:
    """S sequences of a recording, their `N + 1` positions one after the other: F places.

    Attributes:
        first: `[S]` place of position 0.
        num_tokens: `[S]` N, tokens that passes gain.
        has_eos: `[S]` whether the text ended by itself.
        documents: `[S]` document of each.
        max_new_tokens: Where the others ended.
        depth: D.
        num_levels: L.
        token_ids: `[F]` the token that is known at a place and not yet read.
        settled_signals: `[F, 5]` of the output that gave it, `OUTPUT_SIGNALS`.
        settled_ema: `[F]` moving average of the entropies up to it.
        draft_ids: `[F, L, D]`.
        draft_signals: `[F, L, D, 5]`.
        agreement: `[F, L]` drafts of each chain that agree with the continuation, up to the first that does not.
        chain_offset: `[F, L, D]` with j drafts pending, all of them right: how many places on the chain begins that
            stands for a draft of the level.
        is_right: `[F, L, D]` whether that draft agrees with the continuation.
        embedding: `[n, E]` of the tokens that occur.
        token_row: `[F]` row of `embedding` of the token at a place.
        draft_row: `[F, L, D]` the same of drafts.
        draft_is_eos: `[F, L, D]`.
        ngram_drafts: Drafts of a round at most that are found in the text before it.
        num_found: `[F]` drafts that a round which begins there finds; 0 where nothing is looked up.
        num_found_right: `[F]` those that agree with the continuation, up to the first that does not.

    Args:
        traces: The recording.
        sequences: Indices of the sequences to take.
        ngram_drafts: Drafts of a round at most that are found in the text before it, which are verified at once; a
            round is as deep as the recording all the same. 0 looks none up.

    Raises:
        InputError: If there are no sequences, or no such number of drafts.
    """

    def __init__(self, traces: Traces, sequences: Sequence[int], ngram_drafts: int = 0) -> None:
        if not sequences:
            raise InputError("the traces hold no sequence of this split; record more with `fq record --tokens`")
        check_ngram_drafts(ngram_drafts)
        plan = traces.plan
        chosen = [traces.sequences[index] for index in sequences]
        self.sequences = tuple(sequences)
        self.num_tokens: Ints = np.array([trace.num_tokens for trace in chosen])
        self.first: Ints = np.concatenate([[0], np.cumsum(self.num_tokens + 1)[:-1]])
        self.documents: Ints = np.array([plan.sequences[index].document for index in sequences])
        self.sources = tuple(plan.sequences[index].source for index in sequences)
        self.max_new_tokens, self.depth, self.num_levels = plan.max_new_tokens, plan.depth, len(plan.draft_widths)
        self.token_ids: Ints = np.concatenate([trace.token_ids.numpy() for trace in chosen]).astype(np.int64)
        last = self.first + self.num_tokens
        self.has_eos: Flags = np.isin(self.token_ids[last], plan.eos_token_ids)
        self.settled_signals: Floats = np.concatenate([trace.settled_signals.numpy() for trace in chosen])
        self.settled_ema: Floats = np.concatenate([_ema(trace.settled_signals[:, 0].numpy()) for trace in chosen])
        shape = (len(self.token_ids), self.num_levels, self.depth)
        self.draft_ids: Ints = np.full(shape, NO_TOKEN, dtype=np.int64)
        self.draft_signals: Floats = np.zeros((*shape, len(OUTPUT_SIGNALS)), dtype=np.float32)
        for begin, trace in zip(self.first.tolist(), chosen, strict=True):
            self.draft_ids[begin : begin + trace.num_tokens] = trace.draft_ids.numpy()
            self.draft_signals[begin : begin + trace.num_tokens] = trace.draft_signals.numpy()
        self._end = np.repeat(last, self.num_tokens + 1)  # of the sequence of each place
        self._match()
        self.embedding: Floats = traces.embedding.numpy()
        known = traces.embedding_ids.numpy()
        self.token_row: Ints = np.searchsorted(known, self.token_ids)
        self.draft_row: Ints = np.searchsorted(known, np.maximum(self.draft_ids, known[0]))
        self.draft_is_eos: Flags = np.isin(self.draft_ids, plan.eos_token_ids)
        self.ngram_drafts = min(ngram_drafts, self.depth)
        self.num_found: Ints = np.zeros(len(self.token_ids), dtype=np.int64)
        self.num_found_right: Ints = np.zeros_like(self.num_found)
        if self.ngram_drafts:
            for index, begin in zip(sequences, self.first.tolist(), strict=True):
                self._look_up(plan.sequences[index].prompt_ids, begin, plan)

    def without_lookups(self) -> TraceTable:
        """The same sequences where nothing is looked up, as for plain decoding."""
        table = copy(self)
        table.ngram_drafts = 0
        table.num_found = table.num_found_right = np.zeros_like(self.num_found)
        return table

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.first)

    def _look_up(self, prompt_ids: Sequence[int], begin: int, plan: RecordingPlan) -> None:
        """Finds what followed the last tokens where they stood before, from each place of one sequence."""
        text = NgramIndex(prompt_ids)
        future = self.token_ids[begin : self._end[begin] + 1].tolist()
        for position, token_id in enumerate(future[:-1]):
            text.add(token_id)
            most = min(self.ngram_drafts, plan.max_new_tokens - 1 - position)
            found = text.continuation(most, plan.eos_token_ids)
            self.num_found[begin + position] = len(found)
            pairs = zip(found, future[position + 1 :], strict=False)
            self.num_found_right[begin + position] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _match(self) -> None:
        """Finds what agrees with the continuation, and which chain stands for which draft."""
        place = np.arange(len(self.token_ids))
        ahead = place[:, None] + 1 + np.arange(self.depth)
        is_inside = ahead <= self._end[:, None]
        future = np.where(is_inside, self.token_ids[np.minimum(ahead, len(place) - 1)], _BEYOND)
        agrees = self.draft_ids == future[:, None, :]
        self.agreement: Ints = np.cumprod(agrees, axis=-1).sum(-1)
        self.chain_offset: Ints = np.zeros(self.draft_ids.shape, dtype=np.int64)
        self.is_right: Flags = np.zeros(self.draft_ids.shape, dtype=np.bool_)
        levels = np.arange(self.num_levels)
        for pending in range(self.depth):
            offset = np.minimum(pending, self._end - place)[:, None].repeat(self.num_levels, 1)
            for begin in range(pending - 1, -1, -1):  # the earliest that fits comes last and stays
                start = np.minimum(place + begin, self._end)
                offset = np.where(self.agreement[start] >= pending - begin, np.minimum(begin, offset), offset)
            self.chain_offset[..., pending] = offset
            drafted = self.draft_ids[place[:, None] + offset, levels, pending - offset]
            self.is_right[..., pending] = drafted == future[:, pending, None]


def _ema(entropies: Floats) -> Floats:
    """The moving average of the entropies of outputs, as `SignalTracker` has it: `[n]`."""
    averages = entropies.copy()
    for index in range(1, len(averages)):
        averages[index] = next_entropy_average(averages[index - 1], entropies[index])
    return averages
