"""Heuristic policies: stored widths only, the promised means and orders, and one-line errors for wrong names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_profile, fake_windows
from torch import Tensor

from flexquant_rl.agents.policies.baselines import (
    EntropyThreshold,
    PolicyContext,
    RandomWidths,
    entropy_threshold,
    make_policy,
)
from flexquant_rl.agents.policies.static_front import static_front
from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.batch import DecodeBatch
from flexquant_rl.fq_env.task import EnvConfig

MODEL = FakeModel()
PROFILE = fake_profile(MODEL)
SCHEMA = SignalSchema(MODEL.num_units, MODEL.bit_widths)
CONTEXT = PolicyContext(PROFILE, static_front(PROFILE, MODEL.unit_weights, num_points=1000), SCHEMA, MODEL.fingerprint)
NAMES = ["fixed:3", "fixed:8", "knapsack:3", "knapsack:4.5", "random:3.5", "random:4", "entropy:1.5", "entropy:-2"]


def signals_of(entropy_nats: Tensor, *, last_widths: Tensor | None = None, position: float = 0.0) -> Tensor:
    """Signals `[B, dim]` with a given smoothed entropy, last widths (default: 8) and position."""
    signals = torch.zeros(len(entropy_nats), SCHEMA.dim)
    signals[:, SCHEMA.index("token_entropy_ema")] = entropy_nats / 4
    signals[:, SCHEMA.index("position")] = position
    per_unit = signals[:, SCHEMA.num_global :].view(len(signals), SCHEMA.num_units, SCHEMA.num_per_unit)
    per_unit[..., SCHEMA.index_in_unit("last_width")] = 1.0 if last_widths is None else last_widths / 8
    return signals


@pytest.mark.parametrize("name", NAMES)
def test_protocol(name: str) -> None:
    """On a real batch of episodes: `[B, U]` int64 of stored widths, whatever the number of rows."""
    policy: Policy = make_policy(name, CONTEXT)
    assert policy.name == name
    config = EnvConfig(prompt_tokens=3, max_new_tokens=6)
    batch = DecodeBatch(FakeSession(MODEL, num_rows=5), PROFILE, config, num_rows=5)
    rows = torch.arange(5)
    batch.reset(rows, fake_windows(5, config.window_tokens), torch.full((5,), 4.0), torch.zeros_like(rows))
    for _ in range(6):
        widths = policy(batch.signals()).bit_widths
        assert widths.shape == (5, 4)
        assert widths.dtype == torch.int64
        assert set(widths.flatten().tolist()) <= set(MODEL.bit_widths)
        batch.step(widths)
    assert policy(batch.signals()[:1]).bit_widths.shape == (1, 4)


def test_fixed_and_knapsack_ignore_the_signals() -> None:
    signals = torch.randn(7, SCHEMA.dim)
    assert (make_policy("fixed:5", CONTEXT)(signals).bit_widths == 5).all()
    widths = make_policy("knapsack:5", CONTEXT)(signals).bit_widths
    assert (widths == CONTEXT.front.nearest(5.0)).all()


@pytest.mark.parametrize(("mean", "allowed"), [(3.5, {3, 4}), (4.0, {4}), (7.0, {6, 8}), (6.5, {6, 8}), (8.0, {8})])
def test_random_mean_is_reached_by_neighbouring_widths(mean: float, allowed: set[int]) -> None:
    widths = RandomWidths(PROFILE, mean)(torch.zeros(5000, SCHEMA.dim)).bit_widths
    assert set(widths.flatten().tolist()) == allowed
    assert float(widths.double().mean()) == pytest.approx(mean, abs=0.03)
    per_unit = widths.double().mean(0)
    torch.testing.assert_close(per_unit, torch.full((4,), mean, dtype=torch.float64), atol=0.05, rtol=0)


def test_random_is_seeded_and_draws_anew() -> None:
    signals = torch.zeros(16, SCHEMA.dim)
    first, again, other = (RandomWidths(PROFILE, 3.5, seed=seed) for seed in (1, 1, 2))
    draws = [first(signals).bit_widths for _ in range(3)]
    assert all(torch.equal(draw, again(signals).bit_widths) for draw in draws)
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], other(signals).bit_widths)
    state = torch.get_rng_state()
    first(signals)
    assert torch.equal(state, torch.get_rng_state())  # training's generator is left alone


@pytest.mark.parametrize("mean", [2.9, 8.1, float("nan")])
def test_random_outside_the_stored_widths(mean: float) -> None:
    with pytest.raises(InputError, match="outside the stored widths 3 to 8"):
        RandomWidths(PROFILE, mean)


def num_low(widths: Tensor) -> Tensor:
    return (widths == 4).sum(-1)


def test_entropy_ranks_units_and_is_monotone() -> None:
    policy = entropy_threshold(CONTEXT, 1.5)
    entropy = torch.linspace(0, 4, 41)
    low = num_low(policy(signals_of(entropy)).bit_widths)
    assert (low.diff() <= 0).all()  # the surer, the lower
    assert int(low[0]) == 4
    assert int(low[-1]) == 0
    assert int(num_low(policy(signals_of(torch.tensor([1.5]))).bit_widths)) == 2
    # Those that go low first are the ones whose low width costs least.
    order = PROFILE.sensitivity[:, MODEL.bit_widths.index(4)].argsort(stable=True)
    widths = policy(signals_of(torch.tensor([1.5]))).bit_widths[0]
    assert widths[order[:2]].tolist() == [4, 4]
    assert widths[order[2:]].tolist() == [8, 8]


def test_entropy_threshold_shifts_the_range() -> None:
    entropy = torch.tensor([2.5])
    assert int(num_low(entropy_threshold(CONTEXT, 0.5)(signals_of(entropy)).bit_widths)) == 0
    assert int(num_low(entropy_threshold(CONTEXT, 2.5)(signals_of(entropy)).bit_widths)) == 2
    assert int(num_low(entropy_threshold(CONTEXT, 4.5)(signals_of(entropy)).bit_widths)) == 4


def widths_with(count: int) -> Tensor:
    """Last widths `[1, U]` with the `count` least sensitive units low."""
    return torch.where(entropy_threshold(CONTEXT, 1.5).rank < count, 4, 8)[None]


def test_hysteresis_ignores_small_changes() -> None:
    policy = entropy_threshold(CONTEXT, 1.5)
    at = {count: torch.tensor([2.5 - count / 2]) for count in range(5)}  # the entropy that wants `count` low units
    for before in range(5):
        for wanted in range(5):
            signals = signals_of(at[wanted], last_widths=widths_with(before), position=0.3)
            expected = wanted if abs(wanted - before) > 1 else before
            assert int(num_low(policy(signals).bit_widths)) == expected
    fresh = signals_of(at[1], last_widths=widths_with(0))
    assert int(num_low(policy(fresh).bit_widths)) == 1  # nothing to hold on to at an episode's first step
    lively = replace(policy, hysteresis_units=0)
    assert int(num_low(lively(signals_of(at[3], last_widths=widths_with(2), position=0.3)).bit_widths)) == 3


def episode(policy: EntropyThreshold, entropies: list[float]) -> Iterator[int]:
    """Numbers of low units of one row, step by step."""
    last = torch.full((1, 4), 8)
    for position, entropy in enumerate(entropies):
        signals = signals_of(torch.tensor([entropy]), last_widths=last, position=float(position))
        last = policy(signals).bit_widths
        yield int(num_low(last))


def test_one_way_never_returns_within_an_episode() -> None:
    entropies = [4.0, 1.5, 4.0, 0.0, 4.0, 4.0]
    both = entropy_threshold(CONTEXT, 1.5)
    one_way = entropy_threshold(CONTEXT, 1.5, one_way=True)
    assert list(episode(both, entropies)) == [0, 2, 0, 4, 0, 0]
    assert list(episode(one_way, entropies)) == [0, 2, 2, 4, 4, 4]
    assert list(episode(one_way, [4.0])) == [0]
    # A restarted row: the position is zero again and the last widths are full.
    assert int(num_low(one_way(signals_of(torch.tensor([4.0]), position=0.0)).bit_widths)) == 0


def test_entropy_takes_stored_widths() -> None:
    model = FakeModel(bit_widths=(3, 6, 8))
    profile = fake_profile(model)
    schema = SignalSchema(4, model.bit_widths)
    context = PolicyContext(profile, static_front(profile, model.unit_weights), schema, "fake")
    signals = torch.zeros(2, schema.dim)
    assert set(make_policy("entropy:99", context)(signals).bit_widths.flatten().tolist()) == {3}
    assert set(make_policy("entropy:-99", context)(signals).bit_widths.flatten().tolist()) == {8}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fixd:4", "did you mean fixed:4"),
        ("knapsac:4.5", "did you mean knapsack:4.5"),
        ("Random:4", "did you mean random:4"),
        ("fixed", "did you mean fixed:4"),
        ("zzz", "known: fixed:NUMBER, knapsack:NUMBER, random:NUMBER, entropy:NUMBER"),
        ("fixed:four", "'four' is not a number"),
        ("knapsack:", "'' is not a number"),
        ("entropy:nan", "'nan' is not a number"),
        ("random:inf", "'inf' is not a number"),
        ("fixed:7", "width 7 is not stored; choose one of 3, 4, 5, 6, 8"),
        ("fixed:4.5", "width 4.5 is not stored"),
        ("fixed:0", "width 0 is not stored"),
        ("knapsack:2.5", "outside the stored"),
        ("random:9", "outside the stored"),
        ("./no/such/directory", "unknown policy"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        make_policy(name, CONTEXT)
    assert message in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def export(path: Path) -> Path:
    card = PolicyCard(SCHEMA, MODEL.fingerprint, tuple(unit.name for unit in MODEL.units))
    LearnedPolicy(PrecisionNet(SCHEMA), card).save(path, PROFILE)
    return path


def test_directory_of_an_exported_policy(tmp_path: Path) -> None:
    path = export(tmp_path / "exported")
    policy = make_policy(str(path), CONTEXT)
    assert policy(torch.zeros(3, SCHEMA.dim)).bit_widths.shape == (3, 4)
    with pytest.raises(InputError, match="trained for model fake"):
        make_policy(str(path), replace(CONTEXT, model_fingerprint="another"))


@pytest.mark.parametrize("damage", ["no_weights", "half", "json", "empty"])
def test_damaged_directory(tmp_path: Path, damage: str) -> None:
    path = export(tmp_path / "exported")
    weights, card = path / "policy.safetensors", path / "policy.json"
    if damage == "no_weights":
        weights.unlink()
    elif damage == "half":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "json":
        card.write_text(card.read_text()[:50])
    else:
        for file in path.iterdir():
            file.unlink()
    with pytest.raises(InputError) as error:
        make_policy(str(path), CONTEXT)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
