"""The shape of an episode and what is priced in it: one configuration, and the values that make none.

What the commands read before anything heavy is loaded: this file imports neither torch nor Gymnasium nor NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from flexquant_rl.engine.control.dial import check_kl_weight
from flexquant_rl.engine.decoding.sampling_bounds import check_temperature
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import check_field_types

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
    """Price of a nat of output KL in full-width steps; None draws it log-uniformly per episode."""
    kl_weight_min: float = 0.5
    """Lower end of the drawn dial; in a training run that of the static front, down to the smallest time budget."""
    kl_weight_max: float = 150.0
    """Upper end of the drawn dial; likewise."""
    probe_every: int = 0
    """Every so many tokens the reference width is run as well and its time charged, for agents of your own; 0 never."""

    @property
    def window_tokens(self) -> int:
        """Tokens of text per episode: prompt, continuation, and the target of the last step."""
        return self.prompt_tokens + self.max_new_tokens + 1

    def validate(self) -> None:
        """Raises InputError on values that make no episode."""
        check_field_types(self)
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
        check_temperature(self.temperature)
        if self.action == "num_low_units" and self.low_width >= self.high_width:
            raise InputError(f"low_width={self.low_width} must be below high_width={self.high_width}; swap them")
        if self.probe_every < 0:
            raise InputError(f"probe_every={self.probe_every} must not be negative; 0 never probes")
