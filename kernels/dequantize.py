"""Dense weights from bitplanes on the GPU, for the matrix products of a prompt: one buffer serves all weights."""
# Kernel functions are Triton's own dialect; the launcher above them is checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor

from flexquant_rl.kernels.bitplane import NestedWeight
from flexquant_rl.kernels.launching import FLOAT_TYPES, check_tensor, jit, require_triton, tl, uses_inline_asm
from flexquant_rl.kernels.plane_merge import (
    code_words,
    load_base_planes,
    pair_of_width,
    read_width,
    width_table,
)

_BLOCK_ROWS = 4
_BLOCK_WORDS = 32


def dequantize(
    weight: NestedWeight, bit_width: Tensor, *, out: Tensor | None = None, dtype: torch.dtype = torch.float16
) -> Tensor:
    """Decodes a weight at a width that only the device knows.

    Computes ``scale_b * (code >> (8 - b)) + offset_b`` in float32. The width is clamped to the stored range; one inside
    it that is not stored uses the pair derived from the 8-bit one.

    Shapes: N outputs, K inputs.

    Args:
        weight: On a CUDA device. May be some rows of a larger matrix, as those of a fused one are.
        bit_width: `[1]` or `[]` int32 on the device; never read on the host.
        out: `[N, K]` float16, bfloat16 or float32; allocated if not given.
        dtype: Type of the result, if `out` is not given.

    Returns:
        `out`, or a new tensor.

    Raises:
        ValueError: If a tensor has another dtype, shape, device, stride or alignment.
        RuntimeError: If Triton is not installed.
    """
    device = weight.planes.device
    require_triton(device)
    num_rows = _rows_of_whole(weight)
    shape = (1,) if bit_width.dim() else ()
    check_tensor("bit_width", bit_width, dtype=torch.int32, shape=shape, device=device)
    num_outputs, num_inputs = weight.num_outputs, weight.num_inputs
    if out is None:
        out = torch.empty(num_outputs, num_inputs, dtype=dtype, device=device)
    check_tensor("out", out, dtype=FLOAT_TYPES, shape=(num_outputs, num_inputs), device=device, aligned=True)
    num_words = weight.num_padded_inputs // 32
    _dequantize_kernel[(-(-num_outputs // _BLOCK_ROWS), -(-num_words // _BLOCK_WORDS))](
        weight.planes,
        weight.scale,
        weight.offset,
        bit_width,
        out,
        num_outputs,
        num_rows,
        NUM_INPUTS=num_inputs,
        NUM_WORDS=num_words,
        NUM_WIDTHS=len(weight.bit_widths),
        MIN_WIDTH=weight.bit_widths[0],
        WIDTH_TABLE=width_table(weight.bit_widths),
        GROUP_SIZE=weight.group_size,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_WORDS=_BLOCK_WORDS,
        USE_ASM=uses_inline_asm(),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return out


def _rows_of_whole(weight: NestedWeight) -> int:
    """Rows of the matrix that a weight is part of; its own number where it is the whole.

    Raises:
        ValueError: If it has no rows, or its tensors do not hold adjacent rows of one matrix, 16-byte aligned.
    """
    num_outputs, num_words = weight.num_outputs, weight.planes.shape[2]
    if num_outputs < 1:
        raise ValueError("the weight has no outputs; there is nothing to decode")
    check_tensor(
        "planes", weight.planes[0], dtype=torch.int32, shape=(-1, -1), device=weight.planes.device, aligned=True
    )
    num_rows = weight.planes.stride(0) // num_words
    for name, tensor, row_size in (
        ("planes", weight.planes, num_words),
        ("scale", weight.scale, weight.num_groups),
        ("offset", weight.offset, weight.num_groups),
    ):
        is_one = len(tensor) == 1  # a single slice: whatever its stride
        if not tensor[0].is_contiguous() or not (is_one or tensor.stride(0) == num_rows * row_size):
            raise ValueError(
                f"{name} has strides {tensor.stride()} but must hold adjacent rows of one matrix; call contiguous()"
            )
    return num_rows


@jit()
def _store_quads(
    words,
    QUAD: tl.constexpr,
    scale,
    offset,
    out_ptr,
    row,
    exists,
    first_word,
    NUM_INPUTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Decodes quads QUAD and QUAD + 1 of every word and stores these 8 neighbouring inputs, 16 bytes of float16."""
    WORDS_PER_GROUP: tl.constexpr = GROUP_SIZE // 32
    BLOCK_GROUPS: tl.constexpr = BLOCK_WORDS // WORDS_PER_GROUP
    quads = tl.join(words[QUAD], words[QUAD + 1])  # [rows, words, 2]
    lane = tl.arange(0, 4)[None, None, None, :]
    codes = ((quads[:, :, :, None] >> (8 * lane).to(tl.uint32)) & 0xFF).to(tl.float32)
    codes = tl.reshape(codes, (BLOCK_ROWS, BLOCK_GROUPS, WORDS_PER_GROUP * 8))
    dense = tl.reshape(codes * scale[:, :, None] + offset[:, :, None], (BLOCK_ROWS, BLOCK_WORDS, 8))
    word = first_word + tl.arange(0, BLOCK_WORDS)
    column = word[None, :, None] * 32 + QUAD * 4 + tl.arange(0, 8)[None, None, :]
    address = out_ptr + row.to(tl.int64)[:, None, None] * NUM_INPUTS + column
    mask = exists[:, None, None] & (column < NUM_INPUTS)
    tl.store(address, dense.to(out_ptr.dtype.element_ty), mask=mask)


@jit(
    do_not_specialize=["num_outputs", "num_rows"],
    do_not_specialize_on_alignment=["bit_width_ptr", "scale_ptr", "offset_ptr"],
)
def _dequantize_kernel(
    planes_ptr,
    scale_ptr,
    offset_ptr,
    bit_width_ptr,
    out_ptr,
    num_outputs,
    num_rows,
    NUM_INPUTS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    NUM_WIDTHS: tl.constexpr,
    MIN_WIDTH: tl.constexpr,
    WIDTH_TABLE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    WORDS_PER_GROUP: tl.constexpr = GROUP_SIZE // 32
    BLOCK_GROUPS: tl.constexpr = BLOCK_WORDS // WORDS_PER_GROUP
    NUM_GROUPS: tl.constexpr = NUM_WORDS // WORDS_PER_GROUP
    bit_width = read_width(bit_width_ptr, 0, MIN_WIDTH)
    slice_idx, scale_factor, offset_factor = pair_of_width(bit_width, NUM_WIDTHS, WIDTH_TABLE)
    # The codes below always have 8 bits, the missing ones 0.
    code_factor = scale_factor / (1 << (8 - bit_width)).to(tl.float32)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < num_outputs
    row = tl.minimum(row, num_outputs - 1)
    first_word = tl.program_id(1) * BLOCK_WORDS
    word = first_word + tl.arange(0, BLOCK_WORDS)[None, :] + tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.int32)
    in_row = word < NUM_WORDS
    plane_stride = num_rows.to(tl.int64) * NUM_WORDS
    position = row.to(tl.int64)[:, None] * NUM_WORDS + word
    p0, p1, p2 = load_base_planes(planes_ptr, position, plane_stride, in_row, bit_width, MIN_WIDTH)
    words = code_words(p0, p1, p2, planes_ptr, position, plane_stride, in_row, bit_width, 8, USE_ASM)
    group = first_word // WORDS_PER_GROUP + tl.arange(0, BLOCK_GROUPS)[None, :]
    pair = (slice_idx.to(tl.int64) * num_rows + row[:, None]) * NUM_GROUPS + group
    in_pair = (group + tl.zeros([BLOCK_ROWS, BLOCK_GROUPS], tl.int32)) < NUM_GROUPS
    raw_scale = tl.load(scale_ptr + pair, mask=in_pair, other=0.0).to(tl.float32)
    offset = tl.load(offset_ptr + pair, mask=in_pair, other=0.0).to(tl.float32) + raw_scale * offset_factor
    scale = raw_scale * code_factor
    for t in tl.static_range(0, 8, 2):
        _store_quads(
            words,
            t,
            scale,
            offset,
            out_ptr,
            row,
            exists,
            first_word,
            NUM_INPUTS,
            GROUP_SIZE,
            BLOCK_ROWS,
            BLOCK_WORDS,
        )
