"""The task, apart from any model: episode shape, reward terms and how a flat action becomes bit-widths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.errors import InputError

Source = Literal["replay", "free"]
ActionForm = Literal["bit_widths", "num_low_units"]


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
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature:g} must be finite and not negative; 0 is greedy")
        if self.action == "num_low_units" and self.low_width >= self.high_width:
            raise InputError(f"low_width={self.low_width} must be below high_width={self.high_width}; swap them")
        if self.probe_every < 0:
            raise InputError(f"probe_every={self.probe_every} must not be negative; 0 never probes")


def check_kl_weight(kl_weight: float) -> None:
    """Raises InputError on a dial setting that prices nothing."""
    if not 0 < kl_weight < math.inf:
        raise InputError(f"kl_weight={kl_weight:g} must be positive and finite; small means fast, large means exact")


@dataclass(frozen=True)
class RewardTerms:
    """Reward of one step per row, and its parts; every tensor is `[R]` float32.

    Attributes:
        total: `latency - quality`.
        latency: `speedup - 1`.
        quality: `kl_weight * output_kl_nats`, a cost.
    """

    total: Tensor
    latency: Tensor
    quality: Tensor


def reward_terms(speedup: Tensor, output_kl_nats: Tensor, kl_weight: Tensor) -> RewardTerms:
    """`speedup - 1 - kl_weight * output_kl_nats`, a pure function; 0 at the largest width without any loss."""
    latency = (speedup - 1).float()
    quality = (kl_weight * output_kl_nats).float()
    return RewardTerms(latency - quality, latency, quality)


class ActionMap:
    """Turns actions into bit-widths.

    Args:
        profile: Gives the stored widths and, for `num_low_units`, the order of the units.
        config: Which form.

    Raises:
        InputError: If `low_width` or `high_width` is not stored.
    """

    def __init__(self, profile: Profile, config: EnvConfig) -> None:
        self.config = config
        self.bit_widths = torch.tensor(profile.bit_widths)
        self.num_units = len(profile.sensitivity)
        if config.action == "num_low_units":
            for name, width in (("low_width", config.low_width), ("high_width", config.high_width)):
                if width not in profile.bit_widths:
                    raise InputError(f"{name}={width} is not stored; choose one of {profile.bit_widths}")
            column = profile.bit_widths.index(config.low_width)
            rank = torch.empty(self.num_units, dtype=torch.int64)
            rank[profile.sensitivity[:, column].argsort(stable=True)] = torch.arange(self.num_units)
            self._rank = rank

    @property
    def choices(self) -> list[int]:
        """Sizes of the discrete action: `[W] * U`, or `[U + 1]`."""
        if self.config.action == "num_low_units":
            return [self.num_units + 1]
        return [len(self.bit_widths)] * self.num_units

    def to_bit_widths(self, actions: Tensor) -> Tensor:
        """`[R, len(choices)]` int64 -> `[R, U]` int64 bit-widths."""
        if self.config.action == "num_low_units":
            return torch.where(self._rank < actions.view(-1, 1), self.config.low_width, self.config.high_width)
        return self.bit_widths[actions]

    def from_bit_widths(self, bit_widths: Tensor) -> Tensor:
        """Inverse of `to_bit_widths`, for imitation: `[R, U]` -> actions."""
        if self.config.action == "num_low_units":
            return (bit_widths == self.config.low_width).sum(-1, keepdim=True)
        return torch.searchsorted(self.bit_widths, bit_widths.contiguous())


def draw_kl_weight(generator: np.random.Generator, config: EnvConfig) -> float:
    """The fixed dial, or one drawn log-uniformly from the configured range."""
    if config.kl_weight is not None:
        return config.kl_weight
    return float(np.exp(generator.uniform(np.log(config.kl_weight_min), np.log(config.kl_weight_max))))
