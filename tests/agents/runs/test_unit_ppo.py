"""PPO's update: units do not tighten each other's clip, and no dial is louder than another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_profile, optimal_bit_widths
from stable_baselines3 import PPO
from torch import Tensor
from toy_training import TOY_CONFIG, TOY_PPO, DeepModel, mean_reward, toy_env, toy_front, toy_policy, toy_windows

from flexquant_rl.agents.config import PPOConfig
from flexquant_rl.agents.runs import ppo as ppo_module
from flexquant_rl.agents.runs import unit_ppo
from flexquant_rl.agents.runs.imitation import collect_signals
from flexquant_rl.agents.runs.ppo import TrainingCallback, build_ppo, learn, precision_net
from flexquant_rl.agents.runs.unit_ppo import UnitPPO, normalised_by_dial, unit_objective
from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.policy import PrecisionNet
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.task import LossyTask
from flexquant_rl.fq_env.vec_env import DecodeVecEnv


def test_at_the_start_of_an_update_the_gradient_is_the_joint_one_over_the_units() -> None:
    log_ratio = torch.zeros(5, 3, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    unit_objective(log_ratio, advantages, 0.2).backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, (advantages / 5 / 3)[:, None].expand(5, 3))


def test_a_unit_that_has_moved_far_enough_stops_and_the_others_go_on() -> None:
    """Their product, 1.3, would be outside the clip for all of them."""
    log_ratio = torch.tensor([[1.3, 1.0, 1.1], [0.7, 1.1, 0.9]]).log().requires_grad_()
    unit_objective(log_ratio, torch.tensor([1.0, -1.0]), 0.2).backward()
    assert log_ratio.grad is not None
    assert (log_ratio.grad != 0).tolist() == [[False, True, True], [False, True, True]]
    assert (log_ratio.grad[0] >= 0).all()
    assert (log_ratio.grad[1] <= 0).all()


def test_every_bin_of_the_dial_is_standardised_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    dial = 3 * torch.rand(96, 1, generator=generator).expand(96, 16).flatten()
    advantages = (torch.randn(96 * 16, generator=generator) + 0.5) * 10**dial
    scaled, scale = normalised_by_dial(advantages, dial, num_rows=96)
    bins = ((dial - dial.min()) / (dial.max() - dial.min()) * 8).long().clamp_max(7)
    for index in range(8):
        assert float(scaled[bins == index].mean()) == pytest.approx(0, abs=1e-4)
        assert float(scaled[bins == index].std(correction=0)) == pytest.approx(1, abs=1e-4)
        own = advantages[bins == index].std(correction=0)
        torch.testing.assert_close(scale[bins == index], own.expand(int((bins == index).sum())))
    assert float(scale.max() / scale.min()) > 100


@pytest.mark.parametrize(("num_rows", "spread"), [(8, 2.0), (96, 0.0)], ids=["few rows", "one dial"])
def test_few_rows_or_one_dial_are_standardised_together(num_rows: int, spread: float) -> None:
    advantages = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 3 + 1
    dial = 1 + spread * torch.linspace(0, 1, 200)
    scaled, scale = normalised_by_dial(advantages, dial, num_rows=num_rows)
    torch.testing.assert_close(scaled, (advantages - advantages.mean()) / advantages.std(correction=0))
    assert len(scale.unique()) == 1


def test_equal_advantages_are_zero() -> None:
    scaled, _ = normalised_by_dial(torch.ones(24), torch.linspace(0, 1, 24), num_rows=24)
    assert torch.equal(scaled, torch.zeros(24))


def test_every_transition_is_used_once_an_epoch(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="truncated mini-batch"):
        ppo = build_ppo(toy_env(FakeModel(), num_envs=8), PPOConfig(num_envs=8, batch_size=36), seed=0)
    assert isinstance(ppo, UnitPPO)
    batches = [batch.tolist() for batch in ppo._minibatches(128)]
    assert [len(batch) for batch in batches] == [36, 36, 56]
    assert sorted(index for batch in batches for index in batch) == list(range(128))
    assert [len(batch) for batch in ppo._minibatches(20)] == [20]


def train(env: DecodeVecEnv, model: FakeModel, config: PPOConfig, num_updates: int, path: Path) -> PrecisionNet:
    """PPO from random weights, without validation: the last network."""
    ppo = build_ppo(env, config, seed=0)
    signals = collect_signals(env, toy_front(model), torch.Generator().manual_seed(0))
    precision_net(ppo).set_normalisation(signals)
    callback = TrainingCallback(path / "checkpoint.safetensors", lambda net: 0.0)
    learn(ppo, callback, num_updates * env.num_envs * TOY_CONFIG.max_new_tokens, path / "tensorboard")
    return precision_net(ppo)


class JointPPO(UnitPPO):
    """The update of stable-baselines3: one ratio for all units, all advantages normalised together."""

    train = PPO.train  # type: ignore[assignment]


def deep_reward(path: Path) -> float:
    model = DeepModel()
    env = toy_env(model, num_envs=64)
    config = replace(TOY_PPO, learning_rate=1e-3)
    return mean_reward(toy_policy(train(env, model, config, 8, path), model), model, toy_windows())


def test_a_deep_model_learns_as_fast_as_a_shallow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 units: the joint ratio leaves the clip when each has moved a little, and training crawls."""
    by_unit = deep_reward(tmp_path / "unit")
    monkeypatch.setattr(ppo_module, "UnitPPO", JointPPO)
    assert by_unit > max(0.1, 1.5 * deep_reward(tmp_path / "joint"))


