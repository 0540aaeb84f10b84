"""R episodes of drafts and verification in lockstep, played from recorded traces: the facts of every step, no reward.

The same interface as `Episodes`: the environments play either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexquant_rl.engine.control.draft_limits import next_ngram_drafts
from flexquant_rl.engine.control.signals import OUTPUT_SIGNALS
from flexquant_rl.engine.control.verified_signals import (
    ACCEPTANCE_AT_START,
    Observations,
    VerifiedSchema,
    next_acceptance,
    next_entropy_average,
    scaled_outputs,
)
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.fq_env.trace_table import Flags, Floats, Ints, TraceTable

_ENTROPY, _TOP1 = OUTPUT_SIGNALS.index("token_entropy_nats"), OUTPUT_SIGNALS.index("top1_probability")


@dataclass(frozen=True)
class RoundFacts:
    """What one step of R episodes was like; tensors are `[R]`.

    Attributes:
        is_verify: Whether it was a pass of verification, and not a draft step.
        level: Level that drafted, int64; -1 for a pass.
        num_drafted: Drafts that the pass read beside the settled token, int64; 0 for a draft step.
        num_accepted: Those that were kept, int64.
        num_emitted: Tokens that became settled, int64; 0 for a draft step.
        latency_ms: Time of the step, float64.
        full_latency_ms: Time of a plain step at the largest width.
        terminated: The text ended.
        truncated: It did not, but the continuation is as long as it may be.
    """

    is_verify: Tensor
    level: Tensor
    num_drafted: Tensor
    num_accepted: Tensor
    num_emitted: Tensor
    latency_ms: Tensor
    full_latency_ms: float
    terminated: Tensor
    truncated: Tensor


class TraceRounds:
    """R rows, each in a round of one sequence.

    Args:
        table: The sequences.
        costs: What steps cost.
        num_rows: R.

    Raises:
        InputError: If the costs are not those of the traces' levels and depth.
    """

    options: ClassVar[tuple[str, ...]] = ("window",)

    def __init__(self, table: TraceTable, costs: VerifyCosts, num_rows: int) -> None:
        costs.check(table.num_levels, table.depth)
        self.table = table
        self.costs = costs
        self.num_rows = num_rows
        self.schema = VerifiedSchema(table.num_levels, table.depth, table.embedding.shape[1])
        self.windows = range(table.num_sequences)
        self._draft_ms, self._verify_ms = np.array(costs.draft_ms), np.array(costs.verify_ms)
        self._sequence: Ints = np.zeros(num_rows, dtype=np.int64)
        self._place: Ints = np.zeros(num_rows, dtype=np.int64)  # of the last settled token
        self._pending: Ints = np.zeros(num_rows, dtype=np.int64)
        self._num_right: Ints = np.zeros(num_rows, dtype=np.int64)
        # Of the newest draft: the place where its chain began, the chain's level, how far behind `_place` that is.
        self._chain: Ints = np.zeros((num_rows, 3), dtype=np.int64)
        self._level: Ints = np.full(num_rows, -1)
        self._newest: Floats = np.zeros((num_rows, len(OUTPUT_SIGNALS)), dtype=np.float32)
        self._newest_is_eos: Flags = np.zeros(num_rows, dtype=np.bool_)
        self._ngram_drafts: Ints = np.zeros(num_rows, dtype=np.int64)  # that the next lookup finds at most
        counts = range(table.ngram_drafts + 1)
        self._next_ngram_drafts: Ints = np.array(
            [[next_ngram_drafts(table.ngram_drafts, found, accepted) for accepted in counts] for found in counts]
        )
        self._is_found: Flags = np.zeros(num_rows, dtype=np.bool_)  # whether what waits was found in the text
        self._ema: Floats = np.zeros(num_rows, dtype=np.float32)
        self._embedding_row: Ints = np.zeros(num_rows, dtype=np.int64)
        self._confidences: Floats = np.zeros((num_rows, table.depth), dtype=np.float32)
        self._acceptance: Floats = np.zeros((num_rows, 2), dtype=np.float32)
        self._last_round: Ints = np.zeros((num_rows, 2), dtype=np.int64)  # drafted, accepted

    def draw_dials(self, generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        """There is no dial: verified at its width, the text costs the same KL whatever is drafted."""
        return np.ones(count, dtype=np.float64)

    def start(self, rows: Tensor, windows: Tensor, kl_weight: Tensor, seeds: Tensor) -> None:
        """Starts rows `[R']` at the beginning of sequences `[R']`; dials and seeds decide nothing."""
        chosen, sequences = rows.numpy(), windows.numpy()
        self._sequence[chosen] = sequences
        self._place[chosen] = self.table.first[sequences]
        self._acceptance[chosen] = ACCEPTANCE_AT_START
        self._last_round[chosen] = 0
        self._ngram_drafts[chosen] = self.table.ngram_drafts
        self._begin_round(chosen)

    def step(self, actions: Tensor) -> RoundFacts:
        """Drafts or verifies in every row.

        Args:
            actions: `[R]` int64: 0 verifies now, 1 to L draft at level 0 to L - 1; where no draft is possible, every
                action verifies.
        """
        wanted = actions.numpy()
        was_found = self._is_found.copy()
        drafts = (wanted > 0) & self.can_draft()
        latency_ms = np.empty(self.num_rows)
        counts: Ints = np.zeros((3, self.num_rows), dtype=np.int64)  # drafted, accepted, emitted
        rows = drafts.nonzero()[0]
        levels = wanted[rows] - 1
        latency_ms[rows] = self._draft_ms[levels]
        self._draft(rows, levels)
        rows = (~drafts).nonzero()[0]
        latency_ms[rows] = self._verify_ms[self._pending[rows]]
        counts[:, rows] = self._verify(rows)
        # Who is not asked decides nothing, but sees what is settled.
        looking_ms = np.where(was_found, self.costs.settled_ms * counts[2], self.costs.controller_ms)
        ended = self._place == self.table.first[self._sequence] + self.table.num_tokens[self._sequence]
        has_eos = self.table.has_eos[self._sequence]
        drafted, accepted, emitted = map(torch.from_numpy, counts)
        return RoundFacts(
            is_verify=torch.from_numpy(~drafts),
            level=torch.from_numpy(np.where(drafts, wanted - 1, -1)),
            num_drafted=drafted,
            num_accepted=accepted,
            num_emitted=emitted,
            latency_ms=torch.from_numpy(latency_ms + looking_ms),
            full_latency_ms=self.costs.full_ms,
            terminated=torch.from_numpy(ended & has_eos & ~drafts),
            truncated=torch.from_numpy(ended & ~has_eos & ~drafts),
        )

    def can_draft(self) -> Flags:
        """`[R]`: whether another draft could be of use: the round and the continuation may be longer, no EOS waits."""
        position = self._place - self.table.first[self._sequence]
        room = np.minimum(self.table.depth, self.table.max_new_tokens - 1 - position)
        has_ended = position >= self.table.num_tokens[self._sequence]
        possible: Flags = (self._pending < room) & ~self._newest_is_eos & ~self._is_found & ~has_ended
        return possible

    def num_pending(self) -> Ints:
        """`[R]` drafts that wait."""
        return self._pending.copy()

    def all_right(self) -> Flags:
        """`[R]`: whether every pending draft agrees. No policy can know."""
        right: Flags = self._num_right == self._pending
        return right

    def action_masks(self) -> Flags:
        """`[R, L + 1]`: which actions do what they say."""
        masks: Flags = np.ones((self.num_rows, self.table.num_levels + 1), dtype=np.bool_)
        masks[:, 1:] = self.can_draft()[:, None]
        return masks

    def signals(self) -> Tensor:
        """What is known before the next step, `[R, dim]` float32, see `VerifiedSchema`."""
        return torch.from_numpy(self.observations())

    def observations(self) -> Observations:
        """The same as an array."""
        read = np.where(self._is_found, 0, self._pending)  # nobody has read what was found
        position = self._place - self.table.first[self._sequence] + read
        return self.schema.assemble(
            scaled_outputs(self._newest, self._ema, position),
            can_draft=self.can_draft(),
            num_pending=self._pending,
            confidences=self._confidences,
            level=self._level,
            acceptance=self._acceptance,
            last_round=self._last_round,
            embedding=self.table.embedding[self._embedding_row],
        )

    def coloured(self, row: int) -> str:
        """Traces have tokens, not text."""
        raise ValueError("recorded traces cannot be rendered; use render_mode=None")

    def close(self) -> None:
        """Nothing to free."""

    def _draft(self, rows: Ints, levels: Ints) -> None:
        table, place, pending = self.table, self._place[rows], self._pending[rows]
        is_right_so_far = self._num_right[rows] == pending
        offset = np.where(is_right_so_far, table.chain_offset[place, levels, pending], self._chain[rows, 2])
        begin = np.where(is_right_so_far, place + offset, self._chain[rows, 0])
        level = np.where(is_right_so_far, levels, self._chain[rows, 1])
        found = (begin, level, pending - offset)
        self._chain[rows] = np.stack([begin, level, offset], axis=1)
        self._num_right[rows] += is_right_so_far & table.is_right[place, levels, pending]
        self._newest[rows] = table.draft_signals[found]
        self._newest_is_eos[rows] = table.draft_is_eos[found]
        self._embedding_row[rows] = table.draft_row[found]
        self._confidences[rows, pending] = self._newest[rows, _TOP1]
        entropy = self._newest[rows, _ENTROPY]
        self._ema[rows] = next_entropy_average(self._ema[rows], entropy)
        self._level[rows] = levels
        self._pending[rows] += 1

    def _verify(self, rows: Ints) -> Ints:
        """Settles what agrees: drafted, accepted and emitted tokens, `[3, R']`."""
        table, sequence = self.table, self._sequence[rows]
        drafted, accepted = self._pending[rows], self._num_right[rows]
        left = table.first[sequence] + table.num_tokens[sequence] - self._place[rows]
        emitted = np.minimum(accepted + 1, left)
        had_any = (drafted > 0) & ~self._is_found[rows]  # what no policy decided says nothing of its drafts
        tried = rows[had_any]
        share = (accepted[had_any] / drafted[had_any])[:, None]
        self._acceptance[tried] = next_acceptance(self._acceptance[tried], share)
        self._last_round[tried] = np.stack([drafted, accepted], axis=1)[had_any]
        were_found = self._is_found[rows]
        self._ngram_drafts[rows[were_found]] = self._next_ngram_drafts[drafted[were_found], accepted[were_found]]
        self._place[rows] += emitted
        self._begin_round(rows)
        return np.stack([drafted, accepted, emitted])

    def _begin_round(self, rows: Ints) -> None:
        place = self._place[rows]
        self._pending[rows] = found = np.minimum(self.table.num_found[place], self._ngram_drafts[rows])
        self._num_right[rows] = np.minimum(self.table.num_found_right[place], found)
        self._is_found[rows] = found > 0
        self._confidences[rows] = np.arange(self.table.depth) < found[:, None]
        self._level[rows] = -1
        self._newest[rows] = self.table.settled_signals[place]
        self._newest_is_eos[rows] = False
        self._ema[rows] = self.table.settled_ema[place]
        self._embedding_row[rows] = self.table.token_row[place]
