"""Memory in pages of 2 MiB instead of 4 KiB, for weights that are read from end to end at every token.

A step walks through all the weights once, so with small pages nearly every kilobyte costs a walk through the page
tables, on a virtual machine through two sets of them. On the machine of benchmarks/results one thread reads huge pages
1.4 to 1.7 times as fast. Linux hands them out where they are asked for (`madvise`, unless its administrator said
"never"); elsewhere the memory is ordinary and everything works the same.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
ALIGNMENT = 64
"""Where parts of a block begin: a cache line, and the widest vector."""


def empty(num_bytes: int) -> Tensor:
    """Returns `[num_bytes]` uint8 of zeros in huge pages where the system has them; freed with its last view.

    Raises:
        ValueError: If `num_bytes` is not positive.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes={num_bytes} but a block has at least one; pass what it shall hold")
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.zeros(num_bytes, dtype=torch.uint8)
    # One page more than asked for: a mapping need not begin where a huge page does.
    block = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages: the mapping is as good as any
        return torch.frombuffer(block, dtype=torch.uint8)[:num_bytes]
    memory = torch.frombuffer(block, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_PAGE_BYTES
    return memory[first : first + num_bytes]


def zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns zeros; in huge pages if they fill at least one."""
    num_bytes = shape.numel() * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES:
        return torch.zeros(shape, dtype=dtype)
    return empty(num_bytes).view(dtype).view(shape)


def aligned(num_bytes: int) -> int:
    """Returns `num_bytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def copied(tensor: Tensor, block: Tensor, first: int = 0) -> Tensor:
    """Copies a tensor into a block from byte `first` on and returns the copy, contiguous.

    Raises:
        ValueError: If it does not fit or `first` is not a multiple of `ALIGNMENT`.
    """
    if first < 0 or first % ALIGNMENT or first + tensor.nbytes > block.nbytes:
        raise ValueError(
            f"{tensor.nbytes} bytes do not fit at byte {first} of {block.nbytes}, or that is not a multiple of "
            f"{ALIGNMENT}; add up `aligned` sizes"
        )
    part = block[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return part.copy_(tensor)
