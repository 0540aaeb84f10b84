"""One width for every unit and token: what quantisation without control does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.unbound import Family, PolicyContext, check_stored, check_width
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.signals import SignalSchema


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
        return self.allocation(context.schema)

    def allocation(self, schema: SignalSchema) -> StaticAllocation:
        """The widths of a model's units.

        Raises:
            InputError: If the width is not stored.
        """
        name = policy_name(self)
        check_stored(self.bit_width, schema.bit_widths, name)
        return StaticAllocation(name, torch.full((schema.num_units,), self.bit_width))
