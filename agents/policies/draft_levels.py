"""The levels of a recording between stored widths: knapsacks of a profile, as `draft:3.5` names one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from flexquant_rl.agents.policies.static_front import static_front
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.traces import is_whole
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM


def mixed_levels(
    model: NestedCausalLM, widths: Sequence[float], profile: Path | None, option: str = "--profile FILE"
) -> tuple[tuple[int, ...], ...]:
    """The allocations `[U]` of the mean widths that are not whole, ascending: the points of the static front nearest.

    Args:
        model: The model.
        widths: Mean widths; whole ones need no allocation.
        profile: File of the model's profile.
        option: How the command takes one, as the error says it.

    Raises:
        InputError: If a width lies outside the stored ones, two have the same allocation, or the profile is missing or
            of another model.
    """
    mixed = sorted({width for width in widths if not is_whole(width)})
    if not mixed:
        return ()
    if not all(map(math.isfinite, mixed)):
        raise InputError(
            f"draft widths {' '.join(f'{width:g}' for width in widths)}: one is no number; give e.g. 3 3.5"
        )
    lowest, highest = model.bit_widths[0], model.bit_widths[-1]
    for width in mixed:
        if not lowest <= width <= highest:
            raise InputError(
                f"draft width {width:g} is outside the stored widths {lowest} to {highest}; choose another"
            )
    if profile is None:
        raise InputError(
            f"draft width {mixed[0]:g} is an allocation between stored widths, and that needs a profile; make one with "
            f"`fq profile` and give {option}, or choose stored widths"
        )
    known = Profile.load(profile)
    known.check(model)
    front = static_front(known, model.unit_weights)
    found = tuple(tuple(front.nearest(width).tolist()) for width in mixed)
    if len(set(found)) < len(found) or any(len(set(allocation)) == 1 for allocation in found):
        raise InputError(
            f"draft widths {' '.join(f'{width:g}' for width in mixed)}: {model.num_units} units have no allocations of "
            "their own there; leave one out"
        )
    return found
