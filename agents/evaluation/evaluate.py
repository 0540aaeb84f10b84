"""Runs policies on held-out text and boils what happened down to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.resampling import document_weights, percentile_interval
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.engine.control.allocation_kl import TextFacts, allocation_facts
from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.decision import Decision, Policy, StaticAllocation
from flexquant_rl.engine.control.output_kl import kl_nats
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.episodes import Episodes, StepFacts
from flexquant_rl.fq_env.task import LossyTask


@dataclass(frozen=True)
class Trace:
    """What a policy did on S sequences of T tokens.

    Attributes:
        bit_widths: `[S, T, U]` int64.
        output_kl_nats: `[S, T]`.
        token_nll_nats: `[S, T]`.
        top1_agreement: `[S, T]` bool.
        latency_ms: `[S, T]` float64, from the profile's table.
        mean_bit_width: `[S, T]`.
        full_latency_ms: Latency at the largest width everywhere.
        reward: `[S, T]` at the dial that the policy was given.
    """

    bit_widths: Tensor
    output_kl_nats: Tensor
    token_nll_nats: Tensor
    top1_agreement: Tensor
    latency_ms: Tensor
    mean_bit_width: Tensor
    full_latency_ms: float
    reward: Tensor

    @property
    def speedup(self) -> float:
        """Time of all tokens at the largest width over time of all tokens as decided."""
        return self.full_latency_ms / float(self.latency_ms.double().mean())

    def differs_from(self, bit_widths: Tensor) -> float:
        """Share of steps whose widths are not `[U]`, 0 to 1."""
        return float((self.bit_widths != bit_widths).any(-1).double().mean())


def joined(traces: Sequence[Trace]) -> Trace:
    """One trace of the sequences of several, in order."""
    columns = [field.name for field in fields(Trace) if field.name != "full_latency_ms"]
    return Trace(
        **{name: torch.cat([getattr(trace, name) for trace in traces]) for name in columns},
        full_latency_ms=traces[0].full_latency_ms,
    )


def trace_of_pass(
    model: NestedCausalLM,
    cost: CostTable,
    bit_widths: Tensor,
    reference_log_probs: Tensor,
    log_probs: Tensor,
    next_token_ids: Tensor,
) -> Trace:
    """What a parallel pass at given widths did; there is no dial, so the reward is zero.

    Args:
        model: The model.
        cost: What the steps cost.
        bit_widths: `[S, T, U]` int64.
        reference_log_probs: `[S, T, vocab]` of the reference.
        log_probs: `[S, T, vocab]` of the pass.
        next_token_ids: `[S, T]` int64, what the text goes on with.
    """
    reference, found = reference_log_probs.cpu(), log_probs.cpu()
    return Trace(
        bit_widths=bit_widths,
        output_kl_nats=kl_nats(reference, found),
        token_nll_nats=-found.gather(-1, next_token_ids[..., None])[..., 0],
        top1_agreement=reference.argmax(-1) == found.argmax(-1),
        latency_ms=cost.latency_ms(bit_widths),
        mean_bit_width=model.mean_bit_width(bit_widths),
        full_latency_ms=float(cost.latency_ms(cost.full_width())),
        reward=torch.zeros(bit_widths.shape[:2], dtype=torch.float32),
    )


class Evaluator:
    """Replays the same windows under one policy after another; the reference's pass is made once.

    Args:
        model: The model.
        profile: Profile of the model.
        windows: `[S, window_tokens]` int64.
        config: Shape of the episodes; the source must be `replay`.
        cost: What the steps cost; default: the profile's table.
    """

    def __init__(
        self,
        model: NestedCausalLM,
        profile: Profile,
        windows: Tensor,
        config: EnvConfig,
        *,
        cost: CostTable | None = None,
    ) -> None:
        self.model = model
        self.windows = windows
        self._session = DecodeSession(model, num_rows=len(windows), max_length=config.window_tokens - 1)
        self._episodes = Episodes(self._session, profile, windows, config, cost=cost)
        self._task = LossyTask(model, profile, config)

    def run(self, policy: Policy, kl_weight: Tensor | float = 1.0) -> Trace:
        """Plays every sequence to its end; `kl_weight` is the dial, one for all or `[S]`."""
        episodes = self._episodes
        episodes.controller.policy = policy
        rows = torch.arange(len(self.windows))
        dials = torch.as_tensor(kl_weight, dtype=torch.float32).expand(len(rows))
        episodes.start(rows, windows=rows, kl_weight=dials, seeds=torch.zeros_like(rows))
        return self._trace([episodes.step() for _ in range(episodes.config.max_new_tokens)])

    def run_static(
        self,
        allocations: Sequence[StaticAllocation],
        *,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> list[Trace]:
        """What `run` gives for policies of one allocation `[U]`, all in one parallel pass; the dial is 1.

        Nothing is probed: whoever does not look at the signals pays for none.

        Args:
            allocations: The policies.
            progress: Wraps the loop over layers, the head last.
        """
        if not allocations:
            return []
        model, config, cost = self.model, self._episodes.config, self._episodes.cost
        found = allocation_facts(
            self._session,
            self.windows,
            torch.stack([one.bit_widths for one in allocations]),
            first=config.prompt_tokens,
            prompt_width=max(model.bit_widths),
            progress=progress,
        )
        num_rows, full_ms = len(self.windows), float(cost.latency_ms(cost.full_width()))
        never = torch.zeros(num_rows, dtype=torch.bool)

        def facts(allocation: StaticAllocation, text: TextFacts, position: int) -> StepFacts:
            widths = allocation.bit_widths.expand(num_rows, -1)
            return StepFacts(
                decision=Decision(widths),
                position=torch.full((num_rows,), position),
                kl_weight=torch.ones(num_rows, dtype=torch.float32),
                output_kl_nats=text.output_kl_nats[:, position],
                token_nll_nats=text.token_nll_nats[:, position],
                top1_agreement=text.top1_agreement[:, position],
                latency_ms=cost.latency_ms(widths),
                full_latency_ms=full_ms,
                mean_bit_width=model.mean_bit_width(widths).cpu(),
                terminated=never,
                truncated=never if position + 1 < config.max_new_tokens else ~never,
            )

        return [
            self._trace([facts(allocation, text, position) for position in range(config.max_new_tokens)])
            for allocation, text in zip(allocations, found, strict=True)
        ]

    def _trace(self, steps: Sequence[StepFacts]) -> Trace:
        def column(get: Callable[[StepFacts], Tensor]) -> Tensor:
            return torch.stack([get(facts) for facts in steps], dim=1)

        return Trace(
            bit_widths=column(lambda facts: facts.decision.bit_widths),
            output_kl_nats=column(lambda facts: facts.output_kl_nats),
            token_nll_nats=column(lambda facts: facts.token_nll_nats),
            top1_agreement=column(lambda facts: facts.top1_agreement),
            latency_ms=column(lambda facts: facts.latency_ms),
            mean_bit_width=column(lambda facts: facts.mean_bit_width),
            full_latency_ms=steps[0].full_latency_ms,
            reward=column(lambda facts: self._task.reward(facts).total),
        )

    def close(self) -> None:
        """Frees the session."""
        self._episodes.close()


@dataclass(frozen=True)
class SharedTrace:
    """Two static traces of the same text that share the time: each token is decided by the second with a probability.

    Attributes:
        first: The one trace.
        second: The other one.
        share: Probability of the second, 0 to 1.
    """

    first: Trace
    second: Trace
    share: float

    def mean(self, get: Callable[[Trace], Tensor]) -> Tensor:
        """The expected value of a column `[S, T]`, float64."""
        return (1 - self.share) * get(self.first).double() + self.share * get(self.second).double()

    def quantile(self, get: Callable[[Trace], Tensor], level: float) -> float:
        """The quantile of a column over all tokens of both, each as probable as it is."""
        if not 0 < self.share < 1:
            return float(self.mean(get).flatten().quantile(level))
        first, second = get(self.first).double().flatten(), get(self.second).double().flatten()
        values, order = torch.cat([first, second]).sort()
        weights = torch.cat([torch.full_like(first, 1 - self.share), torch.full_like(second, self.share)])[order]
        reached = weights.cumsum(0) >= level * len(first)
        return float(values[int(reached.double().argmax())])

    def differs_from(self, bit_widths: Tensor) -> float:
        """As `Trace.differs_from`, in expectation."""
        return (1 - self.share) * self.first.differs_from(bit_widths) + self.share * self.second.differs_from(
            bit_widths
        )


def summarise(
    trace: Trace | SharedTrace,
    *,
    policy: str,
    family: str,
    reference: str,
    seed: int | None = None,
    kl_weight: float | None = None,
    time_budget: float | None = None,
    time_share_measured: float | None = None,
    time_share_measured_error: float | None = None,
    documents: Sequence[int] | None = None,
    is_modelled: bool = True,
) -> EvalRow:
    """One row of the table: means over all tokens, a bootstrap interval over documents.

    Args:
        trace: What happened.
        policy: As in `EvalRow`; so are the others that are not listed.
        family: See there.
        reference: See there.
        seed: See there.
        kl_weight: See there.
        time_budget: See there.
        time_share_measured: See there.
        time_share_measured_error: See there.
        documents: The document of each sequence; default: each is its own.
        is_modelled: Whether the trace has the policy's time; that of drafts is what a text costs without them.
    """
    shared = trace if isinstance(trace, SharedTrace) else SharedTrace(trace, trace, 0.0)
    per_sequence = shared.mean(lambda one: one.output_kl_nats).mean(1)
    owners = tuple(range(len(per_sequence))) if documents is None else tuple(documents)
    low, high = bootstrap_interval(per_sequence, owners)
    time_share = float(shared.mean(lambda one: one.latency_ms).mean()) / shared.first.full_latency_ms
    return EvalRow(
        policy=policy,
        family=family,
        seed=seed,
        kl_weight=kl_weight,
        time_budget=time_budget,
        mean_bit_width=float(shared.mean(lambda one: one.mean_bit_width).mean()),
        output_kl_nats=float(per_sequence.mean()),
        output_kl_low=low,
        output_kl_high=high,
        output_kl_p99_nats=shared.quantile(lambda one: one.output_kl_nats, 0.99),
        perplexity=float(shared.mean(lambda one: one.token_nll_nats).mean().exp()),
        top1_agreement=float(shared.mean(lambda one: one.top1_agreement).mean()),
        differs_from_static=None,
        time_share_modelled=time_share if is_modelled else None,
        time_share_measured=time_share_measured,
        time_share_measured_error=time_share_measured_error,
        speedup_modelled=1 / time_share if is_modelled else None,
        speedup_measured=None if time_share_measured is None else 1 / time_share_measured,
        num_sequences=len(per_sequence),
        num_tokens=shared.first.output_kl_nats.numel(),
        reference=reference,
        sequence_kl_nats=tuple(per_sequence.tolist()),
        static_kl_nats=None,
        static_kl_nats_measured=None,
        static_log_error_measured=None,
        sequence_documents=owners,
    )


def bootstrap_interval(values: Tensor, documents: Sequence[int] | None = None) -> tuple[float, float]:
    """95% interval of the mean of `[S]` values by resampling documents; default: each value is one of its own."""
    weights = document_weights(range(len(values)) if documents is None else documents)
    return percentile_interval(weights[1:] @ values.double().numpy())
