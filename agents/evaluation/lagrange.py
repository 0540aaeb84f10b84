"""Widths for every token and unit by a Lagrange multiplier: a nat of KL has one price in time, wherever it is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.agents.preparation import Prepared

_LOG_RANGE = (-18.0, 8.0)
_BISECTIONS = 48


@dataclass(frozen=True)
class Lagrange:
    """The widths of least `multiple * sensitivity + multiplier * time`, each unit by itself.

    The multiple of a token is how much more it needs the bits of a unit than tokens do on average. Where it is 1
    everywhere this is the static knapsack, as far as it is convex.

    Attributes:
        sensitivity: `[U, W]` nats, of the mean token.
        time: `[U, W]` shares of a full-width step.
        bit_widths: `[W]` int64.
        fixed_time: Share of a step that no width changes.
    """

    sensitivity: Tensor
    time: Tensor
    bit_widths: Tensor
    fixed_time: float

    @staticmethod
    def of(prepared: Prepared) -> Lagrange:
        """That of a model's profile and latencies."""
        cost = prepared.cost
        full_ms = float(cost.latency_ms(cost.full_width()))
        time = cost.unit_ms / full_ms
        return Lagrange(
            sensitivity=prepared.profile.sensitivity.double(),
            time=time,
            bit_widths=torch.tensor(prepared.model.bit_widths),
            fixed_time=1 - float(time[:, -1].sum()),
        )

    def widths(self, unit_idx: int, log_multiples: Tensor, multiplier: float) -> Tensor:
        """Widths of a unit, `[...]` logarithms -> `[...]` int64."""
        return self.bit_widths[self._columns(unit_idx, log_multiples, multiplier)]

    def time_share(self, log_multiples: Sequence[Tensor], multiplier: float) -> float:
        """Mean time of a step; for each unit the multiples of all tokens."""
        return self.fixed_time + sum(
            float(self.time[unit_idx][self._columns(unit_idx, one, multiplier)].mean())
            for unit_idx, one in enumerate(log_multiples)
        )

    def meet(self, log_multiples: Sequence[Tensor], time_budget: float) -> float:
        """The multiplier at which the mean step takes at most a share of full-width time, and nearly that."""
        return math.exp(
            least_within(lambda log: self.time_share(log_multiples, math.exp(log)), time_budget, *_LOG_RANGE)
        )

    def _columns(self, unit_idx: int, log_multiples: Tensor, multiplier: float) -> Tensor:
        price = log_multiples.double().exp()[..., None] * self.sensitivity[unit_idx] + multiplier * self.time[unit_idx]
        return price.argmin(-1)


def least_within(time_share: Callable[[float], float], time_budget: float, low: float, high: float) -> float:
    """The least number from `low` to `high` at which a time share that falls with it is within a budget, nearly."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if time_share(middle) > time_budget else (low, middle)
    return high


def centred(log_multiples: Tensor) -> Tensor:
    """Logarithms whose multiples have a mean of 1 over all tokens."""
    return log_multiples - log_multiples.double().exp().mean().log()
