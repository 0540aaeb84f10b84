"""Random nested weights: a product's time does not depend on the values, so nothing needs to be quantised."""

from __future__ import annotations

import torch

from flexquant_rl.kernels.bitplane import NestedWeight

_CPU = torch.device("cpu")


def random_weight(
    num_outputs: int,
    num_inputs: int,
    *,
    bit_widths: tuple[int, ...] = (3, 4, 5, 6, 8),
    group_size: int = 128,
    device: torch.device = _CPU,
) -> NestedWeight:
    """A weight of random planes and small random scales.

    Args:
        num_outputs: Rows.
        num_inputs: Columns, a multiple of 128.
        bit_widths: Widths with scales and offsets.
        group_size: Inputs that share scale and offset.
        device: Where it is made.
    """
    size = (8, num_outputs, num_inputs // 32)
    planes = torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device=device)
    scale = torch.rand(len(bit_widths), num_outputs, num_inputs // group_size, device=device)
    scale = scale.mul_(0.01).add_(0.01).half()
    return NestedWeight(planes, scale, scale.float().mul_(-3.5).half(), bit_widths, group_size, num_inputs)
