"""Where the widths of a step come from on the GPU: a table, or a learned policy that runs there too.

The step calls `choose`, which only launches: whatever it depends on is in tensors on the device, so that a captured
graph follows changes of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flexquant_rl.engine.control.decision import Policy, StaticAllocation
from flexquant_rl.engine.control.policy import LearnedPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import (
    SignalSchema,
    project_embedding,
    unit_constants,
    unit_depths,
)
from flexquant_rl.engine.decoding.decoder import check_bit_widths
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels.policy_net import PolicyWeights, choose_widths
from flexquant_rl.kernels.token_signals import SignalConstants, SignalState


class WidthSource(Protocol):
    """Writes the widths of the next step."""

    @property
    def constants(self) -> SignalConstants | None:
        """What signals are computed with before the next choice; None if nothing looks at them."""

    @property
    def num_units(self) -> int:
        """U."""

    def choose(self, bit_widths: Tensor, signals: SignalState | None, count: Tensor) -> None:
        """Writes `[U]` int32 from the signals and the steps made so far, `[1]` int64; all on the device, no waiting."""


class WidthTable:
    """Widths that are known in advance: row s of a table for step s, from the start again after the last row.

    Attributes:
        table: `[S, U]` int32 on the device; its entries may be overwritten, and a captured graph follows them.
        constants: None: nobody looks at signals.

    Args:
        table: `[S, U]` or `[U]` integers, widths from 1 to 8.
        device: Where the model is.
    """

    def __init__(self, table: Tensor, *, device: torch.device | str) -> None:
        table = table[None] if table.ndim == 1 else table
        self.table = table.to(device, torch.int32).contiguous()
        self.constants: SignalConstants | None = None
        self._row = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def num_units(self) -> int:
        """U."""
        return self.table.shape[1]

    def choose(self, bit_widths: Tensor, signals: SignalState | None, count: Tensor) -> None:
        """See `WidthSource`."""
        if len(self.table) == 1:
            bit_widths.copy_(self.table[0])
            return
        torch.remainder(count, len(self.table), out=self._row)
        torch.index_select(self.table, 0, self._row, out=bit_widths[None])


class LearnedWidths:
    """A learned policy on the device.

    Attributes:
        constants: Constants of the signals.

    Args:
        weights: The network.
        constants: Sensitivities, times and embeddings.
    """

    def __init__(self, weights: PolicyWeights, constants: SignalConstants) -> None:
        self._weights = weights
        self.constants: SignalConstants | None = constants
        self._num_units = len(constants.depth)

    @property
    def num_units(self) -> int:
        """U."""
        return self._num_units

    def choose(self, bit_widths: Tensor, signals: SignalState | None, count: Tensor) -> None:
        """See `WidthSource`."""
        assert signals is not None, "the loop computes signals where there are constants for them"
        choose_widths(self._weights, signals.signals, num_units=self._num_units, out=bit_widths[None])


def why_not_on_device(policy: Policy) -> str | None:
    """Returns why a policy cannot run on the device, in a few words, or None if it can."""
    if not isinstance(policy, StaticAllocation | LearnedPolicy):
        return f"policy {policy.name!r} is neither learned nor static, so it runs on the host"
    if isinstance(policy, StaticAllocation) and bool((policy.bit_widths < 1).any()):
        return f"policy {policy.name!r} reads the unquantised weights"
    return None


def width_source(model: NestedCausalLM, policy: Policy, profile: Profile) -> WidthSource:
    """Puts a policy on the model's device.

    Args:
        model: The model.
        policy: A learned policy or a static allocation.
        profile: The one that the policy was trained with.

    Raises:
        InputError: If the policy cannot run on the device or its widths are not stored.
    """
    reason = why_not_on_device(policy)
    if reason is not None:
        raise InputError(f"the decoder of the GPU cannot run this policy ({reason}); use decoder='hf'")
    if isinstance(policy, StaticAllocation):
        check_bit_widths(policy.bit_widths, model.bit_widths, model.num_units)
        return WidthTable(policy.bit_widths, device=model.device)
    assert isinstance(policy, LearnedPolicy)
    weights = PolicyWeights.from_state_dict(policy.net.state_dict(), policy.card.schema.bit_widths, device=model.device)
    return LearnedWidths(weights, signal_constants(model, profile, policy.card.schema.horizon))


def signal_constants(model: NestedCausalLM, profile: Profile, horizon: int | None) -> SignalConstants:
    """What the signals of a model are computed with, on its device."""
    schema = SignalSchema(model.num_units, profile.bit_widths)
    share = model.unit_weights.float()
    constants = SignalConstants(
        embedding=project_embedding(model.embedding_matrix(), schema.num_embedding_dims).contiguous(),
        unit_constants=unit_constants(profile, schema).to(model.device).contiguous(),
        depth=torch.tensor(unit_depths(model), dtype=torch.float32, device=model.device),
        weight_share=(share / share.sum()).to(model.device),
        layer_of_unit=torch.tensor([unit.layer_idx for unit in model.units], dtype=torch.int32, device=model.device),
        horizon=horizon,
    )
    assert constants.dim == schema.dim, "signals changed in one place"
    return constants
