"""Requests and engines that cannot be: one line says so before a prompt is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet, StaticPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import Engine, generate

PROMPT = torch.tensor([1, 104, 101, 108, 108, 111])
WIDTHS = torch.tensor([4, 3, 6])


def test_one_stop_string_is_not_its_letters(
    nested_model: NestedCausalLM, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Request] = []

    def spy(self: Engine, request: Request) -> Iterator[GeneratedToken]:
        seen.append(request)
        yield from ()

    monkeypatch.setattr(Engine, "generate", spy)
    for stop in ("return", ("return",)):
        list(generate(nested_model, StaticAllocation("s", WIDTHS), profile, PROMPT, max_new_tokens=2, stop=stop))
    assert [request.stop for request in seen] == [("return",)] * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ({"stop": "return"}, "stop='return' must be a tuple of strings"),
        ({"stop": (3,)}, r"stop=\(3,\) must be a tuple of strings"),
    ],
)
def test_requests_that_cannot_end(
    nested_model: NestedCausalLM, profile: Profile, changes: dict[str, Any], said: str
) -> None:
    request = Request(PROMPT, **{"max_new_tokens": 4, **changes})
    with closing(Engine(nested_model, StaticAllocation("s", WIDTHS), profile)) as engine:
        stream = engine.generate(request)
        with pytest.raises(InputError, match=said):
            next(stream)


def test_requests_are_compared_by_identity() -> None:
    assert Request(PROMPT, 4) != Request(PROMPT, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"max_length": -5}, "max_length=-5 must be at least 1"),
        ({"decoder": "foo"}, "decoder='foo' is unknown; use one of auto, lean, hf"),
    ],
)
def test_engines_that_cannot_be(
    nested_model: NestedCausalLM, profile: Profile, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        Engine(nested_model, StaticAllocation("s", WIDTHS), profile, **options)


def test_policies_of_other_models_are_refused(nested_model: NestedCausalLM, profile: Profile) -> None:
    schema = SignalSchema(nested_model.num_units, nested_model.bit_widths)
    card = PolicyCard(schema, "e" * 64, ("a", "b", "head"))
    for policy in (LearnedPolicy(PrecisionNet(schema), card, "mine"), StaticPolicy("mine", WIDTHS, card)):
        with pytest.raises(InputError, match="mine: the policy was trained for model eeeeeeeeeeee"):
            Engine(nested_model, policy, profile)
    for widths, said in ((WIDTHS.float(), "give torch.int64"), (WIDTHS[:2], "the model has 3 units")):
        with pytest.raises(InputError, match=said):
            Engine(nested_model, StaticAllocation("s", widths), profile)
