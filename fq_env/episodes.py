"""R episodes in lockstep through one model: their text, its end, and the facts of every step, without any reward."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexquant_rl.engine.bits_display import coloured_text
from flexquant_rl.engine.control.controller import StaticController, TorchController
from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.decision import Decision, StaticAllocation, looks
from flexquant_rl.engine.control.output_kl import kl_nats
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.streamed_text import StreamedText
from flexquant_rl.engine.decoding.decoder import Decoder, StepOutput
from flexquant_rl.engine.decoding.next_token import Sampler
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.reference import Reference, SteppingReference, TextReference
from flexquant_rl.fq_env.task import draw_kl_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StepFacts:
    """What one step of R episodes was like; tensors are `[R]` unless stated.

    Attributes:
        decision: How the token was read.
        position: Steps that the episode had made before this one, int64.
        kl_weight: The dial of the episode, float32.
        output_kl_nats: KL(reference || quantised) at this token, float32.
        token_nll_nats: Negative log-likelihood of the text's next token; NaN when the model continues freely.
        top1_agreement: Whether quantised and reference agree on the most likely token.
        latency_ms: Latency of the step, probe included, float64.
        full_latency_ms: Latency of a step at the largest width everywhere.
        mean_bit_width: Parameter-weighted mean of the bit-widths.
        terminated: The text ended.
        truncated: The text did not end, but `max_new_tokens` is reached.
    """

    decision: Decision
    position: Tensor
    kl_weight: Tensor
    output_kl_nats: Tensor
    token_nll_nats: Tensor
    top1_agreement: Tensor
    latency_ms: Tensor
    full_latency_ms: float
    mean_bit_width: Tensor
    terminated: Tensor
    truncated: Tensor


@dataclass(frozen=True)
class _ReadPrompts:
    """Prompts that the decoder's rows begin with.

    Attributes:
        windows: `[R]` int64, of which windows.
        output: What their last tokens put out.
    """

    windows: Tensor
    output: StepOutput


class Episodes:
    """R episodes, one for each row of a decoder; each can be restarted on its own.

    Args:
        decoder: Has R rows of `config.window_tokens - 1` tokens.
        profile: Profile of the model; what the signals say of the units.
        windows: `[n, window_tokens]` int64, the text; with `source="free"` only the prompts are used.
        config: Shape of the episodes.
        cost: What the steps cost; default: the profile's table.
        eos_token_ids: Each of these ends an episode.
        measured: Take latencies from the clock instead of the table. One row only.
        tokenizer: Tokenizer of the model, for `coloured` only.

    Raises:
        InputError: If the configuration makes no episode, or several rows are to be timed.
    """

    options: ClassVar[tuple[str, ...]] = ("window", "kl_weight")

    def __init__(
        self,
        decoder: Decoder,
        profile: Profile,
        windows: Tensor,
        config: EnvConfig,
        *,
        cost: CostTable | None = None,
        eos_token_ids: Sequence[int] = (),
        measured: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        config.validate()
        self.num_rows = num_rows = len(decoder.lengths)
        if measured and num_rows > 1:
            raise InputError(
                f"num_envs={num_rows}: a pass over several rows takes the time of none of them, so latency is measured "
                'with one row; make_vec(..., vectorization_mode="sync") times rows one by one'
            )
        self.model = decoder.model
        self.profile = profile
        self.windows = windows
        self.config = config
        self.cost = cost or profile.cost
        self.controller = TorchController(decoder.model, None, profile, num_rows)
        self.schema = self.controller.schema
        self._decoder = decoder
        self._runner = PolicyRunner(decoder, self.controller, self._choose_next, timed=measured)
        self._sampler = Sampler(num_rows) if config.source == "free" else None
        self._reference: Reference = (
            TextReference(decoder, num_rows, config.prompt_tokens)
            if self._sampler is None
            else SteppingReference(decoder, num_rows, config.prompt_tokens, self._current)
        )
        self._prompts: _ReadPrompts | None = None
        self._eos = torch.tensor(eos_token_ids, dtype=torch.int64)
        self._measured = measured
        self._tokenizer = tokenizer
        self._full_ms = float(self.cost.latency_ms(self.cost.full_width()))
        self._tokens = torch.zeros(num_rows, config.window_tokens, dtype=torch.int64)
        self._position = torch.full((num_rows,), -1)  # steps made; -1: no episode has started
        self._kl_weight = torch.ones(num_rows, dtype=torch.float32)
        self._mean_widths = torch.zeros(num_rows, config.max_new_tokens, dtype=torch.float32)

    @property
    def kl_weight(self) -> Tensor:
        """`[R]` float32, the dial of each row."""
        return self._kl_weight

    def draw_dials(self, generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Dials of episodes that start together, `[count]`: see `draw_kl_weights`."""
        return draw_kl_weights(generator, self.config, count)

    def signals(self) -> Tensor:
        """What is known before the next step, `[R, dim]` float32."""
        return self.controller.signals()

    def start(self, rows: Tensor, windows: Tensor, kl_weight: Tensor, seeds: Tensor) -> None:
        """Starts episodes.

        Args:
            rows: `[R']` int64, rows to restart.
            windows: `[R']` int64, indices into the text.
            kl_weight: `[R']`, the dials.
            seeds: `[R']` int64, seeds of the sampling with `source="free"`.
        """
        self._tokens[rows] = self.windows[windows]
        self._position[rows] = -1
        self._kl_weight[rows] = kl_weight.float()
        if self._sampler is not None:
            for row, seed in zip(rows.tolist(), seeds.tolist(), strict=True):
                self._sampler.start(row, temperature=self.config.temperature, seed=seed)
        output = self._read_prompts(rows, windows, kl_weight)
        self._reference.start(self._tokens[rows], rows, windows)
        if self._measured:
            self._full_ms = self._time_full_step(output, kl_weight)

    def _read_prompts(self, rows: Tensor, windows: Tensor, kl_weight: Tensor) -> StepOutput:
        """Reads the prompts of rows; where all start again with their windows, as for another policy, they are kept."""
        is_whole = torch.equal(rows, torch.arange(self.num_rows))
        kept = self._prompts
        if is_whole and kept is not None and torch.equal(windows, kept.windows):
            self._decoder.truncate(torch.full((self.num_rows,), self.config.prompt_tokens))
            self._runner.begin(kept.output, kl_weight)
            return kept.output
        self._prompts = None  # should the pass fail
        prompts = self._tokens[rows, : self.config.prompt_tokens]
        output = self._runner.start(prompts, kl_weight, None if is_whole else rows)
        if is_whole:
            self._prompts = _ReadPrompts(windows.clone(), output)
        return output

    def step(self, decision: Decision | None = None) -> StepFacts:
        """Decodes one token in every row.

        Args:
            decision: How to read it, `[R, U]` widths; default: as the controller's policy decides.
        """
        rows, position = torch.arange(self.num_rows), self._position.clone()
        token = self._runner.step(decision)
        log_probs = token.output.logits.log_softmax(-1)
        reference = self._reference.log_probs(position)
        kl = kl_nats(reference, log_probs).cpu()
        mean_width = self.model.mean_bit_width(token.decision.bit_widths).cpu()
        self._mean_widths[rows, position] = mean_width
        latency_ms = self._latency_ms(token.decision, token.pass_ms)
        if self.config.probe_every:
            latency_ms = latency_ms + self._probe(kl)
        nll = torch.full((self.num_rows,), float("nan"), dtype=torch.float32)
        if self._sampler is None:
            nll = -log_probs.cpu()[rows, token.next_token_ids]
        terminated = torch.isin(token.next_token_ids, self._eos)
        return StepFacts(
            decision=token.decision,
            position=position,
            kl_weight=self._kl_weight.clone(),
            output_kl_nats=kl,
            token_nll_nats=nll,
            top1_agreement=(reference.argmax(-1) == log_probs.argmax(-1)).cpu(),
            latency_ms=latency_ms,
            full_latency_ms=self._full_ms,
            mean_bit_width=mean_width,
            terminated=terminated,
            truncated=(self._position >= self.config.max_new_tokens) & ~terminated,
        )

    def text_kl_nats(self, rows: Tensor, bit_widths: Tensor) -> Tensor:
        """Output KL at every token of the text of rows `[R']` that is read at given widths; replay only.

        The prompts are read at the largest width, as they are in the episodes. The episodes themselves do not move.

        Args:
            rows: `[R']` int64.
            bit_widths: `[R', U]`, or `[R', max_new_tokens, U]` for tokens that differ, int64.

        Returns:
            `[R', max_new_tokens]` float32.
        """
        assert isinstance(self._reference, TextReference), "a free continuation has no text"
        return self._reference.kl_nats(self._tokens[rows], rows, bit_widths)

    def coloured(self, row: int) -> str:
        """A row's continuation so far, each token on the colour of its mean width, as `fq generate --show-bits`."""
        if self._tokenizer is None:
            raise ValueError("without a tokenizer tokens have no text; pass the model's")
        first, num_steps = self.config.prompt_tokens, int(self._position[row])
        prompt, continuation = self._tokens[row, :first], self._tokens[row, first : first + num_steps + 1]
        # The first token was chosen from the prompt, which is read at the largest width.
        widths = [float(max(self.model.bit_widths)), *self._mean_widths[row, : max(num_steps, 0)].tolist()]
        text = StreamedText(self._tokenizer, prompt.tolist())
        pieces = [text.add(token_id) for token_id in continuation.tolist()]
        return coloured_text(pieces, widths[: len(pieces)], self.model.bit_widths)

    def close(self) -> None:
        """Frees the decoders; closing twice is fine."""
        self._decoder.close()
        self._reference.close()

    def _choose_next(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the next step reads (a `NextTokens`): the text's next token, or a sampled one that becomes the text."""
        chosen = torch.arange(self.num_rows) if rows is None else rows
        self._position[chosen] += 1
        if self._sampler is not None:
            self._tokens[chosen, self.config.prompt_tokens + self._position[chosen]] = self._sampler(logits, rows)
        return self._current(logits, rows)

    def _current(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the next step reads, already chosen (a `NextTokens`): the reference decoder reads the same."""
        chosen = torch.arange(self.num_rows) if rows is None else rows
        return self._tokens[chosen, self.config.prompt_tokens + self._position[chosen]]

    def _latency_ms(self, decision: Decision, pass_ms: float | None) -> Tensor:
        if pass_ms is not None:
            return torch.full((self.num_rows,), pass_ms, dtype=torch.float64)
        policy = self.controller.policy
        is_charged = policy is None or looks(policy)  # None: an agent that was shown the signals
        return self.cost.latency_ms(decision.bit_widths) + (self.cost.controller_ms if is_charged else 0.0)

    def _probe(self, kl: Tensor) -> Tensor:
        """Shows the output KL to the rows whose turn it is and returns what that costs, `[R]` ms."""
        due = (self._position % self.config.probe_every == 0).nonzero()[:, 0]
        if len(due):
            self.controller.tracker.observe_probe(kl[due].to(self.model.device), due)
        cost = torch.zeros(self.num_rows, dtype=torch.float64)
        cost[due] = self._full_ms
        return cost

    def _time_full_step(self, output: StepOutput, kl_weight: Tensor, num_steps: int = 5) -> float:
        """Times steps at the largest width on a copy of the decoder: the baseline of measured speedups."""
        controller = StaticController(StaticAllocation("full", self.cost.full_width()))
        twin = PolicyRunner(self._decoder.fork(), controller, timed=True)
        twin.begin(output, kl_weight)
        times = [twin.step().pass_ms for _ in range(min(num_steps, self.config.max_new_tokens))]
        twin.decoder.close()
        return statistics.median(ms for ms in times if ms is not None)
