"""One width for every unit and token: what quantisation without control does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.unbound import Family, PolicyContext, check_width
from flexquant_rl.engine.control.decision import StaticAllocation


@dataclass(frozen=True)
class Fixed:
    """The same width everywhere.

    Attributes:
        bit_width: The width, one of those that the model stores.
    """

    family: ClassVar[Family] = Family("fixed", "fixed (static)", "#333333", "D", is_static=True)

    bit_width: int

    def __post_init__(self) -> None:
        check_width("bit_width", self.bit_width)

    def bind(self, context: PolicyContext) -> StaticAllocation:
        """See `UnboundPolicy`."""
        name = policy_name(self)
        context.column(self.bit_width, name)
        return StaticAllocation(name, torch.full((context.schema.num_units,), self.bit_width))
