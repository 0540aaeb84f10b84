"""The batched environment for stable-baselines3: N episodes through one model pass per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn
from torch import Tensor

from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SIGNAL_LIMIT
from flexquant_rl.engine.decoding.decoder import Decoder
from flexquant_rl.fq_env.batch import BatchStep, DecodeBatch, StaticAllocator
from flexquant_rl.fq_env.task import ActionMap, EnvConfig, draw_kl_weight


class DecodeVecEnv(VecEnv):
    """N `FlexQuant/Decode-v0` episodes in lockstep, with automatic restart.

    With a `static` allocator the reward is the *advantage over the best static allocation at the row's dial* on the
    same token; `info` always carries the plain reward and its terms. What is subtracted does not depend on any action,
    so the best policy is the same and the noise of easy and hard text is gone.

    Args:
        session: N rows of `config.window_tokens - 1` tokens.
        profile: Of the model.
        windows: `[n, window_tokens]` int64 to draw prompts from.
        config: Shape of the episodes.
        num_envs: N.
        seed: Of prompts, dials and sampling.
        eos_token_id: Ends an episode.
        static: Control variate.
    """

    def __init__(
        self,
        session: Decoder,
        profile: Profile,
        windows: Tensor,
        config: EnvConfig,
        *,
        num_envs: int,
        seed: int = 0,
        eos_token_id: int | None = None,
        static: StaticAllocator | None = None,
    ) -> None:
        self.batch = DecodeBatch(session, profile, config, num_rows=num_envs, eos_token_id=eos_token_id, static=static)
        self.actions_map = ActionMap(profile, config)
        self.last_step: BatchStep | None = None
        self._windows = windows
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._restart_state: dict[str, Any] = {}
        self._aligned = False
        self._pending: Tensor | None = None
        self.render_mode = None
        super().__init__(
            num_envs,
            gym.spaces.Box(-SIGNAL_LIMIT, SIGNAL_LIMIT, (self.batch.schema.dim,), dtype=np.float32),
            gym.spaces.MultiDiscrete(self.actions_map.choices),
        )

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
        picks = self._rng.integers(len(self._windows), size=count)
        dials = [draw_kl_weight(self._rng, self._config) for _ in range(count)]
        seeds = self._rng.integers(1 << 62, size=count)
        self.batch.reset(rows, self._windows[torch.from_numpy(picks)], torch.tensor(dials), torch.from_numpy(seeds))

    def step_async(self, actions: NDArray[Any]) -> None:
        """Takes the actions `[N, len(action)]`."""
        self._pending = torch.as_tensor(actions, dtype=torch.int64).view(self.num_envs, -1)

    def step_wait(self) -> VecEnvStepReturn:
        """Decodes one token in every row."""
        assert self._pending is not None, "step_async() first"
        result = self.batch.step(self.actions_map.to_bit_widths(self._pending))
        self._pending = None
        self._aligned = False
        self.last_step = result
        rewards = (result.reward.total - result.static_reward).numpy()
        dones = (result.terminated | result.truncated).numpy()
        infos: list[dict[str, Any]] = [*result.infos(self.batch.kl_weight)]
        observations = self._observations()
        if dones.any():
            for row in dones.nonzero()[0]:
                infos[row]["terminal_observation"] = observations[row].copy()
                infos[row]["TimeLimit.truncated"] = bool(result.truncated[row])
            if dones.all():
                observations = self.reset()
            else:
                self._start(torch.from_numpy(dones.nonzero()[0]))
                observations = self._observations()
        return observations, rewards, dones, infos

    def _observations(self) -> NDArray[np.float32]:
        observations: NDArray[np.float32] = self.batch.signals().cpu().numpy()
        return observations

    def close(self) -> None:
        """Frees the sessions."""
        self.batch.close()

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds prompts, dials and sampling from the next reset on."""
        self._rng = np.random.default_rng(seed)
        return [seed] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of the whole batch, once per requested row."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: rows share one model and one configuration."""
        raise AttributeError(f"{attr_name}: the rows of a DecodeVecEnv share one configuration; build a new one")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refused: there are no single environments inside."""
        raise AttributeError(f"{method_name}: a DecodeVecEnv has no single environments inside")

    def env_is_wrapped(self, wrapper_class: Any, indices: VecEnvIndices = None) -> list[bool]:
        """Rows are never wrapped."""
        return [False] * len(list(self._get_indices(indices)))
