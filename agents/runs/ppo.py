"""PPO over the shared unit network, with checkpoints from which training continues bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from flexquant_rl.agents.config import PPOConfig
from flexquant_rl.agents.runs.actor_critic import ActorCriticNet, UnitSharedPolicy
from flexquant_rl.agents.runs.tensorboard_log import (
    VALIDATION_TAG,
    HyperParameters,
    log_hyper_parameters,
    tensorboard_logger,
)
from flexquant_rl.agents.runs.unit_ppo import UnitPPO
from flexquant_rl.engine.control.policy import PrecisionNet
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_tensors, write_tensors
from flexquant_rl.fq_env.vec_env import DecodeVecEnv


def build_ppo(env: DecodeVecEnv, config: PPOConfig, *, seed: int, device: str = "cpu") -> PPO:
    """Builds PPO whose rollouts are whole episodes, so that every update starts at fresh prompts."""
    num_steps = env.episodes.config.max_new_tokens
    return UnitPPO(
        UnitSharedPolicy,
        env,
        learning_rate=lambda remaining: config.learning_rate * remaining,
        n_steps=num_steps,
        batch_size=config.batch_size,
        n_epochs=config.num_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.entropy_coefficient,
        vf_coef=config.value_coefficient,
        policy_kwargs={"schema": env.episodes.schema},
        seed=seed,
        device=device,
    )


def precision_net(ppo: PPO) -> ActorCriticNet:
    """The network inside."""
    assert isinstance(ppo.policy, UnitSharedPolicy)
    return ppo.policy.net


class TrainingCallback(BaseCallback):
    """Before each rollout: validate, keep the best network, save a checkpoint. During it: collect numbers to log.

    What a rollout and the update from it have given is logged at the env steps that were done by then; the score of
    the network before the first rollout stands at 0.

    Attributes:
        curve: `(env steps, score)` of every network that was validated, in order.

    Args:
        checkpoint: Where to save.
        validate: Scores a network on validation text; higher is better.
        validate_every: Updates between validations.
        on_update: Told the number of env steps done and the latest validation score.
    """

    def __init__(
        self,
        checkpoint: Path,
        validate: Callable[[PrecisionNet], float],
        *,
        validate_every: int = 3,
        on_update: Callable[[int, float], None] = lambda steps, score: None,
    ) -> None:
        super().__init__()
        self.best_score = -float("inf")
        self.curve: list[tuple[int, float]] = []
        self.best_state: dict[str, Tensor] = {}
        self._checkpoint = checkpoint
        self._validate = validate
        self._validate_every = validate_every
        self._on_update = on_update
        self._updates = 0
        self._resumed = False
        self._sums: dict[str, float] = {}

    @property
    def _env(self) -> DecodeVecEnv:
        assert isinstance(self.training_env, DecodeVecEnv)
        return self.training_env

    def _on_training_start(self) -> None:
        # Rollouts are whole episodes: each starts its own below, and nobody plays those behind the last one.
        self._env.waits_for_reset = True

    def _on_training_end(self) -> None:
        self._env.waits_for_reset = False

    def _on_rollout_start(self) -> None:
        if not self._env.aligned:
            self.model._last_obs = self._env.reset()
        if self._resumed:  # everything below was done before the interruption
            self._resumed = False
            return
        if self._updates % self._validate_every == 0:
            self.consider(precision_net(self.ppo))
        # Before the checkpoint: a resume logs again what comes after it, and nothing that came before.
        self.logger.dump(self.num_timesteps)
        self._save()
        self._on_update(self.num_timesteps, self.best_score)
        self._sums = {}

    @property
    def ppo(self) -> PPO:
        """The algorithm, typed."""
        assert isinstance(self.model, PPO)
        return self.model

    @property
    def first_score(self) -> float:
        """Score of the network before any update."""
        return self.curve[0][1]

    @property
    def last_score(self) -> float:
        """Score of the network that was validated last."""
        return self.curve[-1][1]

    def consider(self, net: PrecisionNet) -> None:
        """Validates a network and keeps it if it is the best so far."""
        score = self._validate(net)
        self.curve.append((self.num_timesteps, score))
        self.logger.record(VALIDATION_TAG, score)
        if score > self.best_score:
            self.best_score = score
            self.best_state = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def _on_step(self) -> bool:
        facts, reward = self._env.last_facts, self._env.last_reward
        assert facts is not None and reward is not None
        values = {
            "reward/total": reward.terms["reward_plain"],
            "reward/time_saved": reward.terms["time_saved"],
            "reward/kl_cost": reward.terms["kl_cost"],
            "reward/over_static": reward.total,
            "bits/mean": facts.mean_bit_width,
            "quality/output_kl_nats": facts.output_kl_nats,
            "latency/modelled_ms": facts.latency_ms,
        }
        mean_of_units = facts.decision.bit_widths.float().mean(0).tolist()
        for unit, bits in zip(self._env.episodes.model.units, mean_of_units, strict=True):
            self._add(f"bits/{unit.name}", bits)
        for tag, tensor in values.items():
            self._add(tag, float(tensor.mean()))
        self._add("steps", 1.0)
        return True

    def _on_rollout_end(self) -> None:
        self._updates += 1
        self._log_update()

    def _add(self, tag: str, value: float) -> None:
        self._sums[tag] = self._sums.get(tag, 0.0) + value

    def _log_update(self) -> None:
        steps = self._sums.pop("steps", 1.0)
        for tag, total in self._sums.items():
            self.logger.record(tag, total / steps)

    def _save(self) -> None:
        ppo = self.ppo
        tensors = {f"policy.{name}": tensor for name, tensor in ppo.policy.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_state.items()}
        for key, state in ppo.policy.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{key}.{name}": torch.as_tensor(value) for name, value in state.items()}
        # The global generator: SB3 shuffles its minibatches with it.
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        assert isinstance(numpy_state, dict)
        inner = numpy_state["state"]
        tensors["rng.torch"] = torch.get_rng_state()
        if ppo.device.type == "cuda":  # where actions are sampled
            tensors["rng.cuda"] = torch.cuda.get_rng_state(ppo.device)
        tensors["rng.numpy"] = torch.from_numpy(inner["key"].astype(np.int64))
        facts = {
            "num_timesteps": ppo.num_timesteps,
            "n_updates": ppo._n_updates,
            "updates": self._updates,
            "best_score": self.best_score,
            "curve": self.curve,
            "numpy_pos": int(inner["pos"]),
            "env": self._env.restart_state(),
        }
        write_tensors(self._checkpoint, tensors, {"facts": json.dumps(facts)})

    def restore(self, ppo: PPO, env: DecodeVecEnv) -> None:
        """Puts algorithm, environment, random generators and this callback back to where the checkpoint was saved.

        Raises:
            InputError: If the checkpoint is damaged.
        """
        fix = "delete it to train again"
        tensors, metadata = read_tensors(self._checkpoint, fix=fix)
        try:
            facts = json.loads(metadata["facts"])
            self._restore(ppo, facts, tensors)
            episodes = facts["env"]
        except (RuntimeError, KeyError, TypeError, ValueError) as error:  # whole, but of another configuration
            raise InputError(f"{self._checkpoint}: damaged checkpoint ({error}); {fix}") from error
        ppo._last_obs = env.restart(episodes)
        ppo._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        self._resumed = True

    def _restore(self, ppo: PPO, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        ppo.policy.load_state_dict(_under(tensors, "policy."))
        optimizer_state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under(tensors, "optimizer.").items():
            key, field = name.split(".", 1)
            optimizer_state.setdefault(int(key), {})[field] = tensor
        optimizer = ppo.policy.optimizer
        optimizer.load_state_dict({"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]})
        ppo.num_timesteps = facts["num_timesteps"]
        ppo._n_updates = facts["n_updates"]
        self._updates = facts["updates"]
        self.best_score = facts["best_score"]
        self.curve = [(int(env_steps), float(score)) for env_steps, score in facts["curve"]]
        self.best_state = _under(tensors, "best.")
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        assert isinstance(numpy_state, dict)
        numpy_state["state"] = {"key": tensors["rng.numpy"].numpy().astype(np.uint32), "pos": facts["numpy_pos"]}
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(tensors["rng.torch"])
        if ppo.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], ppo.device)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def learn(
    ppo: PPO,
    callback: TrainingCallback,
    total_env_steps: int,
    log_dir: Path,
    hyper_parameters: HyperParameters | None = None,
) -> None:
    """Trains up to a total number of env steps, counting those before a resume, and considers the final network.

    The total is rounded up to whole rollouts: beyond its own end SB3's learning rate is negative.

    Args:
        ppo: The algorithm, new or restored.
        callback: Validates and saves.
        total_env_steps: Where training ends.
        log_dir: TensorBoard's files.
        hyper_parameters: Logged beside the scores; default: none.
    """
    # The restored part has been logged up to the checkpoint.
    ppo.set_logger(tensorboard_logger(log_dir, ppo.num_timesteps + 1 if callback.curve else 0))
    if hyper_parameters and not callback.curve:
        log_hyper_parameters(ppo.logger, hyper_parameters)
    per_rollout = ppo.n_steps * ppo.n_envs
    total = math.ceil(total_env_steps / per_rollout) * per_rollout
    schedule = ppo.learning_rate
    assert callable(schedule)
    # SB3 takes the progress after a rollout for the update from it, so the last one would be made at rate 0.
    ppo.lr_schedule = lambda remaining: schedule(remaining + per_rollout / total)
    if ppo.num_timesteps < total:
        ppo.learn(total - ppo.num_timesteps, callback=callback, reset_num_timesteps=False)
    callback.consider(precision_net(ppo))
    ppo.logger.dump(ppo.num_timesteps)
