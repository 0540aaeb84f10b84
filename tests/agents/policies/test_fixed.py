"""One width everywhere."""

from __future__ import annotations

import pytest
import torch
from policy_checks import check_protocol, fake_context

from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.errors import InputError


@pytest.mark.parametrize("width", [3, 8])
def test_protocol(width: int) -> None:
    check_protocol(Fixed(width))


def test_the_width_is_everywhere() -> None:
    context = fake_context()
    policy = Fixed(5).bind(context)
    assert isinstance(policy, StaticAllocation), "controllers then need no signals"
    assert policy.name == "fixed:5"
    assert (policy(torch.randn(7, context.schema.dim)).bit_widths == 5).all()


@pytest.mark.parametrize("width", [0, 9, -4])
def test_no_width_of_any_model(width: int) -> None:
    with pytest.raises(InputError, match=f"bit_width={width} is no width, which is from 1 to 8"):
        Fixed(width)


def test_a_width_that_is_not_stored() -> None:
    with pytest.raises(InputError, match="'fixed:7': width 7 is not stored; choose one of 3, 4, 5, 6, 8"):
        Fixed(7).bind(fake_context())
