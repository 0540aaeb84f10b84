"""Families in tables and legends, and names of no family."""

from __future__ import annotations

import re

import pytest
from policy_checks import fake_context

from flexquant_rl.agents.policies.families import (
    ORACLE,
    POLICIES,
    PPO,
    STATIC,
    TOKEN,
    UNIT_ORACLE,
    UNTRAINED,
    bind_policy,
    family_facts,
    family_name,
    parse_policy,
)
from flexquant_rl.agents.policies.knapsack import Knapsack
from flexquant_rl.agents.policies.relative_error import RelativeError
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.errors import InputError


def test_simple_families_come_first_and_bounds_last() -> None:
    names = ["oracle", "ppo", "static", "my_module:Mine", "fixed", "ppo:policy", "knapsack", "entropy", "random"]
    expected = ["fixed", "random", "entropy", "knapsack", "static", "ppo", "my_module:Mine", "ppo:policy", "oracle"]
    assert list(family_facts(names)) == expected
    assert list(family_facts(name for name in ("ppo", "fixed", "ppo"))) == ["fixed", "ppo"]
    assert not family_facts([])


def test_families_are_told_apart() -> None:
    learned = (UNTRAINED, TOKEN, PPO)
    known = [*(kind.family for kind in POLICIES), STATIC, *learned, RelativeError.family, ORACLE, UNIT_ORACLE]
    unknown = [family for name, family in family_facts([*"abcdefg", "ppo"]).items() if name != "ppo"]
    for fact in ("name", "label", "colour", "marker"):
        values = [getattr(family, fact) for family in (*known, *unknown)]
        assert len(set(values)) == len(values), fact
    assert all(re.fullmatch("#[0-9A-Fa-f]{6}", family.colour) for family in (*known, *unknown))
    assert len(family_facts("abcdefghijklmn")) == 14, "spare colours come again where they run out"


def test_what_looks_at_no_token_and_what_cannot_be_deployed() -> None:
    known = family_facts(["fixed", "random", "entropy", "knapsack", "static", "ppo"]).values()
    assert [family.name for family in known if family.is_static] == ["fixed", "knapsack", "static"]
    bounds = family_facts(["oracle-unit", "ppo", "oracle", "relative-error"]).values()
    assert [family.name for family in bounds if family.is_oracle] == ["oracle", "oracle-unit"]
    assert [family.name for family in bounds if family.is_in_flight] == ["relative-error"]


def test_ours_are_trusted() -> None:
    policy = bind_policy(Knapsack(4.5), fake_context())
    assert isinstance(policy, StaticAllocation)
    assert family_name(Knapsack(4.5)) == "knapsack"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fixd:4", "did you mean fixed:4?"),
        ("knapsac:4.5", "did you mean knapsack:4.5?"),
        ("knapsac:many", "did you mean knapsack:many?"),
        ("Random:4", "did you mean random:4?"),
        ("fixd", "did you mean fixed:4?"),
        (
            "zzz",
            "known: fixed:BIT_WIDTH, random:MEAN_BIT_WIDTH, schedule:FIRST, entropy:THRESHOLD_NATS, "
            "regressor:MULTIPLIER, knapsack:MEAN_BIT_WIDTH, draft:WIDTH, lookups, "
            "relative-error:SHARE_HIGH, module:Class",
        ),
        ("drft:3", "did you mean draft:3?"),
        ("lookup", "did you mean lookups?"),
        ("relative_error:0.3", "did you mean relative-error:0.3?"),
        ("relative-eror", "did you mean relative-error:0.5?"),
        ("static:4.5", "name one, e.g. knapsack:4.5"),
        ("ppo", "a learned policy is named by the directory of its run"),
        ("untrained", "train.py --baselines untrained"),
        ("oracle-unit", "an oracle knows the text"),
        ("./no/such/directory", "(or the directory of an exported policy)"),
        ("", "known: fixed:BIT_WIDTH"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_policy(name)
    assert f"unknown policy {name!r}" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["my_entropy:Gate", "policies_random:Gate", "nowhere:Gate"])
def test_a_class_of_a_missing_module_is_no_misspelt_family(name: str) -> None:
    with pytest.raises(InputError, match=f"there is no module {name.partition(':')[0]} here"):
        parse_policy(name)
