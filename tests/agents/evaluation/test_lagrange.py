"""Widths by a Lagrange multiplier: the best of all choices in their time, and the budget is met."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flexquant_rl.agents.evaluation.lagrange import Lagrange, centred
from flexquant_rl.agents.preparation import Prepared

WIDTHS = torch.tensor([3, 4, 8])
SENSITIVITY = torch.tensor([[0.4, 0.1, 0.0], [0.2, 0.05, 0.0]], dtype=torch.float64)
TIME = torch.tensor([[0.1, 0.2, 0.45], [0.15, 0.2, 0.45]], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_better_in_the_same_time(seed: int) -> None:
    lagrange = Lagrange(SENSITIVITY, TIME, WIDTHS, 0.1)
    generator = torch.Generator().manual_seed(seed)
    logs = [torch.randn(2, generator=generator) for _ in range(2)]
    multiplier = float(torch.rand((), generator=generator)) + 0.1
    columns = [torch.searchsorted(WIDTHS, lagrange.widths(unit, logs[unit], multiplier)) for unit in range(2)]

    def outcome(chosen: list[torch.Tensor]) -> tuple[float, float]:
        kl = sum(float((logs[unit].double().exp() * SENSITIVITY[unit][chosen[unit]]).sum()) for unit in range(2))
        return kl, sum(float(TIME[unit][chosen[unit]].sum()) for unit in range(2))

    kl, time = outcome(columns)
    assert lagrange.time_share(logs, multiplier) == pytest.approx(0.1 + time / 2)
    for one in itertools.product(range(3), repeat=4):
        other_kl, other_time = outcome([torch.tensor(one[:2]), torch.tensor(one[2:])])
        assert other_time > time + 1e-9 or other_kl >= kl - 1e-9


@pytest.mark.parametrize("budget", [0.55, 0.7, 0.9])
def test_budget_is_met_from_below(tiny_prepared: Prepared, budget: float) -> None:
    lagrange = Lagrange.of(tiny_prepared)
    generator = torch.Generator().manual_seed(1)
    logs = [torch.randn(40, 20, generator=generator) for _ in tiny_prepared.model.units]
    share = lagrange.time_share(logs, lagrange.meet(logs, budget))
    assert budget - 0.005 < share <= budget


def test_ends_take_what_the_widths_take(tiny_prepared: Prepared) -> None:
    lagrange, cost = Lagrange.of(tiny_prepared), tiny_prepared.cost
    logs = [torch.zeros(3) for _ in tiny_prepared.model.units]
    assert lagrange.time_share(logs, 0.0) == pytest.approx(1.0)
    lowest = torch.full((len(logs),), min(tiny_prepared.model.bit_widths))
    assert lagrange.time_share(logs, 1e9) == pytest.approx(float(cost.time_share(lowest)))


def test_centred_multiples_have_a_mean_of_one() -> None:
    logs = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    assert float(centred(logs).double().exp().mean()) == pytest.approx(1)
    assert math.isclose(float((centred(logs) - logs).std()), 0, abs_tol=1e-6)
