"""The plain read (CPU) or copy (GPU) of memory that bandwidths are compared with, timed in the same run."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import COPY, READ, Provider, calls
from flexquant_rl.kernels import huge_pages
from flexquant_rl.kernels.native import read_bytes

_READ_CHUNK_BYTES = 16 << 20
_COPY_BYTES = 1 << 30  # far more than L2


def read_provider(clock: Clock, ring: Iterable[Tensor], num_threads: int, per_turn: int) -> Provider:
    """Reads whole tensors of one size with a plain vector loop."""
    tensors = list(ring)
    reads = [functools.partial(read_bytes, tensor, num_threads=num_threads) for tensor in tensors]
    return Provider(READ, calls(clock, reads, per_turn), tensors[0].nbytes)


def memory_ring(num_bytes: int) -> list[Tensor]:
    """Memory of `num_bytes` in huge pages, written once, in chunks of 16 MiB to read."""
    num_chunks = max(2, num_bytes // _READ_CHUNK_BYTES)
    return list(huge_pages.empty(num_chunks * _READ_CHUNK_BYTES).fill_(1).view(torch.int8).split(_READ_CHUNK_BYTES))


def copy_provider(clock: Clock, device: torch.device, num_bytes: int = _COPY_BYTES) -> Provider:
    """Copies `num_bytes` within the device's memory: that many are read and that many written."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Provider(COPY, calls(clock, [functools.partial(target.copy_, source)]), 2 * num_bytes)
