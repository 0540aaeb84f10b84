"""R episodes of drafts and verification in lockstep, decoded by the model itself: nothing of them is approximate.

The same interface as `TraceRounds`, over the prompts, levels and depth of a recording and at the same costs. So what a
recording can only say approximately, rounds that mix levels, can be held against what really happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexquant_rl.engine.bits_display import coloured_text
from flexquant_rl.engine.control.controller import DraftController, make_controller
from flexquant_rl.engine.control.draft_limits import check_ngram_drafts
from flexquant_rl.engine.control.drafting_rules import DraftingContext, FixedRounds
from flexquant_rl.engine.control.drafts import RoundState
from flexquant_rl.engine.control.profile import unmeasured_profile
from flexquant_rl.engine.control.rounds import Rounds
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.served_drafts import ServedDrafts
from flexquant_rl.engine.control.streamed_text import StreamedText
from flexquant_rl.engine.control.traces import RecordingPlan, SplitName
from flexquant_rl.engine.control.verified_signals import VerifiedSchema
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.decoding.choice import session_opener
from flexquant_rl.engine.decoding.next_token import Sampler
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.trace_rounds import RoundFacts
from flexquant_rl.fq_env.trace_table import Flags


class LiveRounds:
    """R rows, each in a round of its own of one prompt.

    Args:
        model: The model that was recorded.
        plan: Prompts, levels, depth and length of the recording.
        split: Prompts to continue.
        costs: What steps cost.
        num_rows: R.
        ngram_drafts: As for `TraceTable`.

    Raises:
        InputError: If the recording is of another model, the costs are not those of its levels and depth, or there is
            no such number of drafts.
    """

    options: ClassVar[tuple[str, ...]] = ("window",)

    def __init__(
        self,
        model: NestedCausalLM,
        plan: RecordingPlan,
        split: SplitName,
        costs: VerifyCosts,
        num_rows: int,
        ngram_drafts: int = 0,
    ) -> None:
        check_ngram_drafts(ngram_drafts)
        plan.check_model(model.fingerprint)
        costs.check(len(plan.draft_widths), plan.depth)
        self.costs = costs
        self.num_rows = num_rows
        self.schema = VerifiedSchema(len(plan.draft_widths), plan.depth)
        self._prompts = [planned.prompt_ids for planned in plan.sequences if planned.split == split]
        self.windows = range(len(self._prompts))
        self._model = model
        self._max_new_tokens = plan.max_new_tokens
        self._eos = plan.eos_token_ids
        longest = max(map(len, self._prompts), default=1)
        opener = session_opener(model, max_length=longest + plan.max_new_tokens, decoder=plan.decoder)
        self._levels = plan.levels(model.num_units)
        self._verify_widths = self._at(plan.verify_width)
        self._observer = ServedDrafts(
            "live",
            self.schema,
            self._levels,
            self._verify_widths,
            FixedRounds(0, 1).bind(DraftingContext(self.schema)),  # never asked: actions decide
            "signals",
        )
        controller = make_controller(model, self._observer, unmeasured_profile(model), num_rows=num_rows)
        assert isinstance(controller, DraftController)
        self._controller = controller
        self._runner = PolicyRunner(opener(num_rows), controller)
        found = min(ngram_drafts, plan.depth)
        self._rounds = Rounds(self._runner.decoder, controller, Sampler(num_rows), ngram_drafts=found)
        # Of each row: its prompt, and the tokens that are settled with the mean width that each was first read off at.
        self._prompt: list[Sequence[int]] = [()] * num_rows
        self._settled: list[list[int]] = [[] for _ in range(num_rows)]
        self._mean_widths: list[list[float]] = [[] for _ in range(num_rows)]

    def draw_dials(self, generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        """There is no dial: verified at its width, the text costs the same KL whatever is drafted."""
        return np.ones(count, dtype=np.float64)

    def start(self, rows: Tensor, windows: Tensor, kl_weight: Tensor, seeds: Tensor) -> None:
        """Starts rows `[R']` behind prompts `[R']`, read at the largest width; dials and seeds decide nothing."""
        dial = torch.ones(1, dtype=torch.float32)
        for row, window in zip(rows.tolist(), windows.tolist(), strict=True):
            prompt = self._prompts[window]
            self._runner.start(torch.tensor([prompt]), dial, torch.tensor([row]))
            first = int(self._runner.upcoming_token_ids[row])
            self._rounds.begin(row, prompt, first, eos_token_ids=self._eos)
            self._prompt[row] = prompt
            self._settled[row] = [first]
            self._mean_widths[row] = [float(max(self._model.bit_widths))]
            self._rounds.look_up(row, self._num_wanted(row))

    def step(self, actions: Tensor) -> RoundFacts:
        """Drafts or verifies in every row.

        Args:
            actions: `[R]` int64: 0 verifies now, 1 to L draft at level 0 to L - 1; where no draft is possible, every
                action verifies.
        """
        drafts = (actions.numpy() > 0) & self.can_draft()
        latency_ms = np.full(self.num_rows, self.costs.controller_ms)
        counts = np.zeros((3, self.num_rows), dtype=np.int64)  # drafted, accepted, emitted
        for row, action in enumerate(actions.tolist()):
            if drafts[row]:
                self._rounds.draft(row, self._levels[action - 1])
                latency_ms[row] += self.costs.draft_ms[action - 1]
                continue
            pending = self._state(row).pending
            is_found = bool(pending) and pending[0].is_found
            kept, _ = self._rounds.verify(row, self._verify_widths)
            settled = self._within_text(row, kept)
            if is_found:  # nobody is asked, but what is settled is seen
                latency_ms[row] = self.costs.settled_ms * len(settled)
            latency_ms[row] += self.costs.verify_ms[len(pending)]
            counts[:, row] = len(pending), len(kept) - 1, len(settled)
            widths = [draft.bit_widths for draft in pending[: len(kept) - 1]]
            self._settled[row] += settled
            self._mean_widths[row] += [self._mean_width(own) for own in [*widths, None]][: len(settled)]
            self._rounds.look_up(row, self._num_wanted(row))
        has_eos = np.array(list(map(self._has_eos, range(self.num_rows))))
        is_full = np.array([len(tokens) > self._max_new_tokens for tokens in self._settled])
        drafted, accepted, emitted = map(torch.from_numpy, counts)
        return RoundFacts(
            is_verify=torch.from_numpy(~drafts),
            level=torch.where(torch.from_numpy(drafts), actions - 1, -1),
            num_drafted=drafted,
            num_accepted=accepted,
            num_emitted=emitted,
            latency_ms=torch.from_numpy(latency_ms),
            full_latency_ms=self.costs.full_ms,
            terminated=torch.from_numpy(has_eos & ~drafts),
            truncated=torch.from_numpy(is_full & ~has_eos & ~drafts),
        )

    def can_draft(self) -> Flags:
        """`[R]`: whether another draft could be of use: the round and the continuation may be longer, no EOS waits."""
        states = map(self._state, range(self.num_rows))
        possible: Flags = np.array([state.room > 0 and state.num_pending < self.schema.depth for state in states])
        return possible

    def action_masks(self) -> Flags:
        """`[R, L + 1]`: which actions do what they say."""
        masks: Flags = np.ones((self.num_rows, self.schema.num_levels + 1), dtype=np.bool_)
        masks[:, 1:] = self.can_draft()[:, None]
        return masks

    def signals(self) -> Tensor:
        """What is known before the next step, `[R, dim]` float32, see `VerifiedSchema`."""
        seen = [self._observer.observe(self._controller.signals(row), self._state(row)) for row in range(self.num_rows)]
        return torch.from_numpy(np.concatenate(seen))

    def token_ids(self, row: int) -> list[int]:
        """The settled tokens of a row, the one that its prompt gave first."""
        return list(self._settled[row])

    def coloured(self, row: int) -> str:
        """A row's settled text, each token on the colour of the width that wrote it first: its draft's, if any."""
        text = StreamedText(self._model.tokenizer, list(self._prompt[row]))
        pieces = [text.add(token_id) for token_id in self._settled[row]]
        return coloured_text(pieces, self._mean_widths[row], self._model.bit_widths)

    def close(self) -> None:
        """Frees the decoder; closing twice is fine."""
        self._runner.decoder.close()

    def _state(self, row: int) -> RoundState:
        """The round of a row; nothing fits behind the end of its text."""
        return self._rounds.state(row, self._num_wanted(row))

    def _num_wanted(self, row: int) -> int:
        return 0 if self._has_eos(row) else self._max_new_tokens + 1 - len(self._settled[row])

    def _has_eos(self, row: int) -> bool:
        """Whether the text has ended; as in recordings, what the prompt alone gives does not end it."""
        return len(self._settled[row]) > 1 and self._settled[row][-1] in self._eos

    def _within_text(self, row: int, kept: list[int]) -> list[int]:
        """Those of the tokens that a pass kept which belong to the text: up to its end or its greatest length."""
        most = kept[: self._max_new_tokens + 1 - len(self._settled[row])]
        for place, token_id in enumerate(most):
            if token_id in self._eos:
                return most[: place + 1]
        return most

    def _mean_width(self, bit_widths: Tensor | None) -> float:
        """Of the step that drafted a token, or of the pass that gained it or kept what was found."""
        return float(self._model.mean_bit_width(self._verify_widths if bit_widths is None else bit_widths))

    def _at(self, width: int) -> Tensor:
        return torch.full((self._model.num_units,), width)
