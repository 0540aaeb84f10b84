"""Which temperatures, nuclei and seeds there are; without torch, so that configurations are checked before it loads."""

from __future__ import annotations

import math

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import shown

# Logits of up to 3e32 that are divided by it are finite in float32.
_LEAST_TEMPERATURE = 1e-6


def check_sampling(temperature: float, top_p: float = 1.0) -> None:
    """Raises InputError on a temperature or nucleus that describes no distribution."""
    check_temperature(temperature)
    if not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p:g} must be above 0 and at most 1; 1 samples from all tokens")


def check_temperature(temperature: float) -> None:
    """Raises InputError on a temperature that describes no distribution."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature:g} must be finite and not negative; 0 is greedy")
    if 0 < temperature < _LEAST_TEMPERATURE:
        raise InputError(
            f"temperature={temperature:g} is below {_LEAST_TEMPERATURE:g}, where logits that are divided by it are no "
            "longer numbers; 0 is greedy"
        )


def check_seed(seed: int) -> None:
    """Raises InputError on a seed that no generator takes."""
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed={shown(seed)} is not one of 64 bits; use 0 to {(1 << 64) - 1}")
