"""Names of relative error, and where there is no place for it."""

from __future__ import annotations

import pytest

from flexquant_rl.agents.policies.families import parse_policy
from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.relative_error import RelativeError, parse_in_flight
from flexquant_rl.engine.errors import InputError


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("relative-error:0.5", RelativeError(0.5)),
        ("relative-error:0", RelativeError(0.0)),
        ("relative-error:0.25,low=3.45,high=6", RelativeError(0.25, 3.45, 6.0)),
        ("relative-error:high=8,share_high=1", RelativeError(1.0, high=8)),
    ],
)
def test_names_mean_parameters_and_back(name: str, policy: RelativeError) -> None:
    assert parse_in_flight(name) == policy
    assert parse_in_flight(policy_name(policy)) == policy


@pytest.mark.parametrize("name", ["fixed:4", "draft:3", "my_policies:Mine", "relative:0.5", ""])
def test_other_names_are_others(name: str) -> None:
    assert parse_in_flight(name) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("relative-error", "share_high is missing; write e.g. relative-error:0.5"),
        ("relative-error:4.5", "share_high=4.5 is no share of the tokens; choose one from 0 to 1"),
        ("relative-error:-0.1", "share_high=-0.1 is no share"),
        ("relative-error:nan", "is not finite; write e.g. share_high=0.5"),
        ("relative-error:0.5,low=5,high=4", "low=5 must be below high=4"),
        ("relative-error:0.5,low=0", "low=0 is no width"),
        ("relative-error:0.5,mean=4", "unknown key 'mean'; relative-error has share_high, low, high"),
    ],
)
def test_mistakes_are_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_in_flight(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_serves_it() -> None:
    with pytest.raises(InputError, match="chooses within the pass, which no decoder does; compare it with fq evaluate"):
        parse_policy("relative-error:0.5")
