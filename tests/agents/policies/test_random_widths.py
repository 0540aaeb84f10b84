"""Random widths: the promised mean, from the widths beside it, by draws of its own."""

from __future__ import annotations

import math

import pytest
import torch
from policy_checks import check_protocol, fake_context

from flexquant_rl.agents.policies.random_widths import RandomWidths
from flexquant_rl.engine.errors import InputError


@pytest.mark.parametrize("mean", [3.5, 4.0])
def test_protocol(mean: float) -> None:
    check_protocol(RandomWidths(mean))


@pytest.mark.parametrize(("mean", "allowed"), [(3.5, {3, 4}), (4.0, {4}), (7.0, {6, 8}), (6.5, {6, 8}), (8.0, {8})])
def test_the_mean_is_reached_by_neighbouring_widths(mean: float, allowed: set[int]) -> None:
    context = fake_context()
    widths = RandomWidths(mean).bind(context)(torch.zeros(5000, context.schema.dim)).bit_widths
    assert set(widths.flatten().tolist()) == allowed
    assert float(widths.double().mean()) == pytest.approx(mean, abs=0.03)
    per_unit = widths.double().mean(0)
    torch.testing.assert_close(per_unit, torch.full((4,), mean, dtype=torch.float64), atol=0.05, rtol=0)


def test_draws_are_seeded_and_made_anew() -> None:
    context = fake_context()
    signals = torch.zeros(16, context.schema.dim)
    first, again, other = (RandomWidths(3.5, seed=seed).bind(context) for seed in (1, 1, 2))
    draws = [first(signals).bit_widths for _ in range(3)]
    assert all(torch.equal(draw, again(signals).bit_widths) for draw in draws)
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], other(signals).bit_widths)
    state = torch.get_rng_state()
    first(signals)
    assert torch.equal(state, torch.get_rng_state())  # training's generator is left alone


def test_the_draws_are_those_of_published_tables() -> None:
    """Tables give the random policy to the last digit, so every call must draw what it always drew."""
    context = fake_context()
    policy = RandomWidths(4.5).bind(context)
    generator = torch.Generator().manual_seed(0)
    for num_rows in (3, 1, 5):
        draws = torch.rand(num_rows, 4, generator=generator)
        widths = policy(torch.zeros(num_rows, context.schema.dim)).bit_widths
        assert torch.equal(widths, torch.where(draws < 0.5, 5, 4))


@pytest.mark.parametrize("mean", [0.9, 8.1, math.nan])
def test_no_mean_of_any_model(mean: float) -> None:
    with pytest.raises(InputError, match="is no width, which is from 1 to 8"):
        RandomWidths(mean)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_no_seed(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed={seed} seeds nothing"):
        RandomWidths(4.5, seed)


def test_a_mean_outside_the_stored_widths() -> None:
    with pytest.raises(InputError, match="'random:2.9': mean width 2.9 is outside the stored widths 3 to 8"):
        RandomWidths(2.9).bind(fake_context())
