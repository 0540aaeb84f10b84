"""Names of strategies and what is quantised once for several of them."""

from __future__ import annotations

import pytest

from flexquant_rl.agents.analysis.strategies import (
    RECIPES,
    STORED,
    Strategy,
    by_start,
    default_strategies,
    parse_strategy,
    recipe_text,
)
from flexquant_rl.engine.errors import InputError


@pytest.mark.parametrize("size", ["", ":32", ":64"])
@pytest.mark.parametrize("recipe", [*RECIPES])
def test_names_come_back(recipe: str, size: str) -> None:
    strategy = parse_strategy(recipe + size)
    assert strategy.name == recipe + size
    assert recipe_text(strategy.name).endswith(f"groups of {size[1:] or 128}")
    assert (strategy.method, strategy.tuned) == (recipe.split("-")[0], recipe.endswith("tuned"))
    assert parse_strategy(f"{recipe}:128").name == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("awq", "'awq' is no strategy; use rtn, rtn-rotated, rtn-text, rtn-tuned, gptq, gptq-rotated, "),
        ("", "'' is no strategy"),
        ("stored", "'stored' is no strategy"),
        ("gptq:48", "'gptq:48': group_size=48 is not supported; use one of 32, 64, 128"),
        ("gptq:", "'gptq:' has group size '', which is no number"),
    ],
)
def test_what_is_no_strategy(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_strategy(name)


def test_what_begins_alike_is_quantised_once() -> None:
    names = ("gptq-tuned", "rtn", "gptq", "rtn-tuned:64", "gptq", "rtn:32")
    found = by_start(map(parse_strategy, names))
    assert [(start.name, [one.name for one in members]) for start, members in found] == [
        ("gptq", ["gptq", "gptq-tuned"]),
        ("rtn", ["rtn"]),
        ("rtn-text:64", ["rtn-tuned:64"]),
        ("rtn:32", ["rtn:32"]),
    ]


def test_defaults_are_cheap_for_large_models() -> None:
    small, large = (default_strategies(count, rotatable=True) for count in (7_000_000, 135_000_000))
    assert small[: len(large)] == large
    assert not any(parse_strategy(name).method == "gptq" for name in large)
    # What `fq quantize` makes of a model with text comes last, for it is looked into.
    for rotated in (True, False):
        last = parse_strategy(default_strategies(7_000_000, rotatable=rotated)[-1])
        assert last == Strategy("gptq", calibrated=True, tuned=True, rotated=rotated, group_size=128)
    assert recipe_text(STORED)
