"""The vector environment: R episodes through one pass per step, with Gymnasium's interface.

It restarts a row in the step that ends its episode (`AutoresetMode.SAME_STEP`): that step's observation is the first of
the next episode, and `info` keeps the last one of the old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import shown
from flexquant_rl.fq_env.arguments import actions_of, options_of, seed_of
from flexquant_rl.fq_env.environment import METADATA, check_render_mode, draw_episode
from flexquant_rl.fq_env.task import EpisodeRows, Task

Observations = NDArray[np.float32]
Flags = NDArray[np.bool_]


class VectorEnvironment(VectorEnv[Observations, Any, NDArray[Any]]):
    """R episodes, played by the rules of a task; row i gives what an `Environment` with its seed gives.

    Args:
        episodes: R rows.
        task: What actions mean, what steps earn, what is seen.
        render_mode: `ansi` for `render` to return every row's coloured continuation.
    """

    metadata = {**METADATA, "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012  # Gymnasium declares it so

    def __init__(self, episodes: EpisodeRows, task: Task, *, render_mode: str | None = None) -> None:
        check_render_mode(render_mode)
        self.episodes = episodes
        self.task = task
        self.render_mode = render_mode
        self.num_envs = episodes.num_rows
        self.single_action_space = task.action_space
        self.single_observation_space = task.observation_space
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self._generators = [seeding.np_random()[0] for _ in range(self.num_envs)]

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the elements of one row's observation, in order."""
        return self.task.feature_names

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Starts episodes.

        Args:
            seed: One for each row; an integer stands for seed, seed + 1, ...; None goes on in the rows' own streams.
            options: `window` and `kl_weight` fix text and dial, for all rows or `[R]`. `reset_mask`, `[R]` bool,
                restarts some rows only.

        Raises:
            InputError: If there are not R seeds, the mask is not one for R rows that restarts any, or an option or a
                seed is none that can be had.
        """
        seeds = self._seeds(seed)
        options = options_of(options, (*self.episodes.options, "reset_mask"))
        restarted = self._reset_mask(options)
        if seeds is not None:
            for row in restarted.nonzero()[0].tolist():
                if seeds[row] is not None:
                    self._generators[row], _ = seeding.np_random(seeds[row])
        infos: dict[str, Any] = {}
        _put(infos, restarted, self._start(restarted, options))
        return self._observations(), infos

    def step(self, actions: Any) -> tuple[Observations, NDArray[Any], Flags, Flags, dict[str, Any]]:
        """Decodes one token in every row and restarts the rows that end with it.

        For these rows `infos["final_obs"]` and `infos["final_info"]` hold what the last step of the old episode gave,
        and the other entries are those of the new one.

        Raises:
            InputError: If an action is not in the action space.
        """
        actions = actions_of(actions, self.single_action_space, self.num_envs)
        facts = self.episodes.step(self.task.to_decision(actions))
        reward = self.task.reward(facts)
        columns = {name: column.double().numpy() for name, column in self.task.info(facts, reward).items()}
        observations = self._observations()
        ended: Flags = (facts.terminated | facts.truncated).numpy()
        infos: dict[str, Any] = {}
        _put(infos, ~ended, columns)
        if ended.any():
            final: dict[str, Any] = {}
            _put(final, ended, columns)
            last = np.full(self.num_envs, None, dtype=object)
            for row in ended.nonzero()[0]:
                last[row] = observations[row]
            infos |= {"final_obs": last, "_final_obs": ended, "final_info": final, "_final_info": ended}
            _put(infos, ended, self._start(ended, {}))
            observations = self._observations()
        return (
            observations,
            reward.total.double().numpy(),
            facts.terminated.numpy(),
            facts.truncated.numpy(),
            infos,
        )

    def render(self) -> tuple[str, ...] | None:
        """With `render_mode="ansi"`: the continuation of each row, each token on the colour of its mean width."""
        return None if self.render_mode is None else tuple(map(self.episodes.coloured, range(self.num_envs)))

    def close_extras(self, **kwargs: Any) -> None:
        """Frees the decoder."""
        if hasattr(self, "episodes"):
            self.episodes.close()

    def _start(self, restarted: Flags, options: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Starts rows and returns what `reset` tells of them, `[R]` each."""
        given = [name for name in self.episodes.options if name in options]
        fixed = {name: self._of_rows(options[name], name) for name in given}
        windows, dials = np.zeros(self.num_envs, dtype=np.int64), np.zeros(self.num_envs)
        seeds = np.zeros(self.num_envs, dtype=np.int64)
        for row in restarted.nonzero()[0].tolist():
            of_row: dict[str, Any] = {name: column[row] for name, column in fixed.items()}
            draw = draw_episode(self._generators[row], self.episodes, of_row)
            windows[row], dials[row], seeds[row] = draw.window, draw.kl_weight, draw.seed
        rows = torch.from_numpy(restarted.nonzero()[0])
        chosen = [torch.from_numpy(column[restarted]) for column in (windows, dials, seeds)]
        self.episodes.start(rows, chosen[0], chosen[1].float(), chosen[2])
        self.task.start(self.episodes, rows)
        told = {"window": windows, "kl_weight": dials}
        return {name: told[name] for name in self.episodes.options}

    def _seeds(self, seed: Any) -> list[int | None] | None:
        if seed is None or isinstance(seed, (int, np.integer)):
            first = seed_of(seed)
            return None if first is None else [seed_of(first + row) for row in range(self.num_envs)]
        if not isinstance(seed, (Sequence, np.ndarray)) or isinstance(seed, str):
            raise InputError(f"seed={shown(seed)} is not an integer; give one, or a list of one for each row")
        if len(seed) != self.num_envs:
            raise InputError(f"{len(seed)} seeds were given for {self.num_envs} rows; give one for each")
        return [seed_of(given) for given in seed]

    def _of_rows(self, given: Any, name: str) -> NDArray[Any]:
        """An option of all rows, or `[R]`, for each row."""
        try:
            return np.broadcast_to(given, self.num_envs)
        except ValueError as error:
            raise InputError(f"{name}={shown(given)} is not one for each of {self.num_envs} rows; give one") from error

    def _reset_mask(self, options: Mapping[str, Any]) -> Flags:
        if "reset_mask" not in options:
            return np.ones(self.num_envs, dtype=np.bool_)
        try:
            mask: Flags = np.asarray(options["reset_mask"])
        except ValueError:  # a ragged list
            mask = np.zeros(0, dtype=np.bool_)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise InputError(
                f"reset_mask={shown(options['reset_mask'])} must be {self.num_envs} booleans, at least one of them true"
            )
        return mask

    def _observations(self) -> Observations:
        observations: Observations = self.task.observation(self.episodes.signals()).cpu().numpy()
        return observations


def _put(infos: dict[str, Any], rows: Flags, columns: Mapping[str, NDArray[Any]]) -> None:
    """Enters columns for some rows; beside each, `_<name>` says which rows have an entry, as Gymnasium does it."""
    if not rows.any():
        return
    for name, values in columns.items():
        column = infos.setdefault(name, np.zeros(len(rows), dtype=values.dtype))
        has_entry = infos.setdefault(f"_{name}", np.zeros(len(rows), dtype=np.bool_))
        column[rows] = values[rows]
        has_entry |= rows
