"""Oracles give bits to what was measured to need them, meet their budget, and report what has really been run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.evaluate import Evaluator, Trace
from flexquant_rl.agents.evaluation.in_flight import Choose, trace_in_flight
from flexquant_rl.agents.evaluation.influence import Influence
from flexquant_rl.agents.evaluation.oracle import text_influence, token_oracle, unit_oracle
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.engine.control.decision import Decision

BUDGETS = (0.5, 0.6, 0.75)


@dataclass(frozen=True)
class Bounds:
    """Both oracles on the same text."""

    tokens: Trace
    units: Trace


def known_widths(widths: Tensor) -> Callable[[slice], Choose]:
    """Chooses what is given, `[U, S, T]`."""
    return lambda rows: lambda unit_idx, inputs: widths[unit_idx, rows]


@pytest.fixture(scope="module")
def measured(tiny_prepared: Prepared) -> Influence:
    return text_influence(tiny_prepared, tiny_prepared.windows.test, num_samples=64)


@pytest.fixture(scope="module", params=BUDGETS)
def bounds(tiny_prepared: Prepared, measured: Influence, request: pytest.FixtureRequest) -> tuple[float, Bounds]:
    windows, budget = tiny_prepared.windows.test, request.param
    return budget, Bounds(
        token_oracle(tiny_prepared, windows, measured.tokens, budget),
        unit_oracle(tiny_prepared, windows, measured.units, budget),
    )


def test_time_budget_is_met_over_all_sequences(bounds: tuple[float, Bounds]) -> None:
    budget, found = bounds
    for trace, slack in ((found.tokens, 0.02), (found.units, 0.01)):
        assert budget - slack < 1 / trace.speedup <= budget + 1e-6


def test_what_is_chosen(tiny_prepared: Prepared, bounds: tuple[float, Bounds]) -> None:
    """Whole tokens have allocations of the front; units choose by themselves."""
    budget, found = bounds
    front = {tuple(one) for one in tiny_prepared.front.bit_widths.tolist()}
    chosen = {tuple(one) for one in found.tokens.bit_widths.flatten(0, 1).tolist()}
    assert chosen <= front
    assert len(chosen) > 1
    assert found.units.bit_widths.shape == (8, 12, tiny_prepared.model.num_units)
    if budget == 0.6:
        assert all(len(widths.unique()) > 1 for widths in found.units.bit_widths.unbind(-1))


def test_tokens_of_more_influence_get_no_less_time(
    tiny_prepared: Prepared, measured: Influence, bounds: tuple[float, Bounds]
) -> None:
    order = measured.tokens.flatten().argsort()
    times = tiny_prepared.cost.time_share(bounds[1].tokens.bit_widths.flatten(0, 1))[order]
    assert (times.diff() >= 0).all()


@pytest.mark.parametrize("which", ["tokens", "units"])
def test_better_than_the_same_widths_at_other_tokens(
    tiny_prepared: Prepared, bounds: tuple[float, Bounds], which: str
) -> None:
    """The very mix of widths, shuffled over the tokens, has more KL."""
    trace: Trace = getattr(bounds[1], which)
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_units = trace.mean_bit_width.numel(), trace.bit_widths.shape[-1]
    kl = []
    for _ in range(4):
        orders = [torch.randperm(num_tokens, generator=generator) for _ in range(num_units)]
        shuffled = [
            widths.flatten()[orders[unit if which == "units" else 0]].view(widths.shape)
            for unit, widths in enumerate(trace.bit_widths.unbind(-1))
        ]
        other = trace_in_flight(tiny_prepared, tiny_prepared.windows.test, known_widths(torch.stack(shuffled)))
        assert other.speedup == pytest.approx(trace.speedup)
        kl.append(float(other.output_kl_nats.mean()))
    assert float(trace.output_kl_nats.mean()) < min(kl)


def test_what_is_reported_is_what_decoding_gives(tiny_prepared: Prepared, bounds: tuple[float, Bounds]) -> None:
    """The same widths, step by step."""
    trace = bounds[1].tokens

    class Recorded:
        name = "recorded"

        def __init__(self, widths: Tensor) -> None:
            self._steps = iter(widths.unbind(1))

        def __call__(self, signals: Tensor) -> Decision:
            return Decision(next(self._steps))

    windows = tiny_prepared.windows.test
    real = Evaluator(tiny_prepared.model, tiny_prepared.profile, windows, tiny_prepared.env).run(
        Recorded(trace.bit_widths)
    )
    torch.testing.assert_close(real.output_kl_nats, trace.output_kl_nats, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(real.token_nll_nats, trace.token_nll_nats, atol=2e-4, rtol=1e-4)
    assert torch.equal(real.top1_agreement, trace.top1_agreement)
    torch.testing.assert_close(real.mean_bit_width, trace.mean_bit_width)


def test_equal_seeds_measure_alike(tiny_prepared: Prepared) -> None:
    windows = tiny_prepared.windows.test[:2]
    same, again, other = (text_influence(tiny_prepared, windows, num_samples=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(same.units, again.units)
    assert torch.equal(same.tokens, again.tokens)
    assert not torch.equal(same.tokens, other.tokens)
