"""Random widths of a given mean: the control for "any mix works"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.unbound import Family, PolicyContext, check_width
from flexquant_rl.engine.control.decision import PositionPolicy
from flexquant_rl.engine.errors import InputError

_SEED_LIMIT = 2**63


@dataclass(frozen=True)
class RandomWidths:
    """Draws each unit's width anew at every token, from the two stored widths around a mean.

    The bound policy owns a seeded generator: the only one of its kind that is no pure function of the position.

    Attributes:
        mean_bit_width: Expected width of every unit, bits.
        seed: Seed of the draws.
    """

    family: ClassVar[Family] = Family("random", "random", "#8c8c8c", "x")

    mean_bit_width: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_width("mean_bit_width", self.mean_bit_width)
        if not 0 <= self.seed < _SEED_LIMIT:
            raise InputError(f"seed={self.seed} seeds nothing; choose one from 0 to {_SEED_LIMIT - 1}")

    def bind(self, context: PolicyContext) -> PositionPolicy:
        """See `UnboundPolicy`."""
        name = policy_name(self)
        context.check_mean(self.mean_bit_width, name)
        widths = context.profile.bit_widths
        low = max(width for width in widths if width <= self.mean_bit_width)
        high = min(width for width in widths if width >= self.mean_bit_width)
        share_high = (self.mean_bit_width - low) / (high - low) if high > low else 0.0
        generator = torch.Generator().manual_seed(self.seed)

        def at(positions: Tensor) -> Tensor:
            draws = torch.rand(len(positions), context.schema.num_units, generator=generator)
            return torch.where(draws < share_high, high, low)

        return PositionPolicy(name, at, context.schema.tokens_decoded)
