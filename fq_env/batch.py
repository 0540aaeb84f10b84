"""R episodes at once through one model: the mechanics behind the single environment, the vector one and evaluation.

Rewards need the reference distribution at the same prefix. When the next token comes from the text, the reference's
pass over the whole window does not depend on any action, so it is made in one parallel pass when the episode starts;
when the model continues freely, a reference session steps along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.engine.control.cost import CostTable, clock_ms
from flexquant_rl.engine.control.profile import Profile, kl_nats, reference_width
from flexquant_rl.engine.control.signals import SignalSchema, SignalTracker, unit_depths
from flexquant_rl.engine.decoding.decoder import Decoder, StepOutput, greedy_tokens
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.task import EnvConfig, RewardTerms, reward_terms

StaticAllocator = Callable[[Tensor], Tensor]
"""KL weights `[R]` -> bit-widths `[R, U]` of the best static allocation at each."""


@dataclass(frozen=True)
class BatchStep:
    """One step of R episodes; tensors are `[R]` unless stated.

    Attributes:
        reward: Total and terms, before any control variate.
        static_reward: What the static allocation gets at the same token; 0 without a control variate.
        output_kl_nats: KL(reference || quantised) at this token.
        token_nll_nats: Negative log-likelihood of the text's next token; NaN when the model continues freely.
        top1_agreement: Whether quantised and reference agree on the most likely token.
        speedup: Over the largest width everywhere.
        latency_ms: Of the step, probe included.
        mean_bit_width: Parameter-weighted.
        terminated: The sequence ended with EOS.
        truncated: `max_new_tokens` reached.
    """

    reward: RewardTerms
    static_reward: Tensor
    output_kl_nats: Tensor
    token_nll_nats: Tensor
    top1_agreement: Tensor
    speedup: Tensor
    latency_ms: Tensor
    mean_bit_width: Tensor
    terminated: Tensor
    truncated: Tensor

    def infos(self, kl_weight: Tensor) -> list[dict[str, float]]:
        """What an environment's `info` says of each row: the reward without control variate, its terms, the dial."""
        columns = {
            "reward_plain": self.reward.total,
            "reward_latency": self.reward.latency,
            "reward_quality": self.reward.quality,
            "output_kl_nats": self.output_kl_nats,
            "speedup": self.speedup,
            "latency_ms": self.latency_ms,
            "mean_bit_width": self.mean_bit_width,
            "kl_weight": kl_weight,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]


