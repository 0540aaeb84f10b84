"""Evaluation: numbers against hand arithmetic and against the parallel pass, whatever ran before."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.evaluate import (
    Evaluator,
    Trace,
    bootstrap_interval,
    summarise,
)
from flexquant_rl.agents.policies.entropy import EntropyThreshold
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.random_widths import RandomWidths
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.engine.control.decision import Decision, Policy, StaticAllocation
from flexquant_rl.engine.control.output_kl import kl_nats
from flexquant_rl.engine.decoding.session import DecodeSession

TRACE_FIELDS = (
    "bit_widths",
    "output_kl_nats",
    "token_nll_nats",
    "top1_agreement",
    "latency_ms",
    "mean_bit_width",
    "reward",
)


def hand_made_trace() -> Trace:
    """Two sequences of two tokens on one unit."""
    return Trace(
        bit_widths=torch.tensor([[[4], [8]], [[4], [4]]]),
        output_kl_nats=torch.tensor([[0.1, 0.0], [0.3, 0.2]]),
        token_nll_nats=torch.tensor([[1.0, 2.0], [3.0, 2.0]]),
        top1_agreement=torch.tensor([[True, True], [False, True]]),
        latency_ms=torch.tensor([[1.0, 2.0], [1.0, 1.0]]),
        mean_bit_width=torch.tensor([[4.0, 8.0], [4.0, 4.0]]),
        full_latency_ms=2.0,
        reward=torch.zeros(2, 2),
    )


def test_summary_by_hand() -> None:
    row = summarise(
        hand_made_trace(), policy="p", family="f", reference="8-bit", seed=3, kl_weight=2.0, time_share_measured=0.8
    )
    assert row.output_kl_nats == pytest.approx(0.15)
    assert row.sequence_kl_nats == pytest.approx((0.05, 0.25))
    assert row.output_kl_low == pytest.approx(0.05)  # of two sequences, resamples of one alone are the ends
    assert row.output_kl_high == pytest.approx(0.25)
    assert row.output_kl_p99_nats == pytest.approx(0.2 + 0.97 * 0.1)
    assert row.perplexity == pytest.approx(math.exp(2.0))
    assert row.top1_agreement == 0.75
    assert row.mean_bit_width == 5.0
    assert row.speedup_modelled == pytest.approx(2.0 / 1.25)  # total time over total time, not a mean of ratios
    assert (row.speedup_measured, row.seed, row.kl_weight) == (1.25, 3, 2.0)
    assert (row.policy, row.family, row.reference) == ("p", "f", "8-bit")
    assert (row.num_sequences, row.num_tokens) == (2, 4)


def evaluator_of(prepared: Prepared) -> Evaluator:
    return Evaluator(prepared.model, prepared.profile, prepared.windows.test, prepared.env)


def test_static_policy_equals_the_parallel_pass(tiny_prepared: Prepared) -> None:
    model, windows, first = tiny_prepared.model, tiny_prepared.windows.test, tiny_prepared.env.prompt_tokens
    allocation = torch.tensor([4, 3, 6])
    dials = torch.linspace(2, 9, len(windows))
    trace = evaluator_of(tiny_prepared).run(StaticAllocation("static", allocation), dials)
    per_token = torch.full((*windows[:, :-1].shape, 3), 8)
    per_token[:, first:] = allocation
    session = DecodeSession(model)
    log_probs = session.score(windows[:, :-1], per_token, first=first).log_softmax(-1)
    reference = session.score(windows[:, :-1], first=first).log_softmax(-1)
    kl = kl_nats(reference, log_probs)
    assert float(kl.mean()) > 1e-3
    torch.testing.assert_close(trace.output_kl_nats, kl, atol=2e-5, rtol=1e-3)
    nll = -log_probs.gather(-1, windows[:, first + 1 :, None])[..., 0]
    torch.testing.assert_close(trace.token_nll_nats, nll, atol=2e-4, rtol=1e-4)
    assert torch.equal(trace.top1_agreement, reference.argmax(-1) == log_probs.argmax(-1))
    assert torch.equal(trace.bit_widths, allocation.expand(len(windows), 12, 3))
    cost = tiny_prepared.profile.cost
    assert trace.speedup == pytest.approx(1 / float(cost.time_share(allocation)))
    torch.testing.assert_close(
        trace.reward, (1 - 1 / trace.speedup - dials[:, None] * trace.output_kl_nats), atol=1e-5, rtol=1e-5
    )
    row = summarise(trace, policy="static", family="static", reference="unquantised")
    assert row.perplexity == pytest.approx(float(nll.double().mean().exp()), rel=1e-4)
    assert row.mean_bit_width == pytest.approx(float(model.mean_bit_width(allocation)))


def test_a_run_behind_others_is_the_run_of_a_new_evaluator_bit_for_bit(tiny_prepared: Prepared) -> None:
    used, allocation = evaluator_of(tiny_prepared), torch.tensor([4, 3, 6])
    used.run(StaticAllocation("other", torch.tensor([8, 6, 3])), 100.0)
    dials = torch.linspace(2, 9, len(used.windows))
    found, expected = (
        evaluator.run(StaticAllocation("static", allocation), dials)
        for evaluator in (used, evaluator_of(tiny_prepared))
    )
    for name in TRACE_FIELDS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_static_policies_together_equal_each_alone(tiny_prepared: Prepared) -> None:
    evaluator = evaluator_of(tiny_prepared)
    widths = torch.tensor(tiny_prepared.model.bit_widths)
    drawn = widths[torch.randint(len(widths), (3, tiny_prepared.model.num_units))]
    static = [StaticAllocation(str(index), row) for index, row in enumerate(drawn)]
    together = evaluator.run_static(static)
    for policy, found in zip(static, together, strict=True):
        alone = evaluator.run(policy)
        for name, column in vars(alone).items():
            torch.testing.assert_close(getattr(found, name), column, atol=2e-4, rtol=1e-3, msg=f"{name}, {policy}")
    assert evaluator.run_static([]) == []


def policies(prepared: Prepared) -> dict[str, Callable[[], Policy]]:
    context = policy_context(prepared)
    return {
        "fixed:4": lambda: Fixed(4).bind(context),
        "random": lambda: RandomWidths(4.5, seed=2).bind(context),
        "entropy": lambda: EntropyThreshold(1.5, one_way=True).bind(context),
        "fixed:8": lambda: Fixed(8).bind(context),
    }


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [3, 2, 1, 0]])
def test_the_order_of_policies_changes_nothing(tiny_prepared: Prepared, order: list[int]) -> None:
    makers = policies(tiny_prepared)
    shared = evaluator_of(tiny_prepared)
    traces = {list(makers)[index]: shared.run(list(makers.values())[index]()) for index in order}
    for name, make in makers.items():
        alone = evaluator_of(tiny_prepared).run(make())
        for field in TRACE_FIELDS:
            assert torch.equal(getattr(traces[name], field), getattr(alone, field)), (name, field)
    again = shared.run(makers["random"]())
    assert torch.equal(again.output_kl_nats, traces["random"].output_kl_nats)


def test_policies_see_their_dial(tiny_prepared: Prepared) -> None:
    seen: list[Tensor] = []

    class Spy:
        name = "spy"

        def __call__(self, signals: Tensor) -> Decision:
            seen.append(signals.clone())
            return Decision(torch.full((len(signals), 3), 8))

    dials = torch.linspace(1, 80, len(tiny_prepared.windows.test))
    evaluator = evaluator_of(tiny_prepared)
    evaluator.run(Spy(), dials)
    evaluator.run(Spy(), 30.0)
    column = policy_context(tiny_prepared).schema.index("dial")
    assert len(seen) == 2 * tiny_prepared.env.max_new_tokens
    for signals in seen[:12]:
        torch.testing.assert_close(signals[:, column], dials.log10())
    for signals in seen[12:]:
        torch.testing.assert_close(signals[:, column], torch.full((8,), 30.0).log10())


def test_wider_is_better_and_slower(tiny_prepared: Prepared) -> None:
    evaluator = evaluator_of(tiny_prepared)
    traces = [evaluator.run(Fixed(b).bind(policy_context(tiny_prepared))) for b in (3, 4, 5, 6, 8)]
    kls = [float(trace.output_kl_nats.mean()) for trace in traces]
    speeds = [trace.speedup for trace in traces]
    assert kls == sorted(kls, reverse=True)
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] == pytest.approx(1.0)
    evaluator.close()
    with pytest.raises(RuntimeError, match="closed"):
        evaluator.run(Fixed(8).bind(policy_context(tiny_prepared)))


def test_bootstrap_covers_a_known_mean() -> None:
    """The nominal 95% on skewed data of 40 sequences: exponential, mean 1."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    widths = []
    for _ in range(200):
        values = torch.empty(40, dtype=torch.float64).exponential_(generator=generator)
        low, high = bootstrap_interval(values)
        covered += low <= 1 <= high
        widths.append(high - low)
    assert 0.88 <= covered / 200 <= 0.98
    assert sum(widths) / 200 == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.1)
    assert bootstrap_interval(torch.full((5,), 0.3, dtype=torch.float64)) == pytest.approx((0.3, 0.3))
    assert bootstrap_interval(values) == bootstrap_interval(values)