DIALS = (0.5, 60.0)


def captured(path: Path) -> list[float]:
    """Share of the way from static to the best that PPO gets, in each quarter of the dial; it trains on all of it."""
    model = FakeModel()
    config = replace(TOY_CONFIG, kl_weight=None, kl_weight_min=DIALS[0], kl_weight_max=DIALS[1])
    ppo_config = replace(TOY_PPO, num_envs=96)
    env = toy_env(model, config=config, num_envs=96, static=toy_front(model))
    policy = toy_policy(train(env, model, ppo_config, 14, path), model)
    windows, dials = toy_windows(config), torch.logspace(*(math.log10(dial) for dial in DIALS), 64)
    front, task = toy_front(model), LossyTask(model, fake_profile(model), config)
    decide: dict[str, Callable[[Episodes, Tensor], Tensor]] = {
        "learned": lambda episodes, tokens: policy(episodes.signals()).bit_widths,
        "static": lambda episodes, tokens: front.allocate(dials),
        "best": lambda episodes, tokens: optimal_bit_widths(model, tokens, dials),
    }
    rewards, rows = {}, torch.arange(64)
    for name, widths_of in decide.items():
        episodes = Episodes(FakeSession(model, num_rows=64), fake_profile(model), windows, config)
        episodes.start(rows, rows, dials, rows)
        total = torch.zeros(64)
        for step in range(config.max_new_tokens):
            widths = widths_of(episodes, windows[:, config.prompt_tokens + step])
            total += task.reward(episodes.step(Decision(widths))).total
        rewards[name] = total.view(4, 16).mean(1)
    share = (rewards["learned"] - rewards["static"]) / (rewards["best"] - rewards["static"])
    return share.tolist()


def test_every_dial_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nat costs 120 times as much at one end as at the other; normalised together, most dials learn less."""
    by_dial = min(captured(tmp_path / "by_dial"))

    def together(advantages: Tensor, dial: Tensor, *, num_rows: int) -> tuple[Tensor, Tensor]:
        return normalised_by_dial(advantages, torch.zeros_like(dial), num_rows=num_rows)

    monkeypatch.setattr(unit_ppo, "normalised_by_dial", together)
    assert by_dial > max(0.6, 1.3 * min(captured(tmp_path / "together")))
