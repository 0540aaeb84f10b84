"""PPO for drafts and verification: a clone of the best rule, improved by stable-baselines3's own update.

One training seed is a deterministic function of the recording, the costs and the configuration. It takes a minute or
less, so a seed that was interrupted is trained again from its beginning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from flexquant_rl.agents.config import VerifiedPPOConfig
from flexquant_rl.agents.evaluation.drafting import play
from flexquant_rl.engine.control.drafting_net import DraftingNet, normalisation
from flexquant_rl.engine.control.drafting_rules import DraftingPolicy
from flexquant_rl.engine.control.policy import HIDDEN
from flexquant_rl.engine.control.verified_signals import Sees, VerifiedSchema
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.fq_env.trace_rounds import TraceRounds
from flexquant_rl.fq_env.trace_table import TraceTable
from flexquant_rl.fq_env.vec_env import VerifiedVecEnv

_CLONE_STEPS, _CLONE_BATCH, _CLONE_RATE = 600, 512, 2e-3
# A clone that is sure of every action never tries another one.
_CLONE_SMOOTHING = 0.1
_VALIDATIONS = 40
Seen = tuple[Tensor, Tensor]
"""Observations `[n, dim]` float32 at which a draft was possible, and the actions `[n]` int64 of who made them."""


class Normalised(BaseFeaturesExtractor):
    """Observations less their mean over their deviation; both are fixed.

    Args:
        observation_space: The environment's.
        mean: `[dim]`.
        std: `[dim]`, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, observation_space: gym.spaces.Box, mean: Tensor, std: Tensor) -> None:
        super().__init__(observation_space, len(mean))
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, observations: Tensor) -> Tensor:
        """`[R, dim]` to the same."""
        return (observations - self.mean) / self.std


def build_verified_ppo(
    env: VerifiedVecEnv, config: VerifiedPPOConfig, *, seed: int, scale: tuple[Tensor, Tensor] | None = None
) -> PPO:
    """Builds PPO over two hidden layers, as wide as those of the lossy mode.

    Args:
        env: The rows.
        config: How it learns.
        seed: Training seed.
        scale: Mean and deviation `[dim]` of observations; default: they are taken as they are.
    """
    dim = env.observation_space.shape[0]  # type: ignore[index]  # a Box has one
    mean, std = (torch.zeros(dim), torch.ones(dim)) if scale is None else scale
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
        policy_kwargs={
            "net_arch": [HIDDEN, HIDDEN],
            "activation_fn": torch.nn.Tanh,
            "features_extractor_class": Normalised,
            "features_extractor_kwargs": {"mean": mean, "std": std},
        },
        seed=seed,
        device="cpu",
    )


def drafting_net(ppo: PPO, schema: VerifiedSchema) -> DraftingNet:
    """A copy of the actor, as it is exported."""
    policy = ppo.policy
    assert isinstance(policy, ActorCriticPolicy)
    scale = policy.features_extractor
    assert isinstance(scale, Normalised)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and then replaced
        net = DraftingNet(schema)
    net.mean.copy_(scale.mean)
    net.std.copy_(scale.std)
    net.encode.load_state_dict(policy.mlp_extractor.policy_net.state_dict())
    net.action_head.load_state_dict(policy.action_net.state_dict())
    return net.eval()


def seen_by(table: TraceTable, costs: VerifyCosts, policy: DraftingPolicy) -> Seen:
    """What a policy sees and does over all sequences."""
    rounds, rows = TraceRounds(table, costs, table.num_sequences), torch.arange(table.num_sequences)
    rounds.start(rows, rows, torch.ones(len(rows)), torch.zeros_like(rows))
    running = np.ones(len(rows), dtype=np.bool_)
    seen, done = list[np.ndarray](), list[np.ndarray]()
    while running.any():
        observations = rounds.observations()
        actions = policy(observations)
        kept = running & rounds.can_draft()
        seen.append(observations[kept])
        done.append(actions[kept])
        facts = rounds.step(torch.from_numpy(actions))
        running &= ~(facts.terminated | facts.truncated).numpy()
    return torch.from_numpy(np.concatenate(seen)), torch.from_numpy(np.concatenate(done))


