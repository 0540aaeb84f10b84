"""Points of the static front by their mean width. What the front holds is tested in test_static_front.py."""

from __future__ import annotations

import math

import pytest
import torch
from policy_checks import check_protocol, fake_context

from flexquant_rl.agents.policies.knapsack import Knapsack
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.errors import InputError


@pytest.mark.parametrize("mean", [3.0, 4.5, 8.0])
def test_protocol(mean: float) -> None:
    check_protocol(Knapsack(mean))


def test_it_is_the_nearest_point_of_the_front() -> None:
    context = fake_context()
    policy = Knapsack(5.0).bind(context)
    assert isinstance(policy, StaticAllocation), "controllers then need no signals"
    assert policy.name == "knapsack:5"
    assert (policy(torch.randn(7, context.schema.dim)).bit_widths == context.front.nearest(5.0)).all()


@pytest.mark.parametrize("mean", [0.5, 8.1, math.nan])
def test_no_mean_of_any_model(mean: float) -> None:
    with pytest.raises(InputError, match="is no width, which is from 1 to 8"):
        Knapsack(mean)


def test_a_mean_outside_the_stored_widths() -> None:
    with pytest.raises(InputError, match="'knapsack:2.5': mean width 2.5 is outside the stored widths 3 to 8"):
        Knapsack(2.5).bind(fake_context())
