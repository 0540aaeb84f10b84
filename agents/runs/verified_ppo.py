"""PPO for drafts and verification: one action per step, so stable-baselines3's own update over a small network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from stable_baselines3 import PPO

from flexquant_rl.agents.policies.drafting import Actions, DraftingPolicy
from flexquant_rl.engine.control.policy import HIDDEN
from flexquant_rl.engine.control.verified_signals import Observations
from flexquant_rl.fq_env.vec_env import VerifiedVecEnv


@dataclass(frozen=True)
class VerifiedPPOConfig:
    """How a policy of drafts is trained."""

    env_steps: int = 400_000
    """Steps of all rows together."""
    rollout_steps: int = 32
    """Steps of each row between updates."""
    batch_size: int = 512
    """Transitions of a gradient step."""
    num_epochs: int = 10
    """Times that a rollout is gone through."""
    learning_rate: float = 2e-3
    """At the beginning; falls to 0 in a straight line."""
    gamma: float = 0.9
    """Discount of a step: what a draft gains is known within its round."""
    gae_lambda: float = 0.95
    """Decay of the advantage estimates."""
    entropy_coefficient: float = 0.01
    """Weight of the policy entropy."""


def build_verified_ppo(env: VerifiedVecEnv, config: VerifiedPPOConfig, *, seed: int) -> PPO:
    """Builds PPO over two hidden layers, as wide as those of the lossy mode."""
    return PPO(
        "MlpPolicy",
        env,
        learning_rate=lambda remaining: config.learning_rate * remaining,
        n_steps=config.rollout_steps,
        batch_size=config.batch_size,
        n_epochs=config.num_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        ent_coef=config.entropy_coefficient,
        policy_kwargs={"net_arch": [HIDDEN, HIDDEN], "activation_fn": torch.nn.Tanh},
        seed=seed,
        device="cpu",
    )


def learned_policy(ppo: PPO) -> DraftingPolicy:
    """The likeliest action of a trained network, for evaluation."""

    def decide(observations: Observations) -> Actions:
        return np.asarray(ppo.predict(observations, deterministic=True)[0], dtype=np.int64)

    return decide