def clone_rule(ppo: PPO, seen: Seen, *, seed: int) -> float:
    """Trains the actor to do what a rule did; the share of observations at which it does then."""
    policy = ppo.policy
    assert isinstance(policy, ActorCriticPolicy)
    observations, actions = seen
    actor = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    optimizer = torch.optim.Adam(actor, lr=_CLONE_RATE)
    generator = torch.Generator().manual_seed(seed)

    def scores(of: Tensor) -> Tensor:
        latent: Tensor = policy.action_net(policy.mlp_extractor.policy_net(policy.extract_features(of)))
        return latent

    for _ in range(_CLONE_STEPS):
        batch = torch.randint(len(actions), (_CLONE_BATCH,), generator=generator)
        loss = torch.nn.functional.cross_entropy(
            scores(observations[batch]), actions[batch], label_smoothing=_CLONE_SMOOTHING
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((scores(observations).argmax(-1) == actions).double().mean())


@dataclass(frozen=True)
class TrainedDrafts:
    """One trained policy of drafts.

    Attributes:
        seed: Training seed.
        net: The network that validation chose.
        sees: What the network looks at.
        curve: `(env steps, speedup)` of every network that was validated on validation sequences, the clone first.
        env_steps_per_s: Of its training.
        observations: `[n, dim]` of the last rollout, for the parity check of its export.
        ppo: What was trained, with the chosen network in it.
    """

    seed: int
    net: DraftingNet
    sees: Sees
    curve: tuple[tuple[int, float], ...]
    env_steps_per_s: float
    observations: Tensor
    ppo: PPO

    @property
    def best_speedup(self) -> float:
        """Of the network that validation chose."""
        return max(speedup for _, speedup in self.curve)


class _Validation(BaseCallback):
    """Before a rollout, at times: plays the validation sequences and keeps the network that is fastest."""

    def __init__(self, score: Callable[[DraftingNet], float], schema: VerifiedSchema, every: int) -> None:
        super().__init__()
        self.curve: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}
        self._score, self._schema, self._every = score, schema, every
        self._rollouts = 0

    def _on_rollout_start(self) -> None:
        if self._rollouts % self._every == 0:
            self.consider()
        self._rollouts += 1

    def _on_step(self) -> bool:
        return True

    def consider(self) -> None:
        """Validates the network as it is now."""
        assert isinstance(self.model, PPO)
        speedup = self._score(drafting_net(self.model, self._schema))
        if not self.curve or speedup > max(found for _, found in self.curve):
            self.best = {name: tensor.clone() for name, tensor in self.model.policy.state_dict().items()}
        self.curve.append((self.num_timesteps, speedup))


def train_drafts(
    env: VerifiedVecEnv,
    validation: TraceTable,
    config: VerifiedPPOConfig,
    *,
    sees: Sees,
    env_steps: int,
    seed: int,
    start: Seen,
) -> TrainedDrafts:
    """Clones a rule, improves on it with PPO and keeps the network that is fastest on validation sequences.

    Args:
        env: Rows of training sequences, whose costs are those of a policy that sees so much.
        validation: The validation sequences.
        config: How it learns.
        sees: What the network looks at.
        env_steps: Steps of all rows together, rounded up to whole rollouts.
        seed: Training seed.
        start: What the rule saw and did on training sequences; they set the normalisation too.
    """
    rounds = env.episodes
    scale = normalisation(rounds.schema, start[0], sees=sees, embedding=config.embedding)
    ppo = build_verified_ppo(env, config, seed=seed, scale=scale)
    clone_rule(ppo, start, seed=seed)
    num_rollouts = math.ceil(env_steps / (config.rollout_steps * config.num_envs))

    def score(net: DraftingNet) -> float:
        return play(validation, rounds.costs, net.policy(), sees=sees).speedup

    callback = _Validation(score, rounds.schema, max(1, num_rollouts // _VALIDATIONS))
    began = time.monotonic()
    ppo.learn(num_rollouts * config.rollout_steps * config.num_envs, callback=callback)
    rate = ppo.num_timesteps / (time.monotonic() - began)
    callback.consider()
    ppo.policy.load_state_dict(callback.best)
    observations = torch.as_tensor(ppo.rollout_buffer.observations).reshape(-1, rounds.schema.dim)
    net = drafting_net(ppo, rounds.schema)
    return TrainedDrafts(seed, net, sees, tuple(callback.curve), rate, observations, ppo)
