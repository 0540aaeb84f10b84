"""Puts a model's nested weights side by side, in the order of a step, in memory that is fast to read through."""

from __future__ import annotations

from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels import huge_pages

_PARTS = ("planes", "scale", "offset")


def gather_weights(model: NestedCausalLM) -> None:
    """Moves the nested weights of a model on the CPU into one block of huge pages; the second time does nothing.

    The model holds the same numbers as before, still once: a linear's old tensors go as soon as they are copied.
    """
    linears = list(model.nested_linears().values())
    starts = {getattr(linear, part).untyped_storage().data_ptr() for linear in linears for part in _PARTS}
    if len(starts) <= 1:
        return
    sizes = [huge_pages.aligned(getattr(linear, part).nbytes) for linear in linears for part in _PARTS]
    block = huge_pages.empty(sum(sizes))
    first = 0
    for linear in linears:
        for part in _PARTS:
            copy = huge_pages.copied(getattr(linear, part), block, first)
            setattr(linear, part, copy)
            first += huge_pages.aligned(copy.nbytes)
