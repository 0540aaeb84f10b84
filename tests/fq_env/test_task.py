"""Reward terms, action forms and the checks of a configuration, without any model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from fake_session import FakeModel, fake_profile

from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.task import ActionMap, EnvConfig, draw_kl_weight, reward_terms


def test_reward_is_speedup_minus_one_minus_weighted_kl() -> None:
    terms = reward_terms(
        torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64),
        torch.tensor([0.0, 0.01, 0.2]),
        torch.tensor([100.0, 20.0, 3.0]),
    )
    torch.testing.assert_close(terms.latency, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(terms.quality, torch.tensor([0.0, 0.2, 0.6]))
    torch.testing.assert_close(terms.total, torch.tensor([0.0, 0.3, 0.4]))
    assert {term.dtype for term in (terms.total, terms.latency, terms.quality)} == {torch.float32}


def test_window_holds_prompt_continuation_and_last_target() -> None:
    assert EnvConfig(prompt_tokens=5, max_new_tokens=7).window_tokens == 13


def test_default_is_valid() -> None:
    EnvConfig().validate()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"kl_weight": 0.0}, "kl_weight=0 must be positive"),
        ({"kl_weight": math.nan}, "kl_weight=nan must be positive and finite"),
        ({"kl_weight_min": 0.0}, "kl_weight_min=0"),
        ({"kl_weight_min": 9.0, "kl_weight_max": 3.0}, "kl_weight_min=9 and kl_weight_max=3"),
        ({"kl_weight_max": math.inf}, "kl_weight_max=inf"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"probe_every": -1}, "probe_every=-1"),
        ({"source": "book"}, "source=book is not known; choose one of replay, free"),
        ({"action": "widths"}, "action=widths is not known; choose one of bit_widths, num_low_units"),
        ({"action": "num_low_units", "low_width": 8, "high_width": 4}, "low_width=8 must be below high_width=4"),
    ],
)
def test_bad_values_are_refused_in_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        EnvConfig(**fields).validate()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_dial_is_fixed_or_drawn_log_uniformly() -> None:
    generator = np.random.default_rng(0)
    assert draw_kl_weight(generator, EnvConfig(kl_weight=7.0)) == 7.0
    config = EnvConfig(kl_weight_min=1.0, kl_weight_max=100.0)
    drawn = np.array([draw_kl_weight(generator, config) for _ in range(4000)])
    assert drawn.min() >= 1.0
    assert drawn.max() <= 100.0
    assert np.median(drawn) == pytest.approx(10.0, rel=0.15)


def test_bit_width_actions_cover_all_allocations(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    actions = ActionMap(fake_model_profile, EnvConfig())
    assert actions.choices == [5, 5, 5, 5]
    every = torch.tensor(list(itertools.product(range(5), repeat=4)))
    widths = actions.to_bit_widths(every)
    assert sorted(set(widths.flatten().tolist())) == list(fake_model.bit_widths)
    assert len(widths.unique(dim=0)) == 5**4
    assert torch.equal(widths[0], torch.tensor([3, 3, 3, 3]))
    assert torch.equal(widths[-1], torch.tensor([8, 8, 8, 8]))
    assert torch.equal(actions.from_bit_widths(widths), every)


def test_num_low_units_takes_the_least_sensitive_first(fake_model: FakeModel) -> None:
    profile = dataclasses.replace(
        fake_profile(fake_model), sensitivity=torch.tensor([0.3, 0.1, 0.4, 0.2])[:, None].expand(-1, 5)
    )
    config = EnvConfig(action="num_low_units", low_width=4, high_width=6)
    actions = ActionMap(profile, config)
    assert actions.choices == [5]
    counts = torch.arange(5)[:, None]
    widths = actions.to_bit_widths(counts)
    assert widths.tolist() == [[6, 6, 6, 6], [6, 4, 6, 6], [6, 4, 6, 4], [4, 4, 6, 4], [4, 4, 4, 4]]
    assert torch.equal(actions.from_bit_widths(widths), counts)


def test_equal_sensitivities_keep_the_order_of_the_units(fake_model: FakeModel) -> None:
    profile = dataclasses.replace(fake_profile(fake_model), sensitivity=torch.ones(4, 5))
    widths = ActionMap(profile, EnvConfig(action="num_low_units")).to_bit_widths(torch.tensor([[2]]))
    assert widths.tolist() == [[4, 4, 8, 8]]


@pytest.mark.parametrize("fields", [{"low_width": 2}, {"high_width": 7}])
def test_widths_that_are_not_stored_are_refused(fake_model_profile: Profile, fields: dict[str, int]) -> None:
    (name,) = fields
    with pytest.raises(InputError, match=rf"{name}={fields[name]} is not stored; choose one of \(3, 4, 5, 6, 8\)"):
        ActionMap(fake_model_profile, EnvConfig(action="num_low_units", **fields))  # type: ignore[arg-type]
