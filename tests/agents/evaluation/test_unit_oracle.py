"""The oracle of units gives bits to what was measured to need them, and is better than static for it."""

from __future__ import annotations

import pytest
import torch

from flexquant_rl.agents.evaluation.evaluate import Trace
from flexquant_rl.agents.evaluation.in_flight import trace_in_flight
from flexquant_rl.agents.evaluation.unit_oracle import unit_oracle
from flexquant_rl.agents.preparation import Prepared

BUDGET = 0.6


@pytest.fixture(scope="module")
def trace(tiny_prepared: Prepared) -> Trace:
    return unit_oracle(tiny_prepared, tiny_prepared.windows.test, BUDGET, num_samples=64)


def test_time_budget_is_met_over_all_sequences(tiny_prepared: Prepared, trace: Trace) -> None:
    assert BUDGET - 0.01 < 1 / trace.speedup <= BUDGET + 1e-6
    assert trace.bit_widths.shape == (8, 12, tiny_prepared.model.num_units)
    # Tokens and units by themselves: no unit follows another.
    for unit in range(tiny_prepared.model.num_units):
        assert len(trace.bit_widths[..., unit].unique()) > 1


def test_better_than_the_same_widths_at_other_tokens(tiny_prepared: Prepared, trace: Trace) -> None:
    """The very mix of widths, shuffled over the tokens of each unit, has more KL."""
    generator = torch.Generator().manual_seed(0)
    kl = []
    for _ in range(4):
        shuffled = [
            widths.flatten()[torch.randperm(widths.numel(), generator=generator)].view(widths.shape)
            for widths in trace.bit_widths.unbind(-1)
        ]
        other = trace_in_flight(
            tiny_prepared,
            tiny_prepared.windows.test,
            lambda rows, shuffled=shuffled: lambda unit, inputs: shuffled[unit][rows],
        )
        assert other.speedup == pytest.approx(trace.speedup)
        kl.append(float(other.output_kl_nats.mean()))
    assert float(trace.output_kl_nats.mean()) < 0.95 * min(kl)


def test_equal_seeds_choose_alike(tiny_prepared: Prepared) -> None:
    windows = tiny_prepared.windows.test[:2]
    one, other = (unit_oracle(tiny_prepared, windows, BUDGET, num_samples=2, seed=3) for _ in range(2))
    assert torch.equal(one.bit_widths, other.bit_widths)
