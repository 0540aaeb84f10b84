"""Reward terms, action forms and the checks of a configuration, without any model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_profile, fake_windows

from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.episodes import Episodes, StepFacts
from flexquant_rl.fq_env.task import LossyTask, draw_kl_weights, info_columns


def facts_of(latency_ms: list[float], output_kl_nats: list[float], kl_weight: list[float]) -> StepFacts:
    """Facts of a first step, a full-width step taking 6 ms."""
    count = len(latency_ms)
    return StepFacts(
        decision=Decision(torch.full((count, 4), 4)),
        position=torch.zeros(count, dtype=torch.int64),
        kl_weight=torch.tensor(kl_weight),
        output_kl_nats=torch.tensor(output_kl_nats),
        token_nll_nats=torch.zeros(count),
        top1_agreement=torch.ones(count, dtype=torch.bool),
        latency_ms=torch.tensor(latency_ms, dtype=torch.float64),
        full_latency_ms=6.0,
        mean_bit_width=torch.full((count,), 4.0),
        terminated=torch.zeros(count, dtype=torch.bool),
        truncated=torch.zeros(count, dtype=torch.bool),
    )


def test_reward_is_time_saved_minus_weighted_kl(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    facts = facts_of([6.0, 4.0, 3.0], [0.0, 0.01, 0.2], [100.0, 20.0, 3.0])
    reward = LossyTask(fake_model, fake_model_profile, EnvConfig()).reward(facts)
    torch.testing.assert_close(reward.total, torch.tensor([0.0, 1 / 3 - 0.2, -0.1]))
    torch.testing.assert_close(reward.terms["time_saved"], torch.tensor([0.0, 1 / 3, 0.5]))
    torch.testing.assert_close(reward.terms["kl_cost"], torch.tensor([0.0, 0.2, 0.6]))
    assert torch.equal(reward.terms["reward_plain"], reward.total)
    assert {term.dtype for term in (reward.total, *reward.terms.values())} == {torch.float32}


def test_info_holds_the_terms_the_facts_and_the_dial(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    facts = facts_of([3.0], [0.2], [5.0])
    reward = LossyTask(fake_model, fake_model_profile, EnvConfig()).reward(facts)
    info = {name: column.tolist() for name, column in info_columns(facts, reward).items()}
    assert info == {
        "reward_plain": [-0.5],
        "time_saved": [0.5],
        "kl_cost": [1.0],
        "output_kl_nats": [pytest.approx(0.2)],
        "latency_ms": [3.0],
        "full_latency_ms": [6.0],
        "mean_bit_width": [4.0],
        "kl_weight": [5.0],
    }


def test_uneven_steps_earn_no_more_than_even_ones(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    """Times 0.5 and 1.5 in turn against 1 throughout, at equal KL: a mean of speedups would pay 0.33 a step for it."""
    task = LossyTask(fake_model, fake_model_profile, EnvConfig())
    uneven = task.reward(facts_of([3.0, 9.0] * 8, [0.01] * 16, [20.0] * 16))
    even = task.reward(facts_of([6.0] * 16, [0.01] * 16, [20.0] * 16))
    assert float(uneven.total.sum()) <= float(even.total.sum()) + 1e-6


def test_an_episode_earns_tokens_less_time_less_priced_kl() -> None:
    """`N - T / t_full - kl_weight * KL` of episodes that are really played, at random widths and with carried KL."""
    model = FakeModel(carry=0.5)
    profile, config = fake_profile(model), EnvConfig(prompt_tokens=3, max_new_tokens=20)
    episodes = Episodes(FakeSession(model, num_rows=2), profile, fake_windows(2, config.window_tokens), config)
    rows, dials = torch.arange(2), torch.tensor([3.0, 40.0])
    episodes.start(rows, rows, dials, rows)
    generator = torch.Generator().manual_seed(0)
    earned, time_ms, kl = torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for _ in range(config.max_new_tokens):
        columns = torch.randint(5, (2, 4), generator=generator)
        facts = episodes.step(Decision(torch.tensor(model.bit_widths)[columns]))
        earned += LossyTask(model, profile, config).reward(facts).total
        time_ms += facts.latency_ms
        kl += facts.output_kl_nats
    full_ms = profile.cost.latency_ms(torch.tensor([8, 8, 8, 8]))
    torch.testing.assert_close(earned, (20 - time_ms / full_ms - dials * kl).float(), rtol=1e-5, atol=1e-4)
    assert float(kl.min()) > 0.1


def test_control_variate_needs_a_fixed_text(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    with pytest.raises(InputError, match="a control variate needs source=replay"):
        LossyTask(fake_model, fake_model_profile, EnvConfig(source="free"), static=lambda dials: dials)


def test_every_feature_has_a_name(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    task = LossyTask(fake_model, fake_model_profile, EnvConfig())
    names = task.feature_names
    assert (len(names),) == task.observation_space.shape
    assert len(set(names)) == len(names)
    assert names[0] == "token_entropy"
    assert names[-1] == "head/depth"
    config = EnvConfig(prompt_tokens=3, max_new_tokens=4)
    episodes = Episodes(FakeSession(fake_model), fake_model_profile, fake_windows(1, config.window_tokens), config)
    zero = torch.tensor([0])
    episodes.start(zero, zero, torch.tensor([50.0]), zero)
    episodes.step(Decision(torch.tensor([[3, 4, 5, 8]])))
    named = dict(zip(names, task.observation(episodes.signals())[0].tolist(), strict=True))
    assert named["dial"] == pytest.approx(math.log10(50))
    assert named["position"] == pytest.approx(math.log1p(1) / 4)
    assert [named[f"{unit.name}/last_width"] * 8 for unit in fake_model.units] == [3, 4, 5, 8]
    sensitivity = fake_model_profile.sensitivity.clamp_min(1e-6).log10() / 2
    for index, unit in enumerate(fake_model.units):
        assert named[f"{unit.name}/log_sensitivity_4"] == pytest.approx(float(sensitivity[index, 1]))


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
    assert draw_kl_weights(generator, EnvConfig(kl_weight=7.0), 3).tolist() == [7.0] * 3
    config = EnvConfig(kl_weight_min=1.0, kl_weight_max=100.0)
    drawn = np.array([draw_kl_weights(generator, config, 1)[0] for _ in range(4000)])
    assert drawn.min() >= 1.0
    assert drawn.max() <= 100.0
    assert np.median(drawn) == pytest.approx(10.0, rel=0.15)


def test_dials_that_are_drawn_together_leave_no_part_of_the_range_out() -> None:
    config = EnvConfig(kl_weight_min=1.0, kl_weight_max=100.0)
    generator = np.random.default_rng(0)
    batches = np.stack([draw_kl_weights(generator, config, 20) for _ in range(500)])
    strata = np.floor(np.log10(batches) / 2 * 20).astype(int)
    np.testing.assert_array_equal(np.sort(strata, axis=1), np.arange(20) * np.ones((500, 1)))
    assert strata[:, 0].std() > 4  # which row gets which is chance,
    within = np.log10(batches) / 2 * 20 - strata
    assert within.min() < 0.01  # and so is where it lies within its part
    assert within.max() > 0.99
    assert within.mean() == pytest.approx(0.5, abs=0.02)


def test_bit_width_actions_cover_all_allocations(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    task = LossyTask(fake_model, fake_model_profile, EnvConfig())
    assert task.action_space == gym.spaces.MultiDiscrete([5, 5, 5, 5])
    every = torch.tensor(list(itertools.product(range(5), repeat=4)))
    decision = task.to_decision(every)
    widths = decision.bit_widths
    assert sorted(set(widths.flatten().tolist())) == list(fake_model.bit_widths)
    assert len(widths.unique(dim=0)) == 5**4
    assert torch.equal(widths[0], torch.tensor([3, 3, 3, 3]))
    assert torch.equal(widths[-1], torch.tensor([8, 8, 8, 8]))
    assert decision.verify
    assert torch.equal(task.to_actions(decision), every)


def test_num_low_units_takes_the_least_sensitive_first(fake_model: FakeModel) -> None:
    profile = dataclasses.replace(
        fake_profile(fake_model), sensitivity=torch.tensor([0.3, 0.1, 0.4, 0.2])[:, None].expand(-1, 5)
    )
    config = EnvConfig(action="num_low_units", low_width=4, high_width=6)
    task = LossyTask(fake_model, profile, config)
    assert task.action_space == gym.spaces.Discrete(5)
    counts = torch.arange(5)
    decision = task.to_decision(counts)
    assert decision.bit_widths.tolist() == [[6, 6, 6, 6], [6, 4, 6, 6], [6, 4, 6, 4], [4, 4, 6, 4], [4, 4, 4, 4]]
    assert torch.equal(task.to_actions(decision), counts)


def test_equal_sensitivities_keep_the_order_of_the_units(fake_model: FakeModel) -> None:
    profile = dataclasses.replace(fake_profile(fake_model), sensitivity=torch.ones(4, 5))
    task = LossyTask(fake_model, profile, EnvConfig(action="num_low_units"))
    assert task.to_decision(torch.tensor([2])).bit_widths.tolist() == [[4, 4, 8, 8]]


@pytest.mark.parametrize("fields", [{"low_width": 2}, {"high_width": 7}])
def test_widths_that_are_not_stored_are_refused(
    fake_model: FakeModel, fake_model_profile: Profile, fields: dict[str, Any]
) -> None:
    (name,) = fields
    with pytest.raises(InputError, match=rf"{name}={fields[name]} is not stored; choose one of \(3, 4, 5, 6, 8\)"):
        LossyTask(fake_model, fake_model_profile, EnvConfig(action="num_low_units", **fields))
