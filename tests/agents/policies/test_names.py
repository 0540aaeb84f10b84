"""Names and parameters are two forms of one thing, and what is neither is refused in one line."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexquant_rl.agents.policies.entropy import EntropyThreshold
from flexquant_rl.agents.policies.families import parse_policy
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.knapsack import Knapsack
from flexquant_rl.agents.policies.names import check_parameters, policy_name, read_parameters, usage
from flexquant_rl.agents.policies.random_widths import RandomWidths
from flexquant_rl.agents.policies.unbound import PolicyContext, UnboundPolicy
from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.errors import InputError

WIDTHS, MEANS = st.integers(1, 8), st.floats(1, 8)
NAMES = {
    "fixed:4": Fixed(4),
    "knapsack:4.5": Knapsack(4.5),
    "knapsack:4": Knapsack(4.0),
    "random:4.5": RandomWidths(4.5),
    "random:4.5,seed=3": RandomWidths(4.5, seed=3),
    "entropy:1.5": EntropyThreshold(1.5),
    "entropy:-2": EntropyThreshold(-2.0),
    "entropy:1.5,one_way=true": EntropyThreshold(1.5, one_way=True),
    "entropy:1.5,spread_nats=0.5,low_width=3": EntropyThreshold(1.5, spread_nats=0.5, low_width=3),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert policy_name(NAMES[name]) == name
    assert parse_policy(name) == NAMES[name]


@given(
    st.one_of(
        st.builds(Fixed, WIDTHS),
        st.builds(Knapsack, MEANS),
        st.builds(RandomWidths, MEANS, st.integers(0, 2**63 - 1)),
        st.builds(
            EntropyThreshold,
            st.floats(allow_nan=False, allow_infinity=False),
            st.floats(1e-3, allow_infinity=False),
            st.integers(0, 1000),
            st.booleans(),
            st.integers(1, 4),
            st.integers(5, 8),
        ),
    )
)
def test_a_name_means_its_policy(policy: UnboundPolicy) -> None:
    assert parse_policy(policy_name(policy)) == policy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fixed:bit_width=4", Fixed(4)),
        ("entropy: 1.5 , one_way = True", EntropyThreshold(1.5, one_way=True)),
        ("entropy:low_width=3,threshold_nats=1e0", EntropyThreshold(1.0, low_width=3)),
        ("random:seed=0,mean_bit_width=4.50", RandomWidths(4.5)),
    ],
)
def test_other_ways_to_write_a_name(name: str, expected: UnboundPolicy) -> None:
    assert parse_policy(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fixed", "bit_width is missing; write e.g. fixed:4"),
        ("knapsack:", "mean_bit_width is missing; write e.g. knapsack:4.5"),
        ("random:seed=1", "mean_bit_width is missing; write e.g. random:4.5"),
        ("fixed:four", "bit_width='four' is not a whole number; write e.g. bit_width=4"),
        ("fixed:4.5", "bit_width='4.5' is not a whole number"),
        ("knapsack:many", "mean_bit_width='many' is not a number; write e.g. mean_bit_width=4.5"),
        ("entropy:nan", "threshold_nats='nan' is not finite"),
        ("random:inf", "mean_bit_width='inf' is not finite"),
        ("entropy:1e999", "threshold_nats='1e999' is not finite"),
        ("entropy:1.5,one_way=1", "one_way='1' is not true or false; write e.g. one_way=true"),
        ("entropy:1.5,oneway=true", "unknown key 'oneway'; entropy has threshold_nats, spread_nats, hysteresis_units"),
        ("entropy:1.5,true", "'true' is not key=value; entropy has threshold_nats"),
        ("fixed:4,", "'' is not key=value; fixed has bit_width"),
        ("entropy:1.5,threshold_nats=2", "threshold_nats is given twice"),
        ("fixed:0", "bit_width=0 is no width, which is from 1 to 8"),
        ("random:9", "mean_bit_width=9 is no width"),
        ("random:4.5,seed=-1", "seed=-1 seeds nothing"),
        ("entropy:1.5,spread_nats=0", "spread_nats=0 is not a finite range"),
    ],
)
def test_wrong_parameters(name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_policy(name)
    assert message in str(error.value)
    assert f"policy {name!r}: " in str(error.value)
    assert "\n" not in str(error.value)


@dataclass(frozen=True)
class Unbound:
    """For classes that are only named."""

    def bind(self, context: PolicyContext) -> Policy:
        raise NotImplementedError


@dataclass(frozen=True)
class Labelled(Unbound):
    label: str = "a"
    factor: float = 0.1
    made: list[int] = field(init=False, default_factory=list)


@dataclass(frozen=True)
class Listed(Unbound):
    widths: tuple[int, ...] = (4, 8)


def test_text_keeps_its_key() -> None:
    """It may hold anything but commas, so without its key it could be taken for one."""
    prefix = f"{__name__}:Labelled"
    for policy, name in ((Labelled(), prefix), (Labelled("x=y", 0.3), f"{prefix}:label=x=y,factor=0.3")):
        assert policy_name(policy) == name
        assert read_parameters(Labelled, name.removeprefix(prefix).removeprefix(":"), name) == policy
    assert read_parameters(Labelled, "b", "name") == Labelled("b")
    check_parameters(Labelled, "name")


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False))
def test_text_is_given_back_or_refused(label: str, factor: float) -> None:
    policy = Labelled(label, factor)
    prefix = f"{__name__}:Labelled"
    if label != "a" and ("," in label or label != label.strip()):
        with pytest.raises(InputError, match="cannot be part of a policy's name") as error:
            policy_name(policy)
        assert "\n" not in str(error.value)
        return
    name = policy_name(policy)
    assert read_parameters(Labelled, name.removeprefix(prefix).removeprefix(":"), name) == policy


def test_a_class_without_parameters() -> None:
    assert policy_name(Unbound()) == usage(Unbound) == f"{__name__}:Unbound"
    assert read_parameters(Unbound, "", "name") == Unbound()
    with pytest.raises(InputError, match="Unbound has no parameters"):
        read_parameters(Unbound, "4", "name")


def test_types_that_names_cannot_give() -> None:
    with pytest.raises(InputError, match="its field widths is of type tuple"):
        check_parameters(Listed, "name")
