"""The entropy threshold: the surer, the lower; least sensitive units first; hysteresis; one way."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from fake_session import FakeModel
from policy_checks import check_protocol, fake_context
from policy_checks import signals_of as signals_by_schema
from torch import Tensor

from flexquant_rl.agents.policies.entropy import EntropyThreshold
from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.errors import InputError

CONTEXT = fake_context()
# Least sensitive unit first.
ORDER = CONTEXT.profile.sensitivity[:, CONTEXT.profile.bit_widths.index(4)].argsort(stable=True)


def signals_of(entropy_nats: Tensor, *, last_widths: Tensor | None = None, tokens_decoded: int = 0) -> Tensor:
    return signals_by_schema(CONTEXT.schema, entropy_nats, last_widths=last_widths, tokens_decoded=tokens_decoded)


def num_low(widths: Tensor) -> Tensor:
    return (widths == 4).sum(-1)


@pytest.mark.parametrize("threshold", [1.5, -2.0])
def test_protocol(threshold: float) -> None:
    check_protocol(EntropyThreshold(threshold))


def test_units_are_ranked_and_their_number_falls() -> None:
    policy = EntropyThreshold(1.5).bind(CONTEXT)
    low = num_low(policy(signals_of(torch.linspace(0, 4, 41))).bit_widths)
    assert (low.diff() <= 0).all()  # the surer, the lower
    assert int(low[0]) == 4
    assert int(low[-1]) == 0
    assert int(num_low(policy(signals_of(torch.tensor([1.5]))).bit_widths)) == 2
    # Those that go low first are the ones whose low width costs least.
    widths = policy(signals_of(torch.tensor([1.5]))).bit_widths[0]
    assert widths[ORDER[:2]].tolist() == [4, 4]
    assert widths[ORDER[2:]].tolist() == [8, 8]


@pytest.mark.parametrize(("threshold", "low"), [(0.5, 0), (2.5, 2), (4.5, 4)])
def test_the_threshold_shifts_the_range(threshold: float, low: int) -> None:
    policy = EntropyThreshold(threshold).bind(CONTEXT)
    assert int(num_low(policy(signals_of(torch.tensor([2.5]))).bit_widths)) == low


@pytest.mark.parametrize(("spread", "low"), [(0.5, 0), (2.0, 1), (8.0, 2)])
def test_the_spread_widens_the_range(spread: float, low: int) -> None:
    policy = EntropyThreshold(1.5, spread_nats=spread).bind(CONTEXT)
    assert int(num_low(policy(signals_of(torch.tensor([2.0]))).bit_widths)) == low


def widths_with(count: int) -> Tensor:
    """Last widths `[1, U]` with the `count` least sensitive units low."""
    widths = torch.full((1, 4), 8)
    widths[0, ORDER[:count]] = 4
    return widths


def test_hysteresis_ignores_small_changes() -> None:
    policy = EntropyThreshold(1.5).bind(CONTEXT)
    at = {count: torch.tensor([2.5 - count / 2]) for count in range(5)}  # the entropy that wants `count` low units
    for before in range(5):
        for wanted in range(5):
            signals = signals_of(at[wanted], last_widths=widths_with(before), tokens_decoded=2)
            expected = wanted if abs(wanted - before) > 1 else before
            assert int(num_low(policy(signals).bit_widths)) == expected
    fresh = signals_of(at[1], last_widths=widths_with(0))
    assert int(num_low(policy(fresh).bit_widths)) == 1  # nothing to hold on to at an episode's first step
    lively = EntropyThreshold(1.5, hysteresis_units=0).bind(CONTEXT)
    assert int(num_low(lively(signals_of(at[3], last_widths=widths_with(2), tokens_decoded=2)).bit_widths)) == 3


def episode(policy: Policy, entropies: list[float]) -> Iterator[int]:
    """Numbers of low units of one row, step by step."""
    last = torch.full((1, 4), 8)
    for position, entropy in enumerate(entropies):
        last = policy(signals_of(torch.tensor([entropy]), last_widths=last, tokens_decoded=position)).bit_widths
        yield int(num_low(last))


def test_one_way_never_returns_within_an_episode() -> None:
    entropies = [4.0, 1.5, 4.0, 0.0, 4.0, 4.0]
    both = EntropyThreshold(1.5).bind(CONTEXT)
    one_way = EntropyThreshold(1.5, one_way=True).bind(CONTEXT)
    assert list(episode(both, entropies)) == [0, 2, 0, 4, 0, 0]
    assert list(episode(one_way, entropies)) == [0, 2, 2, 4, 4, 4]
    assert list(episode(one_way, [4.0])) == [0]
    # A restarted row: the position is zero again and the last widths are full.
    assert int(num_low(one_way(signals_of(torch.tensor([4.0]), tokens_decoded=0)).bit_widths)) == 0


def test_other_widths() -> None:
    context = fake_context(FakeModel(bit_widths=(3, 6, 8)))
    for threshold, width in ((99.0, 3), (-99.0, 6)):
        policy = EntropyThreshold(threshold, low_width=3, high_width=6).bind(context)
        assert set(policy(torch.zeros(2, context.schema.dim)).bit_widths.flatten().tolist()) == {width}
    with pytest.raises(InputError, match="'entropy:1.5': width 4 is not stored; choose one of 3, 6, 8"):
        EntropyThreshold(1.5).bind(context)
    with pytest.raises(InputError, match="'entropy:1.5,low_width=3,high_width=7': width 7 is not stored"):
        EntropyThreshold(1.5, low_width=3, high_width=7).bind(context)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold_nats": math.inf}, "threshold_nats=inf is not finite"),
        ({"spread_nats": 0.0}, "spread_nats=0 is not a finite range"),
        ({"spread_nats": -1.0}, "spread_nats=-1 is not a finite range"),
        ({"spread_nats": math.nan}, "spread_nats=nan is not a finite range"),
        ({"hysteresis_units": -1}, "hysteresis_units=-1 must be 0 to"),
        ({"hysteresis_units": 10**30}, "must be 0 to"),
        ({"low_width": 0}, "low_width=0 is no width"),
        ({"high_width": 9}, "high_width=9 is no width"),
        ({"low_width": 8}, "low_width=8 must be below high_width=8"),
    ],
)
def test_no_policy_of_any_model(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        EntropyThreshold(**({"threshold_nats": 1.5} | parameters))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
