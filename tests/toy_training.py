"""Training on the fake model, where the best reward is known: what the tests of agents have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from fake_session import NUM_CLASSES, FakeModel, FakeSession, fake_profile, fake_windows, optimal_bit_widths
from stable_baselines3 import PPO
from torch import Tensor

from flexquant_rl.agents.config import PPOConfig
from flexquant_rl.agents.policies.static_front import StaticFront, static_front
from flexquant_rl.agents.runs.ppo import TrainingCallback, build_ppo
from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.task import LossyTask
from flexquant_rl.fq_env.vec_env import DecodeVecEnv

TOY_CONFIG = EnvConfig(prompt_tokens=4, max_new_tokens=16, kl_weight=4.0)
TOY_PPO = PPOConfig(num_envs=64, batch_size=256, num_epochs=6, learning_rate=3e-3, gamma=0.5)


@dataclass(frozen=True)
class UnitModel(FakeModel):
    """The units differ and the tokens do not: one allocation is the best at every token."""

    @property
    def need(self) -> Tensor:
        return torch.tensor([0.3, 0.02, 0.08, 0.005], dtype=torch.float64).expand(NUM_CLASSES, 4).clone()


@dataclass(frozen=True)
class DeepModel(FakeModel):
    """As many units as a real model; what each needs is drawn for each class of tokens, over two and a half decades."""

    num_units: int = 16

    @property
    def need(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        decades = torch.rand(NUM_CLASSES, self.num_units, generator=generator, dtype=torch.float64)
        return 10 ** (-0.5 - 2.5 * decades)


def toy_front(model: FakeModel) -> StaticFront:
    """Every static allocation worth having, or a thousand of them."""
    return static_front(fake_profile(model), model.unit_weights, num_points=1000)


def toy_env(
    model: FakeModel,
    *,
    config: EnvConfig = TOY_CONFIG,
    num_envs: int = TOY_PPO.num_envs,
    seed: int = 0,
    static: StaticFront | None = None,
    eos_token_ids: tuple[int, ...] = (),
) -> DecodeVecEnv:
    """A batch of episodes on random text; `static` is the control variate."""
    profile, windows = fake_profile(model), fake_windows(256, config.window_tokens)
    return DecodeVecEnv(
        Episodes(FakeSession(model, num_rows=num_envs), profile, windows, config, eos_token_ids=eos_token_ids),
        LossyTask(model, profile, config, static=None if static is None else static.allocate),
        seed=seed,
    )


def toy_windows(config: EnvConfig = TOY_CONFIG, *, seed: int = 9) -> Tensor:
    """`[64, window_tokens]` other text than `toy_env` draws from."""
    return fake_windows(64, config.window_tokens, seed=seed)


def toy_policy(net: PrecisionNet, model: FakeModel) -> LearnedPolicy:
    """The network as it is deployed."""
    schema = SignalSchema(model.num_units, model.bit_widths)
    return LearnedPolicy(net, PolicyCard(schema, model.fingerprint, tuple(unit.name for unit in model.units)))


def mean_reward(policy: Policy, model: FakeModel, windows: Tensor, config: EnvConfig = TOY_CONFIG) -> float:
    """Mean reward per token on windows `[n, window_tokens]` at the config's dial."""
    assert config.kl_weight is not None
    profile, rows = fake_profile(model), torch.arange(len(windows))
    episodes = Episodes(FakeSession(model, num_rows=len(rows)), profile, windows, config)
    task = LossyTask(model, profile, config)
    episodes.controller.policy = policy
    episodes.start(rows, rows, torch.full((len(rows),), config.kl_weight), torch.zeros_like(rows))
    rewards = [task.reward(episodes.step()).total for _ in range(config.max_new_tokens)]
    return float(torch.stack(rewards).double().mean())


def best_reward(model: FakeModel, windows: Tensor, config: EnvConfig = TOY_CONFIG) -> float:
    """Mean over tokens of the best of all W^U allocations at each: without carry no token's choice touches another."""
    assert config.kl_weight is not None
    assert model.carry == 0
    tokens = windows[:, config.prompt_tokens : -1].flatten()
    widths = optimal_bit_widths(model, tokens, config.kl_weight)
    time_share = fake_profile(model).cost.time_share(widths)
    return float((1 - time_share - config.kl_weight * model.own_kl_nats(tokens, widths)).mean())


def toy_training(
    env: DecodeVecEnv, model: FakeModel, checkpoint: Path, *, seed: int = 0, ppo_config: PPOConfig = TOY_PPO
) -> tuple[PPO, TrainingCallback]:
    """PPO on an env, and a callback that validates by the mean reward."""
    windows = toy_windows(seed=5)

    def validate(net: PrecisionNet) -> float:
        score = mean_reward(toy_policy(net, model), model, windows)
        net.train()
        return score

    return build_ppo(env, ppo_config, seed=seed), TrainingCallback(checkpoint, validate)
