"""Which settings of the dial there are. Imports nothing that is slow."""

from __future__ import annotations

import math

from flexquant_rl.engine.errors import InputError


def check_kl_weight(kl_weight: float) -> None:
    """Raises InputError on a dial setting that prices nothing."""
    if not 0 < kl_weight < math.inf:
        raise InputError(f"kl_weight={kl_weight:g} must be positive and finite; small means fast, large means exact")