class DecodeBatch:
    """R episodes in lockstep, each restartable on its own.

    Args:
        session: Holds R rows of `config.prompt_tokens + config.max_new_tokens` tokens.
        profile: Of the model; what the signals say of the units.
        config: Shape of the episodes.
        num_rows: R.
        cost: What the steps cost; default: the profile's table.
        eos_token_id: Ends an episode; None never does.
        static: Gives the control variate's allocation; None for no control variate. With `source="replay"` only.
        measured: Time every step with the wall clock instead of the profile's table.
    """

    def __init__(
        self,
        session: Decoder,
        profile: Profile,
        config: EnvConfig,
        *,
        num_rows: int,
        cost: CostTable | None = None,
        eos_token_id: int | None = None,
        static: StaticAllocator | None = None,
        measured: bool = False,
    ) -> None:
        config.validate()
        if static is not None and config.source == "free":
            raise InputError("a control variate needs source=replay: with source=free the text depends on the actions")
        model = session.model
        self.session = session
        self.profile = profile
        self.cost = cost or profile.cost
        self.config = config
        self.num_rows = num_rows
        self.schema = SignalSchema(model.num_units, model.bit_widths)
        self._eos_token_id = eos_token_id
        self._static = static
        self._measured = measured
        self._reference_session = session.fork() if config.source == "free" else None
        self._reference_width = torch.full((model.num_units,), reference_width(model))
        self._tracker = SignalTracker(self.schema, profile, model.embedding_matrix(), unit_depths(model), num_rows)
        self._tokens = torch.zeros(num_rows, config.window_tokens, dtype=torch.int64)
        self._position = torch.zeros(num_rows, dtype=torch.int64)
        self._kl_weight = torch.ones(num_rows)
        self._generators = [torch.Generator() for _ in range(num_rows)]
        self._reference_log_probs: Tensor | None = None  # [R, max_new_tokens, vocab], replay only
        self._reference_of: Tensor | None = None  # the windows that it belongs to, where all rows started together
        self._static_reward = torch.zeros(num_rows, config.max_new_tokens)
        self._next_reference: Tensor | None = None  # [R, vocab], free only
        self._full_ms = float(self.cost.latency_ms(self.cost.full_width()))

    @property
    def kl_weight(self) -> Tensor:
        """`[R]` the dial of each row."""
        return self._kl_weight

    def signals(self) -> Tensor:
        """`[R, dim]` float32: what a policy sees before the next step."""
        return self._tracker.signals()

    def reset(self, rows: Tensor, windows: Tensor, kl_weight: Tensor, seeds: Tensor) -> None:
        """Starts episodes.

        Args:
            rows: `[R']` int64 rows to restart.
            windows: `[R', window_tokens]` int64; with `source="free"` only the prompt is used.
            kl_weight: `[R']` dials.
            seeds: `[R']` int64, of the sampling with `source="free"`.
        """
        config = self.config
        self._tokens[rows] = windows
        self._position[rows] = 0
        self._kl_weight[rows] = kl_weight.float()
        for row, seed in zip(rows.tolist(), seeds.tolist(), strict=True):
            self._generators[row].manual_seed(seed)
        prompts = windows[:, : config.prompt_tokens]
        output = self.session.prefill(prompts, rows=None if self._is_whole(rows) else rows)
        if config.source == "free":
            assert self._reference_session is not None
            self._reference_session.prefill(prompts, rows=rows, bit_widths=self._reference_width)
            self._tokens[rows, config.prompt_tokens] = self._choose(output.logits, rows)
        else:
            self._prepare_replay(rows, windows, kl_weight)
        self._tracker.reset(output, self._tokens[rows, config.prompt_tokens], kl_weight, rows)

    def _prepare_replay(self, rows: Tensor, windows: Tensor, kl_weight: Tensor) -> None:
        """Reference distributions of the whole continuation, and what the static allocation gets at each token."""
        first = self.config.prompt_tokens
        read = windows[:, :-1]
        whole_batch = self._is_whole(rows)
        if whole_batch and self._reference_of is not None and torch.equal(self._reference_of, windows):
            assert self._reference_log_probs is not None  # the same text again, as when several policies are compared
            reference = self._reference_log_probs
        else:
            reference = self.session.score(read, self._reference_width, first=first).log_softmax(-1)
            self._keep_reference(rows, reference, windows if whole_batch else None)
        if self._static is None:
            return
        widths = self._static(kl_weight)
        # The prompt is read at the largest width, as `prefill` does.
        per_token = self.cost.full_width().repeat(*read.shape, 1)
        per_token[:, first:] = widths[:, None].cpu()
        log_probs = self.session.score(read, per_token, first=first).log_softmax(-1)
        kl = kl_nats(reference, log_probs)
        speedup = self.cost.speedup(widths)[:, None]
        self._static_reward[rows] = reward_terms(speedup, kl.cpu(), kl_weight[:, None]).total

    def _keep_reference(self, rows: Tensor, reference: Tensor, windows: Tensor | None) -> None:
        self._reference_of = windows
        if windows is not None:
            self._reference_log_probs = reference
            return
        if self._reference_log_probs is None:
            self._reference_log_probs = reference.new_zeros(self.num_rows, *reference.shape[1:])
        self._reference_log_probs[rows] = reference

    def step(self, bit_widths: Tensor) -> BatchStep:
        """Decodes one token in every row at widths `[R, U]` int64."""
        config = self.config
        rows = torch.arange(self.num_rows)
        at = config.prompt_tokens + self._position
        token_ids = self._tokens[rows, at]
        output, elapsed_ms = self._timed_step(self.session, bit_widths, token_ids)
        log_probs = output.logits.log_softmax(-1)
        reference = self._reference_at(token_ids)
        kl = kl_nats(reference, log_probs).cpu()
        static_reward = self._static_reward[rows, self._position]
        self._position += 1
        if config.source == "free":
            limit = torch.minimum(at + 1, torch.tensor(config.window_tokens - 1))
            self._tokens[rows, limit] = self._choose(output.logits, rows)
            nll = torch.full((self.num_rows,), float("nan"))
        else:
            nll = -log_probs.cpu()[rows, self._tokens[rows, at + 1]]
        next_tokens = self._tokens[rows, at + 1]
        mean_width = self.session.model.mean_bit_width(bit_widths)
        self._tracker.update(output, bit_widths, next_tokens, mean_width.to(output.logits.device))
        latency_ms = self._latency_ms(bit_widths, elapsed_ms)
        if config.probe_every:
            latency_ms = latency_ms + self._probe(kl)
        speedup = (self._full_ms / latency_ms).float()
        terminated = torch.zeros(self.num_rows, dtype=torch.bool)
        if self._eos_token_id is not None:
            terminated = next_tokens == self._eos_token_id
        return BatchStep(
            reward=reward_terms(speedup, kl, self._kl_weight),
            static_reward=static_reward,
            output_kl_nats=kl,
            token_nll_nats=nll,
            top1_agreement=(reference.argmax(-1) == log_probs.argmax(-1)).cpu(),
            speedup=speedup,
            latency_ms=latency_ms.float(),
            mean_bit_width=mean_width.cpu(),
            terminated=terminated,
            truncated=(self._position >= config.max_new_tokens) & ~terminated,
        )

    def _reference_at(self, token_ids: Tensor) -> Tensor:
        """Reference log-probabilities after the tokens just read, `[R, vocab]`."""
        if self._reference_session is not None:
            return self._reference_session.step(token_ids, self._reference_width).logits.log_softmax(-1)
        assert self._reference_log_probs is not None, "reset() first"
        return self._reference_log_probs[torch.arange(self.num_rows), self._position]

    def _latency_ms(self, bit_widths: Tensor, elapsed_ms: float) -> Tensor:
        if self._measured:
            return torch.full((self.num_rows,), elapsed_ms, dtype=torch.float64)
        return self.cost.latency_ms(bit_widths)

    def _probe(self, kl: Tensor) -> Tensor:
        """Shows the output KL to the rows whose turn it is and returns what that costs, `[R]` ms."""
        due = (self._position % self.config.probe_every == 0).nonzero()[:, 0]
        if len(due):
            self._tracker.observe_probe(kl[due].to(self.session.model.device), due)
        cost = torch.zeros(self.num_rows, dtype=torch.float64)
        cost[due] = self._full_ms
        return cost

    def _choose(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Next tokens `[R']` of a free continuation: greedy, or sampled from each row's own generator."""
        if self.config.temperature == 0:
            return greedy_tokens(logits)
        probs = (logits / self.config.temperature).softmax(-1).cpu()
        picks = [
            torch.multinomial(row_probs, 1, generator=self._generators[row])
            for row, row_probs in zip(rows.tolist(), probs, strict=True)
        ]
        return torch.cat(picks)

    def measure_full_step_ms(self, num_steps: int = 5) -> float:
        """Times steps at the largest width on a copy of the session: the baseline of measured speedups."""
        times = []
        for _ in range(num_steps):
            twin = self.session.fork()
            token_ids = self._tokens[torch.arange(self.num_rows), self.config.prompt_tokens + self._position]
            times.append(self._timed_step(twin, self.cost.full_width(), token_ids)[1])
            twin.close()
        self._full_ms = sorted(times)[len(times) // 2]
        return self._full_ms

    def close(self) -> None:
        """Frees the sessions; closing twice is fine."""
        self.session.close()
        if self._reference_session is not None:
            self._reference_session.close()

    def _is_whole(self, rows: Tensor) -> bool:
        return torch.equal(rows, torch.arange(self.num_rows))

    def _timed_step(self, session: Decoder, bit_widths: Tensor, token_ids: Tensor) -> tuple[StepOutput, float]:
        """One step and its wall-clock milliseconds; the device is waited for only where the time is used."""
        if not self._measured:
            return session.step(token_ids, bit_widths), 0.0
        outputs: list[StepOutput] = []
        elapsed_ms = clock_ms(lambda: outputs.append(session.step(token_ids, bit_widths)), session.model.device)
        return outputs[0], elapsed_ms
