"""A policy at work on one sequence: signals in, bit-widths out, step after step, at the least cost the machine allows.

Deployment and timing go through here; training and evaluation batch many rows through `SignalTracker` and the policy
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from flexquant_rl.engine.decode import StepOutput
from flexquant_rl.engine.lean import default_decoder
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.policy import BitWidthPolicy, LearnedPolicy, StaticAllocation
from flexquant_rl.engine.profile import Profile
from flexquant_rl.engine.signals import (
    SignalSchema,
    SignalTracker,
    project_embedding,
    unit_constants,
    unit_depths,
)
from flexquant_rl.kernels.native_control import ControlWeights, NativeControl, PolicyNetWeights


class Controller(Protocol):
    """Chooses the widths of one sequence's steps."""

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: float) -> None:
        """Starts after a prompt whose last output is given; `next_token_ids` `[1]` is what the first step reads."""

    def bit_widths(self) -> Tensor:
        """`[U]` int64 on the CPU: widths of the next step."""

    def update(self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor) -> None:
        """Tells what a step at `[U]` widths put out and which token `[1]` the next one reads."""


def make_controller(model: NestedCausalLM, policy: BitWidthPolicy, profile: Profile) -> Controller:
    """Picks the cheapest controller that gives the policy's widths.

    Args:
        model: The model.
        policy: The policy.
        profile: The one that the policy was trained with.
    """
    if isinstance(policy, StaticAllocation):
        return StaticController(policy)
    if default_decoder(model)[0] == "lean":
        depths = unit_depths(model)
        return NativeController(policy, profile, model.embedding_matrix(), depths, model.unit_weights)
    return TorchController(model, policy, profile)


class StaticController:
    """The same widths at every step; looks at nothing."""

    def __init__(self, policy: StaticAllocation) -> None:
        self._bit_widths = policy.bit_widths.cpu().contiguous()

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: float) -> None:
        """Nothing to start."""

    def bit_widths(self) -> Tensor:
        """See `Controller`."""
        return self._bit_widths

    def update(self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor) -> None:
        """Nothing to learn."""


class TorchController:
    """Any policy, on any device: the reference."""

    def __init__(self, model: NestedCausalLM, policy: BitWidthPolicy, profile: Profile) -> None:
        self._model = model
        self._policy = policy
        schema = SignalSchema(model.num_units, model.bit_widths)
        self._tracker = SignalTracker(schema, profile, model.embedding_matrix(), unit_depths(model), num_rows=1)

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: float) -> None:
        """See `Controller`."""
        self._tracker.reset(output, next_token_ids, torch.tensor([kl_weight]), torch.tensor([0]))

    def signals(self) -> Tensor:
        """`[dim]`: what the policy sees."""
        return self._tracker.signals()[0]

    def bit_widths(self) -> Tensor:
        """See `Controller`."""
        return self._policy(self._tracker.signals())[0].cpu()

    def update(self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor) -> None:
        """See `Controller`."""
        widths = bit_widths[None]
        self._tracker.update(output, widths, next_token_ids, self._model.mean_bit_width(widths))


class NativeController:
    """Native signals on the CPU, and the network of a learned policy too: `TorchController` up to rounding.

    Args:
        policy: The policy.
        profile: The one that it was trained with.
        embedding: `[vocab, d]` input embeddings.
        depths: `[U]` relative depth of each unit, 0 to 1.
        unit_weights: `[U]` weights in each unit.
    """

    def __init__(
        self,
        policy: BitWidthPolicy,
        profile: Profile,
        embedding: Tensor,
        depths: Sequence[float],
        unit_weights: Tensor,
    ) -> None:
        schema = SignalSchema(len(depths), profile.bit_widths)
        weights = unit_weights.float()
        self._policy = None if isinstance(policy, LearnedPolicy) else policy
        self._native = NativeControl(
            ControlWeights(
                net=_net_weights(policy) if isinstance(policy, LearnedPolicy) else None,
                bit_widths=schema.bit_widths,
                embedding=project_embedding(embedding, schema.num_embedding_dims),
                unit_constants=unit_constants(profile, schema),
                depth=torch.tensor(depths),
                weight_share=weights / weights.sum(),
            )
        )
        assert self._native.dim == schema.dim, "signals changed in one place"

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: float) -> None:
        """See `Controller`."""
        token = int(next_token_ids[0])
        self._native.reset(output.logits[0], output.residual_update[0], output.crest[0], token, kl_weight)

    def signals(self) -> Tensor:
        """`[dim]`: what the policy sees."""
        return self._native.signals()

    def bit_widths(self) -> Tensor:
        """See `Controller`."""
        signals = self._native.signals()
        return self._native.choose(signals) if self._policy is None else self._policy(signals[None])[0]

    def update(self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor) -> None:
        """See `Controller`."""
        token = int(next_token_ids[0])
        self._native.update(output.logits[0], output.residual_update[0], output.crest[0], bit_widths, token)


def _net_weights(policy: LearnedPolicy) -> PolicyNetWeights:
    net = policy.net
    return PolicyNetWeights(
        net.mean,
        net.std,
        encode_global=_weight_and_bias(net.encode_global[0]),
        first=_weight_and_bias(net.encode_unit[0]),
        second=_weight_and_bias(net.encode_unit[2]),
        width_head=_weight_and_bias(net.width_head),
    )


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach(), linear.bias.detach()
