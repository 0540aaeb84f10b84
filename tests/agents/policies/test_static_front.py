"""The knapsack against trying everything, and what the front answers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_profile, fake_windows
from torch import Tensor

from flexquant_rl.agents.policies.static_front import StaticFront, static_front
from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.errors import InputError

WIDTHS = (3, 4, 6, 8)


def random_profile(seed: int, num_units: int = 4, *, integer_times: bool = False, measured: bool = False) -> Profile:
    """Sensitivities and times that are not even monotone in the width, as noisy measurements may be."""
    generator = torch.Generator().manual_seed(seed)
    unit_ms = torch.rand(num_units, len(WIDTHS), generator=generator, dtype=torch.float64)
    if integer_times:  # sums that tie, and 0.1 that is not exact in binary
        unit_ms = torch.tensor([3, 4, 6, 8], dtype=torch.float64).expand(num_units, -1) * 0.1
    if measured:  # relative to the widest: zero there and negative elsewhere
        unit_ms = unit_ms.sort(-1).values
        unit_ms = unit_ms - unit_ms[:, -1:]
    sensitivity = torch.rand(num_units, len(WIDTHS), generator=generator).pow(4)
    if integer_times or measured:
        sensitivity = sensitivity.sort(-1, descending=True).values
    cost = CostTable("roofline", 4.0, unit_ms, WIDTHS, "random", "cpu", 1)
    return Profile(cost, sensitivity, WIDTHS, "random", 1, "unquantised")


def all_allocations(profile: Profile) -> tuple[Tensor, Tensor, Tensor]:
    """Every allocation `[n, U]`, its latency and its sum of sensitivities."""
    num_units = len(profile.sensitivity)
    columns = torch.tensor(list(itertools.product(range(len(WIDTHS)), repeat=num_units)))
    widths = torch.tensor(WIDTHS)[columns]
    kl = profile.sensitivity.double()[torch.arange(num_units), columns].sum(-1)
    return widths, profile.cost.latency_ms(widths), kl


def brute_force_front(profile: Profile) -> list[tuple[float, float]]:
    """`(latency, KL)` of the allocations that none beats in one without losing in the other, fastest first."""
    _, latency, kl = all_allocations(profile)
    points = sorted((round(time, 9), loss) for time, loss in zip(latency.tolist(), kl.tolist(), strict=True))
    front: list[tuple[float, float]] = []
    for time, loss in points:
        if not front or loss < front[-1][1]:
            front.append((time, loss))
    return front


def front_points(profile: Profile, front: StaticFront) -> list[tuple[float, float]]:
    latency = profile.cost.latency_ms(front.bit_widths).tolist()
    return list(zip(latency, front.output_kl_nats.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["random", "integer_times", "measured"])
def test_dynamic_programming_equals_brute_force(seed: int, kind: str) -> None:
    profile = random_profile(seed, 2 + seed % 3, integer_times=kind == "integer_times", measured=kind == "measured")
    front = static_front(profile, torch.ones(2 + seed % 3), num_points=10_000)
    expected = brute_force_front(profile)
    found = front_points(profile, front)
    assert len(found) == len(expected)
    for (time, kl), (best_time, best_kl) in zip(found, expected, strict=True):
        assert time == pytest.approx(best_time, abs=1e-7)
        assert kl == pytest.approx(best_kl, abs=1e-12)
    # The widths are those of the points, not merely points that exist.
    sums = profile.sensitivity.double()[
        torch.arange(len(profile.sensitivity)), torch.searchsorted(torch.tensor(WIDTHS), front.bit_widths)
    ].sum(-1)
    torch.testing.assert_close(front.output_kl_nats, sums)
    torch.testing.assert_close(front.time_share, profile.cost.time_share(front.bit_widths))


@pytest.mark.parametrize("seed", range(4))
def test_front_falls_strictly_in_both(seed: int) -> None:
    for front in (
        static_front(random_profile(seed, integer_times=True), torch.ones(4), num_points=1000),
        static_front(random_profile(seed, 6), torch.ones(6)),
    ):
        assert (front.time_share.diff() > 0).all()
        assert (front.output_kl_nats.diff() < 0).all()
        low, high = front.dial_range()
        assert 0 < low <= high < float("inf")


@pytest.mark.parametrize("seed", range(4))
def test_allocate_maximises_the_reward(seed: int) -> None:
    profile = random_profile(seed, 4)
    front = static_front(profile, torch.ones(4), num_points=10_000)
    widths, latency, kl = all_allocations(profile)
    time_saved = 1 - latency / profile.cost.latency_ms(profile.cost.full_width())
    dials = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 1000.0])
    chosen = front.allocate(dials)
    assert chosen.shape == (7, 4)
    assert chosen.dtype == torch.int64
    for dial, allocation in zip(dials.tolist(), chosen, strict=True):
        rewards = time_saved - dial * kl
        index = int((widths == allocation).all(-1).nonzero())
        assert float(rewards[index]) == pytest.approx(float(rewards.max()), abs=1e-9)


def test_allocate_moves_from_fast_to_exact_over_the_dial_range() -> None:
    model = FakeModel()
    front = static_front(fake_profile(model), model.unit_weights)
    low, high = front.dial_range()
    dials = torch.logspace(torch.tensor(low).log10(), torch.tensor(high).log10(), 9)
    mean = model.mean_bit_width(front.allocate(dials))
    assert (mean.diff() >= 0).all()
    assert float(mean[-1] - mean[0]) > 1
    assert front.allocate(torch.tensor([1e-6]))[0].tolist() == [3, 3, 3, 3]
    assert front.allocate(torch.tensor([1e9]))[0].tolist() == [8, 8, 8, 8]


@pytest.mark.parametrize("seed", range(4))
def test_envelope_has_what_every_price_picks(seed: int) -> None:
    front = static_front(random_profile(seed, 8), torch.ones(8), num_points=60)
    widths, prices = front.envelope()
    assert (prices.diff() > 0).all()
    dials = torch.logspace(-4, 6, 400, dtype=torch.float64)
    expected = front.allocate(dials)
    assert torch.equal(widths[torch.bucketize(dials, prices, right=True)], expected)
    assert set(map(tuple, widths.tolist())) == set(map(tuple, front.allocate(torch.logspace(-6, 8, 20_000)).tolist()))


def test_dial_range_reaches_the_time_that_is_asked_for() -> None:
    front = static_front(random_profile(2, 8), torch.ones(8))
    low, high = front.dial_range()
    fastest, usual = front.time_share[0].item(), front.time_share[front.best(torch.tensor([low]))].item()
    assert fastest < usual
    for asked in (fastest, (fastest + usual) / 2):
        lower, same = front.dial_range(asked)
        assert (lower < low, same) == (True, high)
        assert float(front.time_share[front.best(torch.tensor([lower]))]) <= asked
    # What the range reaches anyway, and what no allocation does, change nothing.
    assert front.dial_range(1.0) == front.dial_range(fastest / 2) == (low, high)


def test_thinning_keeps_the_ends() -> None:
    profile = random_profile(1, 6, integer_times=True)
    whole = static_front(profile, torch.ones(6), num_points=10_000)
    thin = static_front(profile, torch.ones(6), num_points=5)
    assert 2 < len(thin.time_share) <= 5 < len(whole.time_share)
    for index in (0, -1):
        assert thin.bit_widths[index].tolist() == whole.bit_widths[index].tolist()
    points = set(map(tuple, whole.bit_widths.tolist()))
    assert all(tuple(widths) in points for widths in thin.bit_widths.tolist())


def test_nearest_by_parameter_weighted_mean() -> None:
    model = FakeModel()
    front = static_front(fake_profile(model), model.unit_weights, num_points=1000)
    torch.testing.assert_close(front.mean_bit_width.float(), model.mean_bit_width(front.bit_widths))
    for mean in (3.0, 4.2, 5.0, 7.9):
        distance = (model.mean_bit_width(front.nearest(mean)[None]) - mean).abs()
        assert float(distance) <= float((front.mean_bit_width - mean).abs().min()) + 1e-6
    assert front.nearest(0.0).tolist() == [3, 3, 3, 3]
    assert front.nearest(99.0).tolist() == [8, 8, 8, 8]


def test_measured_on_replaces_sums_by_what_text_shows() -> None:
    model = FakeModel(carry=0.5)
    front = static_front(fake_profile(model), model.unit_weights, num_points=20)
    windows = fake_windows(6, 12)
    measured = front.measured_on(FakeSession(model), windows, first=4)
    assert 1 < len(measured.time_share) <= len(front.time_share)
    assert (measured.time_share.diff() > 0).all()
    assert (measured.output_kl_nats.diff() < 0).all()
    for widths, kl in zip(measured.bit_widths, measured.output_kl_nats.tolist(), strict=True):
        per_token = widths.expand(6, 12, -1).clone()
        per_token[:, :4] = 8  # the prompt is read at the largest width
        own = model.own_kl_nats(windows, per_token)
        past, total = torch.zeros(6, dtype=torch.float64), []
        for position in range(12):
            past = own[:, position] + 0.5 * past
            total.append(past)
        assert kl == pytest.approx(float(torch.stack(total, 1)[:, 4:].mean()), rel=1e-3, abs=1e-6)


def test_measured_on_drops_dominated_points() -> None:
    """Sensitivities that are wrong about which unit matters: some allocations turn out slower and no better."""
    model = FakeModel()
    windows = torch.full((3, 10), 5)  # class 1, which needs unit 1
    wrong = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values
    front = static_front(replace(fake_profile(model), sensitivity=wrong), model.unit_weights, num_points=1000)
    measured = front.measured_on(FakeSession(model), windows, first=2)
    assert len(measured.time_share) < len(front.time_share)
    own = model.own_kl_nats(torch.tensor(5), front.bit_widths)
    best = float("inf")
    expected = []
    for widths, kl in zip(front.bit_widths.tolist(), own.tolist(), strict=True):
        if kl < best * (1 - 1e-5):
            expected.append(widths)
        best = min(best, kl)
    assert measured.bit_widths.tolist() == expected


def test_prompts_are_read_at_the_models_largest_width() -> None:
    """Also where no allocation of the front has that width."""
    model = FakeModel(carry=0.9)
    whole = static_front(fake_profile(model), model.unit_weights, num_points=1000)
    fast = StaticFront(
        *(getattr(whole, name)[:1] for name in ("bit_widths", "time_share", "output_kl_nats")), torch.ones(1)
    )
    assert int(fast.bit_widths.max()) == 3
    windows = fake_windows(4, 6)
    at_eight = torch.full((4, 6, 4), 8)
    at_eight[:, 5:] = 3
    own = model.own_kl_nats(windows, at_eight)
    expected = torch.zeros(4, dtype=torch.float64)
    for position in range(6):
        expected = own[:, position] + 0.9 * expected
    measured = fast.measured_on(FakeSession(model), windows, first=5)
    assert float(measured.output_kl_nats) == pytest.approx(float(expected.mean()), rel=1e-3)


def test_marginal_rewards_are_those_of_changed_allocations() -> None:
    model = FakeModel()
    profile = fake_profile(model)
    front = static_front(profile, model.unit_weights, num_points=1000)
    dials = torch.tensor([2.0, 8.0])
    marginal = front.marginal_rewards(profile, dials)
    assert marginal.shape == (2, 4, 5)

    def reward(widths: list[int], dial: float) -> float:
        columns = [model.bit_widths.index(width) for width in widths]
        kl = float(profile.sensitivity.double()[torch.arange(4), columns].sum())
        return -float(profile.cost.time_share(torch.tensor(widths))) - dial * kl

    for row, dial in enumerate(dials.tolist()):
        base = front.allocate(dials)[row].tolist()
        for unit in range(4):
            for column, width in enumerate(model.bit_widths):
                changed = [*base[:unit], width, *base[unit + 1 :]]
                expected = reward(changed, dial) - reward(base, dial)
                assert float(marginal[row, unit, column]) == pytest.approx(expected, abs=1e-6)
    assert float(marginal.max()) <= 1e-6  # no single change beats the best allocation


def test_one_allocation_has_no_dial() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(InputError, match="only one allocation"):
        StaticFront(torch.tensor([[8, 8]]), one, one, one).dial_range()
