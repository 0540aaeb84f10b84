"""The task: what an action means, what a step earns and what is seen.

A task knows nothing of how tokens are decoded. It turns actions into decisions, the facts of a step into its reward,
and signals into observations, so all of it is tested without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SIGNAL_LIMIT, SignalSchema
from flexquant_rl.engine.decoding.decoder import DecoderModel
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.config import EnvConfig

if TYPE_CHECKING:  # named only: no task makes episodes
    from flexquant_rl.fq_env.episodes import Episodes, StepFacts

StaticAllocator = Callable[[Tensor], Tensor]
"""KL weights `[R]` -> bit-widths `[R, U]` of the best static allocation at each."""


@dataclass(frozen=True)
class Reward:
    """What one step earns; every tensor is `[R]` float32.

    Attributes:
        total: What the agent is given.
        terms: Its parts, and what explains them, by their names in `info`.
    """

    total: Tensor
    terms: dict[str, Tensor]


class EpisodeRows(Protocol):
    """R episodes in lockstep, each of which can be restarted: what an environment plays by the rules of a task."""

    options: ClassVar[tuple[str, ...]]
    """What `reset` may fix: `window`, and the dial where there is one."""

    @property
    def num_rows(self) -> int:
        """R."""

    @property
    def windows(self) -> Sized:
        """What an episode can be of."""

    def draw_dials(self, generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Dials of episodes that start together, `[count]`."""

    def start(self, rows: Tensor, windows: Tensor, kl_weight: Tensor, seeds: Tensor) -> None:
        """Starts episodes in rows `[R']`."""

    def step(self, decision: Any) -> Any:
        """One step of every row, as a decision of the task says; its facts."""

    def signals(self) -> Tensor:
        """What is known before the next step, `[R, dim]` float32."""

    def coloured(self, row: int) -> str:
        """A row's text so far, for `render`."""

    def close(self) -> None:
        """Frees what is held; closing twice is fine."""


class Task(Protocol):
    """What an action means, what a step earns and what is seen, for R episodes at once."""

    @property
    def action_space(self) -> gym.Space[Any]:
        """Actions of one episode."""

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Observations of one episode, a `Box` of float32."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the elements of an observation, in order."""

    def start(self, episodes: Any, rows: Tensor) -> None:
        """Learns that rows `[R']` have just started."""

    def to_decision(self, actions: Tensor) -> Any:
        """Actions `[R, ...]` int64 to the decision of a step."""

    def to_actions(self, decision: Any) -> Tensor:
        """The inverse of `to_decision`, for imitation."""

    def reward(self, facts: Any) -> Reward:
        """What a step earns."""

    def info(self, facts: Any, reward: Reward) -> dict[str, Tensor]:
        """What `info` says of a step, `[R]` each."""

    def observation(self, signals: Tensor) -> Tensor:
        """Signals `[R, dim]` to observations, `[R, ...]` float32 within the space."""


def info_columns(facts: StepFacts, reward: Reward) -> dict[str, Tensor]:
    """What `info` says of a step: the terms of the reward, the facts that they come from, the dial; each `[R]`."""
    return {
        **reward.terms,
        "output_kl_nats": facts.output_kl_nats,
        "latency_ms": facts.latency_ms.float(),
        "full_latency_ms": torch.full_like(facts.latency_ms, facts.full_latency_ms).float(),
        "mean_bit_width": facts.mean_bit_width,
        "kl_weight": facts.kl_weight,
    }


