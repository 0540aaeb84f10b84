"""Puts nested weights side by side, in the order of a step, in memory that is fast to read through."""

from __future__ import annotations

import threading
import weakref

from torch import Tensor

from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels import huge_pages
from flexquant_rl.kernels.bitplane import NestedWeight

_GAP_LINES = 6
"""Between planes. A product reads up to eight of them at the same place. Their sizes tend to be multiples of 4 KiB, and
then all eight streams, with the lines fetched ahead of them, compete for the same few sets of the first-level cache.
From 5 to 7 lines apart they read 10 to 30% faster at 8 bits (AMD Zen 4); fewer or many more help less."""
_LOCKS: weakref.WeakKeyDictionary[NestedCausalLM, threading.Lock] = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def placed_bytes(weight: NestedWeight) -> int:
    """Bytes of a block that `place` takes for a weight."""
    return _plane_bytes(weight) + huge_pages.aligned(weight.scale.nbytes) + huge_pages.aligned(weight.offset.nbytes)


def place(weight: NestedWeight, block: Tensor, first: int) -> NestedWeight:
    """Copies a weight into a block of `huge_pages.empty` from byte `first` on, a multiple of 64; returns the copy."""
    num_words, second = weight.planes.shape[2], first + _plane_bytes(weight)
    words = block[first:second].view(weight.planes.dtype)
    planes = words.as_strided(weight.planes.shape, (_plane_stride(weight), num_words, 1), words.storage_offset())
    planes.copy_(weight.planes)
    scale = huge_pages.copied(weight.scale, block, second)
    offset = huge_pages.copied(weight.offset, block, second + huge_pages.aligned(scale.nbytes))
    return NestedWeight(planes, scale, offset, weight.bit_widths, weight.group_size, weight.num_inputs)


def gather_weights(model: NestedCausalLM) -> None:
    """Moves the nested weights of a model on the CPU into one block of huge pages; the second time does nothing.

    Threads may call this for one model at once: the others wait for the first, and find nothing left to do.

    The model holds the same numbers as before, still once: a linear's old tensors go as soon as they are copied.
    """
    linears = list(model.nested_linears().values())
    with _lock_of(model):
        if _is_gathered(linears):
            return
        block = huge_pages.empty(sum(placed_bytes(linear.weight) for linear in linears))
        first = 0
        for linear in linears:
            weight = place(linear.weight, block, first)
            first += placed_bytes(weight)
            linear.planes, linear.scale, linear.offset = weight.planes, weight.scale, weight.offset


def _lock_of(model: NestedCausalLM) -> threading.Lock:
    """The model's own lock; not an attribute of it, since what holds a lock cannot be copied."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(model, threading.Lock())


def _plane_stride(weight: NestedWeight) -> int:
    """Words from one plane to the next: whole lines, and the gap."""
    _, num_outputs, num_words = weight.planes.shape
    item_bytes = weight.planes.itemsize
    return (huge_pages.aligned(num_outputs * num_words * item_bytes) + _GAP_LINES * huge_pages.ALIGNMENT) // item_bytes


def _plane_bytes(weight: NestedWeight) -> int:
    """Bytes of all planes, a multiple of a line."""
    return len(weight.planes) * _plane_stride(weight) * weight.planes.itemsize


def _is_gathered(linears: list[NestedLinear]) -> bool:
    tensors = [tensor for linear in linears for tensor in (linear.planes, linear.scale, linear.offset)]
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) <= 1
