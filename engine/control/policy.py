"""The policies that are deployed: a small network or a static allocation, each with its card. Needs torch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexquant_rl.engine.control.decision import Decision, StaticAllocation
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.errors import InputError

if TYPE_CHECKING:  # a deployed policy imports this module, and must not pull in transformers with it
    from flexquant_rl.engine.decoding.decoder import DecoderModel

HIDDEN = 64
"""Width of every hidden layer."""


class PrecisionNet(nn.Module):
    """The precision requirement model: one small network applied to every unit, so that it fits any depth.

    Each unit's own signals and an encoding of the global ones go through the same two hidden layers to one logit per
    width.

    Args:
        schema: What the signals are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, schema: SignalSchema) -> None:
        super().__init__()
        self.schema = schema
        self.register_buffer("mean", torch.zeros(schema.num_global + schema.num_per_unit))
        self.register_buffer("std", torch.ones(schema.num_global + schema.num_per_unit))
        self.encode_global = nn.Sequential(nn.Linear(schema.num_global, HIDDEN), nn.Tanh())
        self.encode_unit = nn.Sequential(
            nn.Linear(schema.num_per_unit + HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()
        )
        self.width_head = nn.Linear(HIDDEN, len(schema.bit_widths))
        self.float()  # whatever torch's default is
        nn.init.orthogonal_(self.width_head.weight, gain=0.01)

    def normalised(self, signals: Tensor) -> tuple[Tensor, Tensor]:
        """Splits and standardises signals: `[B, G]` and `[B, U, F]`."""
        global_signals, unit_signals = self.schema.split(signals)
        count = self.schema.num_global
        return (
            (global_signals - self.mean[:count]) / self.std[:count],
            (unit_signals - self.mean[count:]) / self.std[count:],
        )

    def set_normalisation(self, signals: Tensor) -> None:
        """Takes mean and deviation from recorded signals `[B, dim]`; they are part of the exported policy."""
        global_signals, unit_signals = self.schema.split(signals)
        flat = unit_signals.flatten(0, 1)
        self.mean.copy_(torch.cat([global_signals.mean(0), flat.mean(0)]))
        std = torch.cat([global_signals.std(0), flat.std(0)])
        self.std.copy_(torch.where(std < 1e-3, torch.ones_like(std), std))

    def actor(self) -> PrecisionNet:
        """A copy of what chooses widths, for evaluation: without what else a trained network may have."""
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and then replaced
            net = PrecisionNet(self.schema)
        state = self.state_dict()
        net.load_state_dict({name: state[name] for name in net.state_dict()})
        return net.to(self.mean.device).eval()

    def logits(self, signals: Tensor) -> Tensor:
        """`[B, dim]` -> `[B, U, W]`: one score per unit and width."""
        global_signals, unit_signals = self.normalised(signals)
        context = self.encode_global(global_signals)[:, None].expand(-1, unit_signals.shape[1], -1)
        logits: Tensor = self.width_head(self.encode_unit(torch.cat([unit_signals, context], dim=-1)))
        return logits


@dataclass(frozen=True)
class DialPoint:
    """What one setting of the dial gave on validation text."""

    kl_weight: float
    speedup_modelled: float
    output_kl_nats: float
    mean_bit_width: float


@dataclass(frozen=True)
class PolicyCard:
    """Everything about an exported policy that is not a weight; saved as `policy.json`.

    Attributes:
        schema: Signals that it reads.
        model_fingerprint: The nested model it was trained for.
        unit_names: Units it controls, in order.
        dial: Expected speed and quality by KL weight, on validation text.
        config: The training configuration.

    The schema's horizon is the number of tokens that the policy was trained to decode.
    """

    schema: SignalSchema
    model_fingerprint: str
    unit_names: tuple[str, ...]
    dial: tuple[DialPoint, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_model(model: DecoderModel, config: dict[str, Any], *, horizon: int | None = None) -> PolicyCard:
        """The card of a policy for a model, the dial's table still empty.

        Args:
            model: The model that it controls.
            config: The training configuration.
            horizon: Tokens that it was trained to decode; None where it does not look at positions.
        """
        return PolicyCard(
            schema=SignalSchema(model.num_units, model.bit_widths, horizon=horizon),
            model_fingerprint=model.fingerprint,
            unit_names=tuple(unit.name for unit in model.units),
            config=config,
        )

    def middle_setting(self) -> DialPoint:
        """The setting of the dial where nobody asks for one.

        Raises:
            InputError: If the card has no table of the dial.
        """
        if not self.dial:
            raise InputError("the policy has no table of its dial to choose a setting from; give the KL weight itself")
        return self.dial[len(self.dial) // 2]

    def setting_for_speed(self, speedup: float) -> DialPoint:
        """The setting of the dial for a speedup, between two measured ones where it lies there.

        What it gives is interpolated too: the logarithm of the dial and of the KL, and the mean width, along the
        speedup.

        Raises:
            InputError: If the speed is outside what the policy reached on validation text.
        """
        points = sorted(self.dial, key=lambda point: point.speedup_modelled)
        if not points or not 1.0 <= speedup <= points[-1].speedup_modelled * 1.001:
            raise InputError(
                f"speed {speedup:g} is outside 1 to {points[-1].speedup_modelled if points else 1.0:.2f}, the fastest "
                "that this policy reached; ask for one in between, or set the dial itself with --kl-weight"
            )
        above = next((index for index, point in enumerate(points) if point.speedup_modelled >= speedup), -1)
        # Slower than the slowest setting, as fast as the fastest, or just as fast as one.
        if above in (0, -1) or points[above].speedup_modelled == speedup:
            return points[above]
        slow, fast = points[above - 1], points[above]
        share = (speedup - slow.speedup_modelled) / (fast.speedup_modelled - slow.speedup_modelled)

        def between(low: float, high: float) -> float:
            return low + share * (high - low)

        def between_logarithms(low: float, high: float) -> float:
            return math.exp(between(math.log(low), math.log(high))) if low > 0 and high > 0 else between(low, high)

        return DialPoint(
            kl_weight=between_logarithms(slow.kl_weight, fast.kl_weight),
            speedup_modelled=speedup,
            output_kl_nats=between_logarithms(slow.output_kl_nats, fast.output_kl_nats),
            mean_bit_width=between(slow.mean_bit_width, fast.mean_bit_width),
        )

    def check_model(self, fingerprint: str, where: Path) -> None:
        """Raises InputError if a model is not the one that the policy in directory `where` was trained for."""
        if self.model_fingerprint != fingerprint:
            raise InputError(
                f"{where}: the policy was trained for model {self.model_fingerprint[:12]}, but this one is "
                f"{fingerprint[:12]}; train a policy for this model"
            )


class _FrozenLogits:
    """`PrecisionNet.logits` with the weights as they are now, equal bit for bit.

    A step has one row, where walking through modules, splitting and normalising take longer than the products. So the
    weights are at hand as the products want them, and the normalisation is laid out for the whole vector.
    """

    def __init__(self, net: PrecisionNet) -> None:
        schema = net.schema
        count = schema.num_global
        self._num_global = count
        self._unit_shape = (schema.num_units, schema.num_per_unit)
        self._mean, self._std = (
            torch.cat([values[:count], values[count:].repeat(schema.num_units)]) for values in (net.mean, net.std)
        )
        linears = (net.encode_global[0], net.encode_unit[0], net.encode_unit[2], net.width_head)
        self._encode_global, *self._encode_unit, self._width_head = map(_frozen, linears)

    def __call__(self, signals: Tensor) -> Tensor:
        """`[B, dim]` -> `[B * U, W]`."""
        num_units, num_per_unit = self._unit_shape
        normalised = (signals - self._mean).div_(self._std)
        bias, weight = self._encode_global
        # Contiguous because a product's last bits may depend on the strides of its rows.
        context = torch.addmm(bias, normalised[:, : self._num_global].contiguous(), weight).tanh_()
        per_unit = normalised[:, self._num_global :].view(-1, num_units, num_per_unit)
        hidden = torch.cat([per_unit, context[:, None].expand(-1, num_units, -1)], dim=-1).flatten(0, 1)
        for bias, weight in self._encode_unit:
            hidden = torch.addmm(bias, hidden, weight).tanh_()
        bias, weight = self._width_head
        return torch.addmm(bias, hidden, weight)


def _frozen(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Copies of bias and transposed weight, as `addmm` takes them."""
    assert isinstance(linear, nn.Linear)
    return linear.bias.detach().clone(), linear.weight.detach().clone().t()


class LearnedPolicy:
    """A trained `PrecisionNet` that takes the best-scored width of every unit.

    Args:
        net: The network. Its weights are copied: training it further leaves the policy as it is.
        card: What it belongs to.
        name: As it appears in tables.
    """

    def __init__(self, net: PrecisionNet, card: PolicyCard, name: str = "ppo") -> None:
        self.net = net.actor()
        self.card = card
        self.name = name
        self._logits = _FrozenLogits(net)
        self._device = net.mean.device
        self._widths = torch.tensor(card.schema.bit_widths, device=self._device)

    def with_card(self, card: PolicyCard) -> LearnedPolicy:
        """The same with another card."""
        return LearnedPolicy(self.net, card, self.name)

    def __call__(self, signals: Tensor) -> Decision:
        """See `Policy`; the widths are on the signals' device."""
        with torch.inference_mode():
            choice = self._logits(signals.to(self._device)).argmax(-1)
            return Decision(self._widths.index_select(0, choice).view(len(signals), -1).to(signals.device))


@dataclass(frozen=True)
class StaticPolicy(StaticAllocation):
    """A static allocation of one model.

    Attributes:
        card: What it belongs to; it has no dial.
    """

    card: PolicyCard
