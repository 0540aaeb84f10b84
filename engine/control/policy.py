"""The learned policy as it is deployed: a small network, its card and their files. Loading needs torch alone."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.signals import SIGNAL_SCHEMA_VERSION, SignalSchema
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import file_sha256, new_directory, read_json, write_json, write_tensors

if TYPE_CHECKING:  # loading a policy needs torch alone
    from flexquant_rl.engine.control.profile import Profile

POLICY_VERSION = 2
CARD_FILE = "policy.json"
PROFILE_FILE = "profile.json"
WEIGHTS_FILE = "policy.safetensors"
_HIDDEN = 64


class PrecisionNet(nn.Module):
    """The precision requirement model: one small network applied to every unit, so that it fits any depth.

    Each unit's own signals and an encoding of the global ones go through the same two hidden layers to one logit per
    width. The value head sees the pooled units.

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
        self.encode_global = nn.Sequential(nn.Linear(schema.num_global, _HIDDEN), nn.Tanh())
        self.encode_unit = nn.Sequential(
            nn.Linear(schema.num_per_unit + _HIDDEN, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, _HIDDEN), nn.Tanh()
        )
        self.width_head = nn.Linear(_HIDDEN, len(schema.bit_widths))
        self.encode_value = nn.Sequential(
            nn.Linear(schema.num_per_unit + schema.num_global, _HIDDEN),
            nn.Tanh(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.Tanh(),
        )
        self.value_head = nn.Linear(_HIDDEN, 1)
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

    def logits(self, signals: Tensor) -> Tensor:
        """`[B, dim]` -> `[B, U, W]`: one score per unit and width."""
        global_signals, unit_signals = self.normalised(signals)
        context = self.encode_global(global_signals)[:, None].expand(-1, unit_signals.shape[1], -1)
        logits: Tensor = self.width_head(self.encode_unit(torch.cat([unit_signals, context], dim=-1)))
        return logits

    def values(self, signals: Tensor) -> Tensor:
        """`[B, dim]` -> `[B, 1]`: expected return."""
        global_signals, unit_signals = self.normalised(signals)
        context = global_signals[:, None].expand(-1, unit_signals.shape[1], -1)
        pooled = self.encode_value(torch.cat([unit_signals, context], dim=-1)).mean(1)
        value: Tensor = self.value_head(pooled)
        return value


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
    """

    schema: SignalSchema
    model_fingerprint: str
    unit_names: tuple[str, ...]
    dial: tuple[DialPoint, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

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
        self.net = copy.deepcopy(net).eval()
        self.card = card
        self.name = name
        self._logits = _FrozenLogits(net)
        self._device = net.mean.device
        self._widths = torch.tensor(card.schema.bit_widths, device=self._device)

    def __call__(self, signals: Tensor) -> Decision:
        """See `Policy`; the widths are on the signals' device."""
        with torch.inference_mode():
            choice = self._logits(signals.to(self._device)).argmax(-1)
            return Decision(self._widths.index_select(0, choice).view(len(signals), -1).to(signals.device))

    def kl_weight_for_speed(self, speedup: float) -> float:
        """The dial setting whose validation speedup is nearest to the one asked for.

        Raises:
            InputError: If the speed is outside what the policy reached on validation.
        """
        points = self.card.dial
        fastest = max((point.speedup_modelled for point in points), default=1.0)
        if not points or not 1.0 <= speedup <= fastest * 1.001:
            raise InputError(
                f"speed {speedup:g} is outside 1 to {fastest:.2f}, the fastest that this policy reached; "
                "ask for one in between, or set the dial itself with --kl-weight"
            )
        return min(points, key=lambda point: abs(point.speedup_modelled - speedup)).kl_weight

    def save(self, out: Path, profile: Profile) -> None:
        """Writes `policy.safetensors`, `policy.json` and the `profile.json` it was trained with, atomically.

        The profile belongs to the policy: sensitivities and times are among its signals.
        """
        with new_directory(out) as directory:
            profile.save(directory / PROFILE_FILE)
            write_tensors(directory / WEIGHTS_FILE, dict(self.net.state_dict()))
            write_json(
                directory / CARD_FILE,
                {
                    "version": POLICY_VERSION,
                    "schema": self.card.schema.to_dict(),
                    "model_fingerprint": self.card.model_fingerprint,
                    "unit_names": list(self.card.unit_names),
                    "dial": [vars(point) for point in self.card.dial],
                    "config": self.card.config,
                    "weights_sha256": file_sha256(directory / WEIGHTS_FILE),
                    "profile_sha256": file_sha256(directory / PROFILE_FILE),
                },
            )


def load_policy(
    directory: Path,
    *,
    model_fingerprint: str | None = None,
    name: str | None = None,
    repair: str = "export it again with `fq export`",
) -> LearnedPolicy:
    """Loads an exported policy. Needs torch alone.

    Args:
        directory: Holds `policy.safetensors`, `policy.json` and `profile.json`.
        model_fingerprint: Fingerprint of the model that the policy will control; None skips the check.
        name: As it appears in tables; default: the directory's.
        repair: What to do about damaged or missing files, as the error says it.

    Raises:
        InputError: If files are missing, damaged, of another schema or of another model.
    """
    card_path, weights_path = directory / CARD_FILE, directory / WEIGHTS_FILE
    try:
        data = read_json(card_path)
        weights = load_file(weights_path)
        found = {"weights": file_sha256(weights_path), "profile": file_sha256(directory / PROFILE_FILE)}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{directory}: no readable policy ({error}); {repair}") from error
    if not isinstance(data, dict) or not isinstance(data.get("schema"), dict):
        raise InputError(f"{card_path}: not a policy; {repair}")
    versions = (data.get("version"), data["schema"].get("version"))
    if versions != (POLICY_VERSION, SIGNAL_SCHEMA_VERSION):
        raise InputError(
            f"{directory}: policy version {versions[0]} with signal schema {versions[1]}, but this program reads "
            f"{POLICY_VERSION} with {SIGNAL_SCHEMA_VERSION}; train and export the policy again"
        )
    try:
        card = _card(data)
        expected = {part: str(data[f"{part}_sha256"]) for part in found}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{card_path}: not a whole policy ({error!r}); {repair}") from error
    if model_fingerprint is not None:
        card.check_model(model_fingerprint, directory)
    num_signals = card.schema.num_global + card.schema.num_per_unit
    try:
        if weights["mean"].shape != (num_signals,):  # before a net of any size is made
            raise RuntimeError(f"{num_signals} signals")
        net = PrecisionNet(card.schema)
        net.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{weights_path}: tensors do not fit policy.json's schema; {repair}") from error
    for part, path in (("weights", weights_path), ("profile", directory / PROFILE_FILE)):
        if found[part] != expected[part]:
            raise InputError(
                f"{path}: sha256 {found[part][:12]}, but policy.json says {expected[part][:12]}, so the file was "
                f"edited or damaged; {repair}"
            )
    return LearnedPolicy(net, card, name or directory.name)


def _card(data: dict[str, Any]) -> PolicyCard:
    """The card in a JSON object; KeyError, TypeError, ValueError or OverflowError where it is none."""
    card = PolicyCard(
        schema=SignalSchema.from_dict(data["schema"]),
        model_fingerprint=data["model_fingerprint"],
        unit_names=tuple(data["unit_names"]),
        dial=tuple(DialPoint(**point) for point in data["dial"]),
        config=data["config"],
    )
    rules = {
        "model_fingerprint is text": isinstance(card.model_fingerprint, str),
        "unit_names are those of all units": len(card.unit_names) == card.schema.num_units
        and all(isinstance(name, str) for name in card.unit_names),
        "the dial's points are finite numbers": all(
            type(number) in (int, float) and math.isfinite(number)
            for point in card.dial
            for number in vars(point).values()
        ),
        "config is an object": isinstance(card.config, dict),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"in a policy card {broken[0]}")
    return card
