"""The vector environment with stable-baselines3's interface, restartable bit for bit: what training runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn
from torch import Tensor

from flexquant_rl.fq_env.arguments import actions_of, seed_of
from flexquant_rl.fq_env.episodes import Episodes, StepFacts
from flexquant_rl.fq_env.live_rounds import LiveRounds
from flexquant_rl.fq_env.task import EpisodeRows, Reward, Task
from flexquant_rl.fq_env.trace_rounds import TraceRounds
from flexquant_rl.fq_env.verified import VerifiedTask


class EpisodeVecEnv(VecEnv):
    """R episodes in lockstep, with automatic restart. One generator draws for all rows.

    The dials of rows that start together are drawn together (`draw_dials`).

    Attributes:
        waits_for_reset: Whether rows that have all ended wait for `reset`, for a caller that may need no more episodes.
            What the last step returns is then the episodes' last observation. The episodes that follow are the same.

    Args:
        episodes: R rows.
        task: What actions mean, what steps earn, what is seen.
        seed: Seed of prompts, dials and sampling.
    """

    def __init__(self, episodes: EpisodeRows, task: Task, *, seed: int = 0) -> None:
        self.episodes = episodes
        self.task = task
        self.feature_names = task.feature_names
        self.last_facts: Any = None
        self.last_reward: Reward | None = None
        self.render_mode = None
        self.waits_for_reset = False
        self._rng = np.random.default_rng(seed_of(seed))
        self._restart_state: dict[str, Any] = {}
        self._aligned = False
        self._pending: Tensor | None = None
        super().__init__(episodes.num_rows, task.observation_space, task.action_space)

    @property
    def aligned(self) -> bool:
        """Whether all rows are at the first step of an episode that started together."""
        return self._aligned

    def restart_state(self) -> dict[str, Any]:
        """JSON-able state from which `restart` begins the very episodes that are now at their first step."""
        return self._restart_state

    def restart(self, state: dict[str, Any]) -> NDArray[np.float32]:
        """Starts all rows as they were started when `restart_state` returned `state`."""
        self._rng.bit_generator.state = state
        return self.reset()

    def reset(self) -> NDArray[np.float32]:
        """Starts a new episode in every row."""
        self._restart_state = dict(self._rng.bit_generator.state)
        self._start(torch.arange(self.num_envs))
        self._aligned = True
        return self._observations()

    def _start(self, rows: Tensor) -> None:
        count = len(rows)
        windows = self._rng.integers(len(self.episodes.windows), size=count)
        dials = self.episodes.draw_dials(self._rng, count)
        seeds = self._rng.integers(1 << 62, size=count)
        self.episodes.start(rows, torch.from_numpy(windows), torch.from_numpy(dials).float(), torch.from_numpy(seeds))
        self.task.start(self.episodes, rows)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Takes the actions of all rows; raises InputError on one that is not in the action space."""
        self._pending = actions_of(actions, self.action_space, self.num_envs)

    def step_wait(self) -> VecEnvStepReturn:
        """Decodes one token in every row and restarts the rows that end with it; see `waits_for_reset`."""
        assert self._pending is not None, "step_async() first"
        facts = self.episodes.step(self.task.to_decision(self._pending))
        reward = self.task.reward(facts)
        self._pending = None
        self._aligned = False
        self.last_facts, self.last_reward = facts, reward
        infos = _rows(self.task.info(facts, reward))
        observations = self._observations()
        ended = (facts.terminated | facts.truncated).numpy()
        if ended.any():
            for row in ended.nonzero()[0]:
                infos[row]["terminal_observation"] = observations[row].copy()
                infos[row]["TimeLimit.truncated"] = bool(facts.truncated[row])
            if ended.all():
                observations = observations if self.waits_for_reset else self.reset()
            else:
                self._start(torch.from_numpy(ended.nonzero()[0]))
                observations = self._observations()
        return observations, reward.total.numpy(), ended, infos

    def _observations(self) -> NDArray[np.float32]:
        observations: NDArray[np.float32] = self.task.observation(self.episodes.signals()).cpu().numpy()
        return observations

    def close(self) -> None:
        """Frees the decoders."""
        self.episodes.close()

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds prompts, dials and sampling from the next reset on."""
        self._rng = np.random.default_rng(seed_of(seed))
        return [seed] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of the whole batch, once per requested row."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: rows share one model and one configuration."""
        raise AttributeError(f"{attr_name}: the rows of a vector environment share one configuration; build a new one")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refused: there are no single environments inside."""
        raise AttributeError(f"{method_name}: a vector environment has no single environments inside")

    def env_is_wrapped(self, wrapper_class: Any, indices: VecEnvIndices = None) -> list[bool]:
        """Rows are never wrapped."""
        return [False] * len(list(self._get_indices(indices)))


class DecodeVecEnv(EpisodeVecEnv):
    """`EpisodeVecEnv` of a model that decodes.

    The dials of rows that start together are stratified: they cover the log range evenly (`draw_kl_weights`).

    Args:
        episodes: R rows.
        task: What actions mean, what steps earn, what is seen.
        seed: Seed of prompts, dials and sampling.
    """

    episodes: Episodes
    last_facts: StepFacts | None

    def __init__(self, episodes: Episodes, task: Task, *, seed: int = 0) -> None:
        super().__init__(episodes, task, seed=seed)


class VerifiedVecEnv(EpisodeVecEnv):
    """The same with stable-baselines3's interface, masks as sb3-contrib asks for them.

    Args:
        rounds: R rows.
        task: Their task.
        seed: Seed of which sequences are played.
    """

    episodes: TraceRounds | LiveRounds

    def __init__(self, rounds: TraceRounds | LiveRounds, task: VerifiedTask, *, seed: int = 0) -> None:
        super().__init__(rounds, task, seed=seed)

    def action_masks(self) -> NDArray[np.bool_]:
        """`[R, L + 1]`: which actions do what they say."""
        return self.episodes.action_masks()

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """The masks of the rows; there are no other methods of single environments."""
        if method_name != "action_masks":
            return super().env_method(method_name, *method_args, indices=indices, **method_kwargs)
        masks = self.action_masks()
        return [masks[index] for index in self._get_indices(indices)]


def _rows(columns: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Columns `[R]` as one dictionary for each row."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
