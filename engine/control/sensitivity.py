"""Sensitivity: the mean output KL when only one part of a model is at a width and everything else at the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.engine.control.allocation_kl import allocation_kl_nats
from flexquant_rl.engine.control.output_kl import reference_width
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM

Parts = Sequence[Sequence[int]]
"""Units that change together, by their indices."""


def single_units(model: NestedCausalLM) -> Parts:
    """Every unit as a part of its own."""
    return [[unit] for unit in range(model.num_units)]


def part_allocations(model: NestedCausalLM, parts: Parts, bit_widths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Allocations `[P, U]` with one part off the reference; which part it is and the column of its width, `[P]`."""
    reference = reference_width(model)
    columns = [column for column, bit_width in enumerate(bit_widths) if bit_width != reference]
    allocations = torch.full((len(parts) * len(columns), model.num_units), reference)
    index = torch.cartesian_prod(torch.arange(len(parts)), torch.tensor(columns, dtype=torch.int64)).view(-1, 2)
    for allocation, (part, column) in zip(allocations, index.tolist(), strict=True):
        allocation[list(parts[part])] = bit_widths[column]
    return allocations, index[:, 0], index[:, 1]


def sensitivity(
    model: NestedCausalLM,
    windows: Tensor,
    parts: Parts,
    bit_widths: Sequence[int],
    *,
    first: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Tensor:
    """Measures parts at widths on text, keys and values included.

    Args:
        model: The model.
        windows: `[n, T]` int64 token windows.
        parts: What changes together.
        bit_widths: Stored widths.
        first: Positions before this one are context only.
        progress: Wraps the loop over layers, the head last.

    Returns:
        `[P, W]` float32, nats; 0 at the reference width.
    """
    allocations, rows, columns = part_allocations(model, parts, bit_widths)
    session = DecodeSession(model, num_rows=1, max_length=min(windows.shape[1], model.max_context))
    found = torch.zeros(len(parts), len(bit_widths), dtype=torch.float32)
    kl = allocation_kl_nats(session, windows, allocations, first=first, progress=progress)
    found[rows, columns] = kl.float()
    session.close()
    return found
