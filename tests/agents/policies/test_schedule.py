"""The schedule: high for the first tokens, low after them, from static allocations of any mean."""

from __future__ import annotations

import pytest
import torch
from policy_checks import check_protocol, fake_context, signals_of

from flexquant_rl.agents.policies.schedule import Schedule
from flexquant_rl.engine.errors import InputError


@pytest.mark.parametrize("policy", [Schedule(2), Schedule(3, high=4.6, low=3.4)])
def test_protocol(policy: Schedule) -> None:
    check_protocol(policy)


def test_the_width_falls_once_after_the_first_tokens() -> None:
    context = fake_context()
    signals = signals_of(context.schema, torch.zeros(5), tokens_decoded=torch.arange(5))
    for first in range(6):
        widths = Schedule(first, high=6).bind(context)(signals).bit_widths
        assert widths[:, 0].tolist() == [6] * first + [4] * (5 - first)
        assert (widths == widths[:, :1]).all()


def test_means_between_widths_are_points_of_the_front() -> None:
    context = fake_context()
    signals = signals_of(context.schema, torch.zeros(2), tokens_decoded=torch.tensor([0, 1]))
    high, low = Schedule(1, high=5.4, low=3.7).bind(context)(signals).bit_widths
    assert torch.equal(high, context.front.nearest(5.4))
    assert torch.equal(low, context.front.nearest(3.7))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"first": -1}, "first=-1 must be 0 to 1000000 tokens"),
        ({"high": 9}, "high=9 is no width"),
        ({"low": 0.5}, "low=0.5 is no width"),
        ({"low": 8}, "low=8 must be below high=8"),
    ],
)
def test_no_policy_of_any_model(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule(**({"first": 2} | parameters))  # type: ignore[arg-type]


def test_widths_that_are_not_stored() -> None:
    with pytest.raises(InputError, match="'schedule:2,low=7': width 7 is not stored"):
        Schedule(2, low=7).bind(fake_context())
    with pytest.raises(InputError, match="'schedule:2,low=2.5': mean width 2.5 is outside the stored widths 3 to 8"):
        Schedule(2, low=2.5).bind(fake_context())
