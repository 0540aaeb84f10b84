"""Plain torch definitions of what every kernel computes; correctness references, any device, no speed claim."""

import torch
from torch import Tensor

from flexquant_rl.kernels.bitplane import WORD_BITS, NestedWeight, check_bit_width, unpack_codes

# Dequantised weights held at one time by the product: 16 MiB of float32.
_BLOCK_WEIGHTS = 1 << 22


def dequantize(weight: NestedWeight, *, bit_width: int) -> Tensor:
    """Decodes a weight from its top `bit_width` planes.

    Computes ``scale_b * (code >> (8 - b)) + offset_b`` in float32. A width that is not stored uses the pair derived
    from the 8-bit one.

    Args:
        weight: The nested weight, N outputs and K inputs.
        bit_width: Planes to read, 1..8.

    Returns:
        `[N, K]` float32.

    Raises:
        ValueError: If `bit_width` is not in 1..8.
    """
    scale, offset = weight.scale_and_offset(bit_width)
    return _decode(weight.planes, scale, offset, bit_width=bit_width)[:, : weight.num_inputs].contiguous()


def bitplane_gemv(x: Tensor, weight: NestedWeight, *, bit_width: int) -> Tensor:
    """Multiplies activations by the top `bit_width` bitplanes of a nested weight.

    Computes ``y = x @ W.T`` with ``W = scale_b * (code >> (8 - b)) + offset_b``, accumulated in float32. Weights are
    decoded in blocks of output rows, so that no dense copy of the whole matrix exists.

    Shapes: M tokens, K input features, N output features.

    Args:
        x: Activations, `[M, K]`, float16, bfloat16 or float32.
        weight: The nested weight, N outputs and K inputs.
        bit_width: Planes to read, 1..8.

    Returns:
        `[M, N]`, dtype of `x`.

    Raises:
        ValueError: If `x` has another dtype or shape, or `bit_width` is not in 1..8.
    """
    check_bit_width(bit_width)
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype}; pass float16, bfloat16 or float32")
    if x.dim() != 2 or x.shape[1] != weight.num_inputs:
        raise ValueError(
            f"x is {list(x.shape)} but the weight has {weight.num_inputs} inputs; pass [M, {weight.num_inputs}]"
        )
    scale, offset = weight.scale_and_offset(bit_width)
    activations = x.float()
    result = torch.empty(x.shape[0], weight.num_outputs, dtype=torch.float32, device=x.device)
    num_rows = max(1, _BLOCK_WEIGHTS // weight.num_padded_inputs)
    for start in range(0, weight.num_outputs, num_rows):
        rows = slice(start, start + num_rows)
        dense = _decode(weight.planes[:bit_width, rows], scale[rows], offset[rows], bit_width=bit_width)
        result[:, rows] = activations @ dense[:, : weight.num_inputs].T
    return result.to(x.dtype)


def _decode(planes: Tensor, scale: Tensor, offset: Tensor, *, bit_width: int) -> Tensor:
    """Decodes `planes [P, N, Kp // 32]` with a float32 pair `[N, G]`; returns `[N, Kp]` float32, padding included."""
    num_padded = planes.shape[2] * WORD_BITS
    codes = unpack_codes(planes, bit_width=bit_width, num_inputs=num_padded)
    groups = codes.float().view(scale.shape[0], scale.shape[1], -1)  # [N, G, group_size]
    return groups.mul_(scale[..., None]).add_(offset[..., None]).view(-1, num_padded)
