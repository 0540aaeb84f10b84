"""How a model is quantised: the options that a checkpoint remembers. Imports nothing that is slow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flexquant_rl.engine.errors import InputError


@dataclass(frozen=True)
class QuantizationConfig:
    """How a model is quantised; saved with every checkpoint.

    Attributes:
        method: Quantiser; `rtn` rounds to nearest, `gptq` fits the codes to calibration text.
        group_size: Consecutive inputs that share a scale and an offset: 32, 64 or 128.
        bit_widths: Widths that get their own fitted scale and offset, ascending, the last is 8.
        unit: What gets one width of its own: a decoder layer, or its attention and MLP separately.
        quantize_head: Whether the output head is stored nested and is one more unit.
        width_weights: How much the error of each stored width counts for `gptq`; none: what suits most models.
        rotate: Whether the model is rotated before (engine/quantisation/rotation.py).
    """

    method: Literal["rtn", "gptq"] = "rtn"
    group_size: int = 128
    bit_widths: tuple[int, ...] = (3, 4, 5, 6, 8)
    unit: Literal["layer", "half"] = "layer"
    quantize_head: bool = True
    width_weights: tuple[float, ...] = ()
    rotate: bool = False

    def validate(self) -> None:
        """Raises InputError if a value is outside its domain."""
        if self.method not in ("rtn", "gptq"):
            raise InputError(f"method={self.method!r} is not a quantiser; use 'rtn' or 'gptq'")
        if self.unit not in ("layer", "half"):
            raise InputError(f"unit={self.unit!r} must be 'layer' or 'half'; use 'layer'")
        # Here, not above: torch takes seconds, and a command's --help reads this file.
        from flexquant_rl.engine.quantisation.quantize import check_format, check_width_weights

        check_format(self.group_size, self.bit_widths)
        if self.width_weights:
            check_width_weights(self.width_weights, self.bit_widths)
            if self.method != "gptq":
                raise InputError(
                    f"width_weights={self.width_weights} are for gptq, which fits one code to all widths, but "
                    f"method={self.method!r}; leave them out or use gptq"
                )


@dataclass(frozen=True)
class TuningConfig:
    """How scales and offsets are tuned (engine/quantisation/tuning.py).

    Attributes:
        steps: Steps of each width, each on one window.
        learning_rate: Of Adam, at its highest, in cells of a group; widths above 3 take half of it, and a width that
            gained nothing at an evaluation a quarter of what it had.
        widths: The widths to tune; none: all that are stored.
        evaluations: How often held-out text is read, evenly spaced.
        patience: Evaluations in a row without gain after which a width stops.
        seed: Of the order of windows.
    """

    steps: int
    learning_rate: float = 2e-3
    widths: tuple[int, ...] = ()
    evaluations: int = 5
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Tuning:
    """How the scales and offsets of a model were tuned; saved with its checkpoint.

    Attributes:
        steps: Steps taken.
        num_tokens: Tokens of the windows to choose from.
        sha256: Their digest, as in `Calibration`.
        held_out_sha256: Digest of the windows that chose what was kept.
        arithmetic: Precision of the products of widths up to 6; those above are float32.
        config: What the run was asked for; empty in checkpoints that do not know it.
        output_kl_before: Held-out KL against the unquantised model, nats, by width.
        output_kl_after: The same with the pairs that were kept.
    """

    steps: int
    num_tokens: int
    sha256: str
    output_kl_before: dict[str, float] = field(default_factory=dict)
    output_kl_after: dict[str, float] = field(default_factory=dict)
    held_out_sha256: str = ""
    arithmetic: str = ""
    config: dict[str, Any] = field(default_factory=dict)
