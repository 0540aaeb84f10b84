"""The task: what an action means, what a step earns and what is seen; and the configuration of the environments.

A task knows nothing of how tokens are decoded. It turns actions into decisions, the facts of a step into its reward,
and signals into observations, so all of it is tested without a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.profile import Profile

# cli.py takes it from here until its rewrite has landed: hence the alias.
from flexquant_rl.engine.control.request import check_kl_weight as check_kl_weight
from flexquant_rl.engine.control.signals import SIGNAL_LIMIT, SignalSchema
from flexquant_rl.engine.decoding.decoder import DecoderModel
from flexquant_rl.engine.decoding.next_token import check_sampling
from flexquant_rl.engine.errors import InputError

if TYPE_CHECKING:  # episodes take their shape from the configuration that is defined here
    from flexquant_rl.fq_env.episodes import Episodes, StepFacts

Source = Literal["replay", "free"]
ActionForm = Literal["bit_widths", "num_low_units"]

StaticAllocator = Callable[[Tensor], Tensor]
"""KL weights `[R]` -> bit-widths `[R, U]` of the best static allocation at each."""


@dataclass(frozen=True)
class EnvConfig:
    """Configuration of the environments; saved with every run."""

    prompt_tokens: int = 32
    """Tokens of context before the first decision, read at the largest width."""
    max_new_tokens: int = 64
    """Decode steps per episode."""
    source: Source = "replay"
    """Next token from the text (`replay`) or from the model itself (`free`)."""
    temperature: float = 0.0
    """With `free`: 0 is greedy, above 0 samples."""
    action: ActionForm = "bit_widths"
    """One width per unit, or FlexQuant's form: how many units, least sensitive first, run low."""
    low_width: int = 4
    """With `num_low_units`: width of the low units."""
    high_width: int = 8
    """With `num_low_units`: width of the others."""
    kl_weight: float | None = None
    """Price of a nat of output KL in units of speedup; None draws it log-uniformly per episode."""
    kl_weight_min: float = 2.0
    """Lower end of the drawn dial."""
    kl_weight_max: float = 200.0
    """Upper end of the drawn dial."""
    probe_every: int = 0
    """Every so many tokens the reference width is run as well and its time charged; 0 never."""

    @property
    def window_tokens(self) -> int:
        """Tokens of text per episode: prompt, continuation, and the target of the last step."""
        return self.prompt_tokens + self.max_new_tokens + 1

    def validate(self) -> None:
        """Raises InputError on values that make no episode."""
        for name, value, allowed in (("source", self.source, Source), ("action", self.action, ActionForm)):
            if value not in get_args(allowed):
                raise InputError(f"{name}={value} is not known; choose one of {', '.join(get_args(allowed))}")
        if self.prompt_tokens < 1 or self.max_new_tokens < 1:
            raise InputError(
                f"prompt_tokens={self.prompt_tokens}, max_new_tokens={self.max_new_tokens}: both must be at least 1"
            )
        if self.kl_weight is not None:
            check_kl_weight(self.kl_weight)
        if not 0 < self.kl_weight_min <= self.kl_weight_max < math.inf:
            raise InputError(
                f"kl_weight_min={self.kl_weight_min:g} and kl_weight_max={self.kl_weight_max:g} must be positive, "
                "finite and ordered; swap or change them"
            )
        check_sampling(self.temperature)
        if self.action == "num_low_units" and self.low_width >= self.high_width:
            raise InputError(f"low_width={self.low_width} must be below high_width={self.high_width}; swap them")
        if self.probe_every < 0:
            raise InputError(f"probe_every={self.probe_every} must not be negative; 0 never probes")


@dataclass(frozen=True)
class Reward:
    """What one step earns; every tensor is `[R]` float32.

    Attributes:
        total: What the agent is given.
        terms: Its parts, and what explains them, by their names in `info`.
    """

    total: Tensor
    terms: dict[str, Tensor]


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

    def start(self, episodes: Episodes, rows: Tensor) -> None:
        """Learns that rows `[R']` have just started."""

    def to_decision(self, actions: Tensor) -> Decision:
        """Actions `[R, ...]` int64 to the decision of a step."""

    def to_actions(self, decision: Decision) -> Tensor:
        """The inverse of `to_decision`, for imitation."""

    def reward(self, facts: StepFacts) -> Reward:
        """What a step earns."""

    def observation(self, signals: Tensor) -> Tensor:
        """Signals `[R, dim]` to observations, `[R, ...]` float32 within the space."""


def info_columns(facts: StepFacts, reward: Reward) -> dict[str, Tensor]:
    """What `info` says of a step: the terms of the reward, the facts that they come from, the dial; each `[R]`."""
    return {
        **reward.terms,
        "output_kl_nats": facts.output_kl_nats,
        "latency_ms": facts.latency_ms.float(),
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
            self._static_reward = torch.zeros(episodes.num_rows, self._config.max_new_tokens)
        kl_weight = episodes.kl_weight[rows]
        widths = self._static(kl_weight)
        kl = episodes.text_kl_nats(rows, widths)
        speedup = episodes.cost.speedup(widths)[:, None]
        self._static_reward[rows] = lossy_reward(speedup, kl, kl_weight[:, None]).total

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
        """`speedup - 1 - kl_weight * output_kl_nats`, less what the static allocation earns at the same token."""
        speedup = (facts.full_latency_ms / facts.latency_ms).float()
        plain = lossy_reward(speedup, facts.output_kl_nats, facts.kl_weight)
        if self._static_reward is None:
            return plain
        rows = torch.arange(len(facts.position))
        return Reward(plain.total - self._static_reward[rows, facts.position], plain.terms)

    def observation(self, signals: Tensor) -> Tensor:
        """The signals as they are."""
        return signals


def lossy_reward(speedup: Tensor, output_kl_nats: Tensor, kl_weight: Tensor) -> Reward:
    """`speedup - 1 - kl_weight * output_kl_nats`, a pure function; 0 at the largest width without any loss.

    Its terms are `reward_plain`, the total; `reward_latency`, `speedup - 1`; `reward_quality`, the KL's cost; and
    `speedup`.
    """
    latency = (speedup - 1).float()
    quality = (kl_weight * output_kl_nats).float()
    total = latency - quality
    return Reward(
        total,
        {"reward_plain": total, "reward_latency": latency, "reward_quality": quality, "speedup": speedup.float()},
    )


def draw_kl_weight(generator: np.random.Generator, config: EnvConfig) -> float:
    """The fixed dial, or one drawn log-uniformly from the configured range."""
    if config.kl_weight is not None:
        return config.kl_weight
    return float(np.exp(generator.uniform(np.log(config.kl_weight_min), np.log(config.kl_weight_max))))
