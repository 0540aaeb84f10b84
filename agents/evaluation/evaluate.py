"""Runs policies on held-out text and boils what happened down to rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.engine.control.controller import make_controller
from flexquant_rl.engine.control.cost import CostTable, clock_ms
from flexquant_rl.engine.control.decision import Policy, StaticAllocation
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.decoding.choice import open_session
from flexquant_rl.engine.decoding.next_token import Replay
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.episodes import Episodes, StepFacts
from flexquant_rl.fq_env.task import LossyTask

_BOOTSTRAP_RESAMPLES = 1000
_TIMING_WARMUP = 4
_MIN_ROUNDS = 5
_TIMING_S = 10.0


@dataclass(frozen=True)
class Trace:
    """What a policy did on S sequences of T tokens.

    Attributes:
        bit_widths: `[S, T, U]` int64.
        output_kl_nats: `[S, T]`.
        token_nll_nats: `[S, T]`.
        top1_agreement: `[S, T]` bool.
        latency_ms: `[S, T]`, from the profile's table.
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
        session = DecodeSession(model, num_rows=len(windows), max_length=config.window_tokens - 1)
        self._episodes = Episodes(session, profile, windows, config, cost=cost)
        self._task = LossyTask(model, profile, config)

    def run(self, policy: Policy, kl_weight: Tensor | float = 1.0) -> Trace:
        """Plays every sequence to its end; `kl_weight` is the dial, one for all or `[S]`."""
        episodes, rows = self._episodes, torch.arange(len(self.windows))
        dials = torch.as_tensor(kl_weight, dtype=torch.float32).expand(len(rows))
        episodes.controller.policy = policy
        episodes.start(rows, windows=rows, kl_weight=dials, seeds=torch.zeros_like(rows))
        steps = [episodes.step() for _ in range(episodes.config.max_new_tokens)]

        def column(get: Callable[[StepFacts], Tensor]) -> Tensor:
            return torch.stack([get(facts) for facts in steps], dim=1)

        return Trace(
            bit_widths=column(lambda facts: facts.decision.bit_widths),
            output_kl_nats=column(lambda facts: facts.output_kl_nats),
            token_nll_nats=column(lambda facts: facts.token_nll_nats),
            top1_agreement=column(lambda facts: facts.top1_agreement),
            latency_ms=column(lambda facts: facts.latency_ms.float()),
            mean_bit_width=column(lambda facts: facts.mean_bit_width),
            full_latency_ms=steps[0].full_latency_ms,
            reward=column(lambda facts: self._task.reward(facts).total),
        )

    def close(self) -> None:
        """Frees the session."""
        self._episodes.close()


def summarise(
    trace: Trace,
    *,
    policy: str,
    family: str,
    reference: str,
    seed: int | None = None,
    kl_weight: float | None = None,
    speedup_measured: float | None = None,
) -> EvalRow:
    """One row of the table: means over all tokens, a bootstrap interval over sequences."""
    per_sequence = trace.output_kl_nats.double().mean(1)
    low, high = bootstrap_interval(per_sequence)
    return EvalRow(
        policy=policy,
        family=family,
        seed=seed,
        kl_weight=kl_weight,
        mean_bit_width=float(trace.mean_bit_width.mean()),
        output_kl_nats=float(per_sequence.mean()),
        output_kl_low=low,
        output_kl_high=high,
        output_kl_p99_nats=float(trace.output_kl_nats.flatten().double().quantile(0.99)),
        perplexity=float(trace.token_nll_nats.double().mean().exp()),
        top1_agreement=float(trace.top1_agreement.float().mean()),
        speedup_modelled=trace.speedup,
        speedup_measured=speedup_measured,
        num_sequences=len(per_sequence),
        num_tokens=trace.output_kl_nats.numel(),
        reference=reference,
        sequence_kl_nats=tuple(per_sequence.tolist()),
    )


def bootstrap_interval(values: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of `[S]` values by resampling sequences."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (_BOOTSTRAP_RESAMPLES, len(values)), generator=generator)
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def measured_speedups(
    model: NestedCausalLM,
    profile: Profile,
    window: Tensor,
    config: EnvConfig,
    policies: list[tuple[Policy, float]],
    *,
    rounds: int = 21,
    num_threads: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[float]:
    """Wall-clock speedup of batch-1 decoding over the largest width, the policy's own cost included.

    In every round each policy and the baseline decode the same window, one after the other in a new random order: the
    weights are as warm in the caches as when a policy decodes alone, and drift of the machine hits all alike. What
    counts is the median over rounds of the baseline's median step over the policy's.

    Args:
        model: The model.
        profile: Profile that the signals are made with.
        window: `[window_tokens]` int64.
        config: Shape of the episode.
        policies: Policies, each with its dial.
        rounds: Turns of every policy; after the fifth no new round begins once 10 s have passed.
        num_threads: Threads of a step, as for `open_session`.
        progress: Wraps the rounds.
    """
    baseline = StaticAllocation("baseline", profile.cost.full_width())
    contestants = [(baseline, 1.0), *policies]
    controllers = [make_controller(model, policy, profile) for policy, _ in contestants]
    first = config.prompt_tokens
    parent = open_session(model, max_length=config.window_tokens - 1, num_threads=num_threads)
    prompt = parent.prefill(window[None, :first])
    turn_ms: list[list[float]] = [[] for _ in contestants]
    generator = torch.Generator().manual_seed(0)
    began = time.monotonic()
    for done in progress(range(rounds)):
        if done >= _MIN_ROUNDS and time.monotonic() - began > _TIMING_S:
            break
        for which in torch.randperm(len(contestants), generator=generator).tolist():
            runner = PolicyRunner(parent.fork(), controllers[which], Replay(window[None, first:]))
            runner.begin(prompt, torch.tensor([contestants[which][1]]))
            times = [clock_ms(runner.step, model.device) for _ in range(len(window) - 1 - first)]
            turn_ms[which].append(statistics.median(times[_TIMING_WARMUP:] or times))
    full_ms, *own_ms = turn_ms
    return [statistics.median(full / ms for full, ms in zip(full_ms, own, strict=True)) for own in own_ms]