class LossyTask:
    """The token of every step is kept, whatever its widths: time saved is weighed against output KL.

    With a `static` allocator the reward is the *advantage over the best static allocation at the row's dial* on the
    same token. What is subtracted depends on no action, so the best policy is the same, and the noise of easy and hard
    text is gone.

    Args:
        model: The model that is decoded with.
        profile: Profile of the model; gives the order of the units for `num_low_units`.
        config: Form of the action, dial.
        static: Gives the control variate's allocation; None for no control variate. With `source="replay"` only. A task
            with one belongs to one batch of episodes.

    Raises:
        InputError: If `low_width` or `high_width` is not stored, or a control variate is asked for in free text.
    """

    def __init__(
        self, model: DecoderModel, profile: Profile, config: EnvConfig, *, static: StaticAllocator | None = None
    ) -> None:
        if static is not None and config.source == "free":
            raise InputError("a control variate needs source=replay: with source=free the text depends on the actions")
        self._config = config
        self._static = static
        self._static_reward: Tensor | None = None  # [R, max_new_tokens]
        self._bit_widths = torch.tensor(model.bit_widths)
        self._schema = SignalSchema(model.num_units, model.bit_widths)
        self._unit_names = tuple(unit.name for unit in model.units)
        self._rank = torch.empty(model.num_units, dtype=torch.int64)
        if config.action == "num_low_units":
            for name, width in (("low_width", config.low_width), ("high_width", config.high_width)):
                if width not in model.bit_widths:
                    raise InputError(f"{name}={width} is not stored; choose one of {model.bit_widths}")
            sensitivity = profile.sensitivity[:, model.bit_widths.index(config.low_width)]
            self._rank[sensitivity.argsort(stable=True)] = torch.arange(model.num_units)

    @property
    def action_space(self) -> gym.Space[Any]:
        """The index of a stored width for every unit, or how many units run low."""
        if self._config.action == "num_low_units":
            return gym.spaces.Discrete(self._schema.num_units + 1)
        return gym.spaces.MultiDiscrete([len(self._bit_widths)] * self._schema.num_units)

    @property
    def observation_space(self) -> gym.spaces.Box:
        """The signals."""
        return gym.spaces.Box(-SIGNAL_LIMIT, SIGNAL_LIMIT, (self._schema.dim,), dtype=np.float32)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Signals of the token, then `<unit>/<signal>` for every unit."""
        of_units = (f"{unit}/{signal}" for unit in self._unit_names for signal in self._schema.unit_names)
        return (*self._schema.global_names, *of_units)

    def start(self, episodes: Episodes, rows: Tensor) -> None:
        """Computes what the static allocation earns at every token of the rows' text."""
        if self._static is None:
            return
        if self._static_reward is None:
            self._static_reward = torch.zeros(episodes.num_rows, self._config.max_new_tokens, dtype=torch.float32)
        kl_weight = episodes.kl_weight[rows]
        widths = self._static(kl_weight)
        kl = episodes.text_kl_nats(rows, widths)
        time_share = episodes.cost.time_share(widths)[:, None]
        self._static_reward[rows] = lossy_reward(time_share, kl, kl_weight[:, None]).total

    def to_decision(self, actions: Tensor) -> Decision:
        """Actions `[R, U]`, or `[R]` with `num_low_units`, to bit-widths."""
        if self._config.action == "num_low_units":
            low = self._rank < actions.view(-1, 1)
            return Decision(torch.where(low, self._config.low_width, self._config.high_width))
        return Decision(self._bit_widths[actions])

    def to_actions(self, decision: Decision) -> Tensor:
        """See `Task.to_actions`."""
        if self._config.action == "num_low_units":
            return (decision.bit_widths == self._config.low_width).sum(-1)
        return torch.searchsorted(self._bit_widths, decision.bit_widths.contiguous())

    def reward(self, facts: StepFacts) -> Reward:
        """See `lossy_reward`; less what the static allocation earns at the same token, where there is one."""
        plain = lossy_reward(facts.latency_ms / facts.full_latency_ms, facts.output_kl_nats, facts.kl_weight)
        if self._static_reward is None:
            return plain
        rows = torch.arange(len(facts.position))
        return Reward(plain.total - self._static_reward[rows, facts.position], plain.terms)

    def info(self, facts: StepFacts, reward: Reward) -> dict[str, Tensor]:
        """See `info_columns`."""
        return info_columns(facts, reward)

    def observation(self, signals: Tensor) -> Tensor:
        """The signals as they are."""
        return signals


def lossy_reward(time_share: Tensor, output_kl_nats: Tensor, kl_weight: Tensor) -> Reward:
    """`1 - time_share - kl_weight * output_kl_nats`, a pure function; 0 at the largest width without any loss.

    A measured profile charges every action of an environment the controller's time, so its time share at the largest
    width is above 1.

    It adds up: N tokens earn `N - T / t_full - kl_weight * KL`, where T is their time, t_full the time of a step at the
    largest width and KL the sum of theirs. A mean of speedups would not: it pays for steps of unequal length.

    Args:
        time_share: Latency over that of a step at the largest width everywhere.
        output_kl_nats: KL(reference || quantised), nats.
        kl_weight: Price of a nat in full-width steps.

    Returns:
        The total, and its terms: `reward_plain`, the total; `time_saved`, `1 - time_share`; `kl_cost`, the priced KL.
        All three are shares of a full-width step.
    """
    time_saved = (1 - time_share).float()
    kl_cost = (kl_weight * output_kl_nats).float()
    total = time_saved - kl_cost
    return Reward(total, {"reward_plain": total, "time_saved": time_saved, "kl_cost": kl_cost})


def draw_kl_weights(generator: np.random.Generator, config: EnvConfig, count: int) -> NDArray[np.float64]:
    """The fixed dial, or dials drawn from the configured range, evenly on a log scale: `[count]`.

    One is drawn log-uniformly from each of `count` equal parts of the log range, in a random order. Each by itself is
    log-uniform over the whole range, and together they leave no part of it out, as independent draws do.
    """
    if config.kl_weight is not None:
        return np.full(count, config.kl_weight, dtype=np.float64)
    share = (generator.permutation(count) + generator.uniform(size=count)) / count
    low, high = np.log(config.kl_weight_min), np.log(config.kl_weight_max)
    dials: NDArray[np.float64] = np.exp(low + share * (high - low))
    return dials
