"""The Gymnasium environment: one episode, one decode step per env step. Glue between episodes and a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from flexquant_rl.engine.control.dial import check_kl_weight
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import shown
from flexquant_rl.fq_env.arguments import actions_of, number_of, options_of, seed_of, window_of
from flexquant_rl.fq_env.task import EpisodeRows, Task

Observation = NDArray[np.float32]

METADATA: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}


class Environment(gym.Env[Observation, Any]):
    """One episode, played by the rules of a task.

    Args:
        episodes: One row.
        task: What actions mean, what steps earn, what is seen.
        render_mode: `ansi` for `render` to return the coloured continuation; the episodes need a tokenizer for it.
    """

    metadata = METADATA

    def __init__(self, episodes: EpisodeRows, task: Task, *, render_mode: str | None = None) -> None:
        if episodes.num_rows != 1:
            raise ValueError(f"{episodes.num_rows} rows; an Environment plays one, a VectorEnvironment plays several")
        check_render_mode(render_mode)
        self.episodes = episodes
        self.task = task
        self.render_mode = render_mode
        self.action_space = task.action_space
        self.observation_space = task.observation_space
        self._is_over = False

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the elements of an observation, in order."""
        return self.task.feature_names

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode; `options` may fix `window` (index into the split) and `kl_weight`.

        Raises:
            InputError: If seed or options are none that can be had.
        """
        super().reset(seed=seed_of(seed))
        draw = draw_episode(self.np_random, self.episodes, options_of(options, self.episodes.options))
        row = torch.tensor([0])
        windows, seeds = torch.tensor([draw.window]), torch.tensor([draw.seed])
        dials = torch.tensor([draw.kl_weight], dtype=torch.float32)
        self.episodes.start(row, windows, dials, seeds)
        self.task.start(self.episodes, row)
        self._is_over = False
        return self._observation(), draw.info(self.episodes.options)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decodes one token as the action says.

        Raises:
            InputError: If it is not in the action space, or the episode is over.
        """
        if self._is_over:
            raise InputError("the episode is over and has no further step; call reset()")
        actions = actions_of(action, self.action_space)
        facts = self.episodes.step(self.task.to_decision(actions))
        reward = self.task.reward(facts)
        self._is_over = bool(facts.terminated | facts.truncated)
        info = {name: column.item() for name, column in self.task.info(facts, reward).items()}
        return self._observation(), reward.total.item(), bool(facts.terminated), bool(facts.truncated), info

    def render(self) -> str | None:
        """With `render_mode="ansi"`: the continuation so far, each token on the colour of its mean width."""
        return None if self.render_mode is None else self.episodes.coloured(0)

    def close(self) -> None:
        """Frees the decoder; closing twice is fine."""
        if hasattr(self, "episodes"):
            self.episodes.close()

    def _observation(self) -> Observation:
        observation: Observation = self.task.observation(self.episodes.signals())[0].cpu().numpy()
        return observation


@dataclass(frozen=True)
class EpisodeDraw:
    """What chance decides of an episode.

    Attributes:
        window: Index of its text.
        kl_weight: Its dial.
        seed: Seed of its sampling.
    """

    window: int
    kl_weight: float
    seed: int

    def info(self, options: Sequence[str]) -> dict[str, Any]:
        """What `reset` tells of it: what could have been fixed."""
        return {name: getattr(self, name) for name in options}


def draw_episode(generator: np.random.Generator, episodes: EpisodeRows, options: Mapping[str, Any]) -> EpisodeDraw:
    """Draws an episode; what `options` fix is drawn all the same, so that it moves nothing else.

    Raises:
        InputError: If `options` fix a window that is no integer, or a dial that prices nothing.
    """
    window = int(generator.integers(len(episodes.windows)))
    kl_weight = float(episodes.draw_dials(generator, 1)[0])
    seed = int(generator.integers(1 << 62, size=1)[0])
    window = window_of(options.get("window", window), len(episodes.windows))
    kl_weight = number_of(options.get("kl_weight", kl_weight), "kl_weight")
    check_kl_weight(kl_weight)
    return EpisodeDraw(window, kl_weight, seed)


def check_render_mode(render_mode: str | None) -> None:
    """Raises InputError on a way of rendering that there is not."""
    if render_mode not in (None, *METADATA["render_modes"]):
        raise InputError(f"render_mode={shown(render_mode)} is not known; choose ansi or None")
