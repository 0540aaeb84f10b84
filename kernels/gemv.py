"""Product of a few tokens with a nested weight on the GPU, at widths that only the device knows.

A program multiplies a few rows by all of K: no split of K, no atomics, one store, so the result is the same bit for bit
in every run. The width of the rows' unit is read from a device tensor *after* the planes that every width needs have
been asked for. Two bodies exist, for up to 4 and up to 8 planes; inside each the planes beyond the width are masked
loads, which cause no traffic. Bits become integers by merging words pairwise (see docs/kernels.md), then four products
at a time go into an integer sum.
"""
# Kernel functions are Triton's own dialect; the launchers below them are checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.bitplane import NestedWeight
from flexquant_rl.kernels.launching import (
    FLOAT_TYPES,
    check_tensor,
    check_token_count,
    jit,
    require_triton,
    tl,
    uses_inline_asm,
)
from flexquant_rl.kernels.plane_merge import (
    check_weight,
    code_words,
    load_base_planes,
    pair_of_width,
    read_width,
    width_table,
)

MAX_TOKENS = 16
SEGMENT_ROWS = 4
"""Rows that always share a unit; the rows of a program divide it."""


@dataclass(frozen=True)
class Tile:
    """How much one program takes at a time: `rows` x `words` of 32 weights, by `num_warps` warps.

    16 bytes per plane and thread: rows * words = 128 * num_warps.
    """

    rows: int
    words: int
    num_warps: int


# By the largest number of words per row (K / 32) that they serve. Not tuned on a device yet: benchmarks/bench_gemv.py
# times all of them.
TILES = ((64, Tile(rows=4, words=32, num_warps=1)), (1 << 30, Tile(rows=4, words=128, num_warps=4)))


def choose_tile(num_outputs: int, num_words: int) -> Tile:
    """The tile for a weight of `[num_outputs, 32 * num_words]`; a table, so that nothing is tuned while serving."""
    del num_outputs  # every row block is alike; the table may tell them apart once it is measured
    return next(tile for limit, tile in TILES if num_words <= limit)


def gemv(
    x: PackedActivations,
    weight: NestedWeight,
    bit_widths: Tensor,
    *,
    segments: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Multiplies packed activations by the top bitplanes of a weight, the number of planes read from the device.

    Computes ``y = x @ W.T + bias + residual`` with ``W = scale_b * (code >> (8 - b)) + offset_b``, accumulated in
    float32. The width b of a row is clamped to the stored range; one inside it that is not stored uses the pair derived
    from the 8-bit one. Reads the planes that the widths need, once for all tokens. Deterministic; a token's
    sums are made in the same order whatever their number. Never synchronises;
    with `out` given it allocates nothing, so it can be captured in a CUDA graph.

    Shapes: M tokens (1..16), K inputs, N outputs, U units.

    Args:
        x: M packed tokens of K inputs.
        weight: N outputs and K inputs, on the device of `x`.
        bit_widths: `[U]` int32 on the device; never read on the host.
        segments: `[ceil(N / 4)]` int32 from `segment_map`: the unit of every four rows, each in 0..U-1. None: every row
            has the width `bit_widths[0]`, so pass a one-element slice.
        bias: `[N]` float16, bfloat16 or float32.
        residual: `[M, N]` float16, bfloat16 or float32, added to the product; may be `out`.
        out: `[M, N]` float16, bfloat16 or float32; a float32 one is allocated if not given.
        tile: Overrides the table; for benchmarks.

    Returns:
        `out`, or a new tensor.

    Raises:
        ValueError: If a tensor has another dtype, shape, device, stride or alignment.
        RuntimeError: If Triton is not installed.
    """
    device = weight.planes.device
    require_triton(device)
    num_tokens, num_outputs = x.num_tokens, weight.num_outputs
    check_token_count(num_tokens, MAX_TOKENS)
    x.check(num_tokens, weight.num_inputs, device)
    check_weight(weight)
    check_tensor("bit_widths", bit_widths, dtype=torch.int32, shape=(-1,), device=device)
    if bit_widths.numel() == 0:
        raise ValueError("bit_widths is empty but every row needs a width; pass [U] int32")
    if segments is not None:
        num_entries = -(-num_outputs // SEGMENT_ROWS)
        check_tensor("segments", segments, dtype=torch.int32, shape=(num_entries,), device=device)
    if bias is not None:
        check_tensor("bias", bias, dtype=FLOAT_TYPES, shape=(num_outputs,), device=device)
    if residual is not None:
        check_tensor("residual", residual, dtype=FLOAT_TYPES, shape=(num_tokens, num_outputs), device=device)
    if out is None:
        out = torch.empty(num_tokens, num_outputs, dtype=torch.float32, device=device)
    check_tensor("out", out, dtype=FLOAT_TYPES, shape=(num_tokens, num_outputs), device=device)
    tile = tile or choose_tile(num_outputs, x.num_words)
    if SEGMENT_ROWS % tile.rows or tile.words % 4:
        raise ValueError(f"{tile} does not fit: rows must divide {SEGMENT_ROWS} and words be a multiple of 4")
    _gemv_kernel[(-(-num_outputs // tile.rows),)](
        x.values,
        x.sums if x.scale is None else x.scale,
        x.sums,
        weight.planes,
        weight.scale,
        weight.offset,
        bit_widths,
        bit_widths if segments is None else segments,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        num_outputs,
        NUM_WORDS=x.num_words,
        NUM_USED_GROUPS=-(-weight.num_inputs // weight.group_size),
        NUM_TOKENS=num_tokens,
        NUM_WIDTHS=len(weight.bit_widths),
        MIN_WIDTH=weight.bit_widths[0],
        WIDTH_TABLE=width_table(weight.bit_widths),
        WORDS_PER_GROUP=weight.group_size // 32,
        IS_INT8=x.scale is not None,
        HAS_SEGMENTS=segments is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_ROWS=tile.rows,
        BLOCK_WORDS=tile.words,
        USE_ASM=uses_inline_asm(),
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )
    return out


def segment_map(num_rows: Sequence[int], units: Sequence[int], *, device: torch.device | str) -> Tensor:
    """Says which unit's width the rows of a fused weight have, e.g. those of q, k and v.

    Args:
        num_rows: Rows of each segment, multiples of 4 except for the last.
        units: The index of each segment in the `bit_widths` of a call.
        device: Where the map is put.

    Returns:
        `[ceil(sum(num_rows) / 4)]` int32.

    Raises:
        ValueError: If the lengths differ, a unit is negative or a segment does not end at a multiple of 4 rows.
    """
    if len(num_rows) != len(units) or not units:
        raise ValueError(f"{len(num_rows)} segments but {len(units)} units were given; give one unit for each")
    if min(units) < 0:
        raise ValueError(f"unit {min(units)} is negative; use its index in bit_widths")
    for rows in num_rows[:-1]:
        if rows % SEGMENT_ROWS:
            raise ValueError(f"a segment has {rows} rows but only the last may end within {SEGMENT_ROWS}; pad it")
    counts = torch.tensor([-(-rows // SEGMENT_ROWS) for rows in num_rows])
    return torch.tensor(units, dtype=torch.int32).repeat_interleave(counts).to(device)


@jit()
def dot4(codes, x, total, USE_ASM: tl.constexpr):
    """Adds the products of four unsigned bytes with four signed ones to an int32."""
    if USE_ASM:
        result = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        result = total
        for lane in tl.static_range(4):
            code = ((codes >> (8 * lane)) & 0xFF).to(tl.int32, bitcast=True)
            result += code * ((x << (24 - 8 * lane)) >> 24)
    return result


@jit()
def dot_int8(words, values_ptr, word_offset, NUM_WORDS: tl.constexpr, MAX_WIDTH: tl.constexpr, USE_ASM: tl.constexpr):
    """The sum of codes times int8 activations over each word's 32 inputs, int32."""
    lower = tl.zeros(word_offset.shape, tl.int32)
    upper = tl.zeros(word_offset.shape, tl.int32)
    for t in tl.static_range(4):
        x = tl.load(values_ptr + t * NUM_WORDS + word_offset)
        lower = dot4(words[t], x, lower, USE_ASM)
    for t in tl.static_range(4, 8):
        x = tl.load(values_ptr + t * NUM_WORDS + word_offset)
        if MAX_WIDTH == 8:
            lower = dot4(words[t], x, lower, USE_ASM)
        else:
            upper = dot4(words[t], x, upper, USE_ASM)
    return lower + (upper >> 4)  # exact: every term of `upper` is a multiple of 16


@jit()
def dot_float(words, values_ptr, word_offset, NUM_WORDS: tl.constexpr, MAX_WIDTH: tl.constexpr):
    """The sum of codes times unrounded activations over each word's 32 inputs, float32."""
    total = tl.zeros(word_offset.shape, tl.float32)
    for t in tl.static_range(8):
        for lane in tl.static_range(4):
            x = tl.load(values_ptr + (4 * t + lane) * NUM_WORDS + word_offset).to(tl.float32)
            if MAX_WIDTH == 4 and t >= 4:  # noqa: SIM108 - chosen while compiling
                code = (words[t] >> (8 * lane + 4)) & 0xF
            else:
                code = (words[t] >> (8 * lane)) & 0xFF
            total += code.to(tl.float32) * x
    return total


@jit()
def sum_neighbours(x, COUNT: tl.constexpr):
    """`[rows, n]` -> `[rows, n / COUNT]`, COUNT 1, 2 or 4: words of one thread, so nothing moves between threads."""
    if COUNT == 1:
        result = x
    else:
        shape: tl.constexpr = (x.shape[0], x.shape[1] // COUNT, COUNT)
        result = tl.sum(tl.reshape(x, shape), axis=2)
    return result


@jit()
def word_index(start, NUM_WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, NUM_TOKENS: tl.constexpr):
    """The words of a step, `[1, words]`; those beyond the row are its last four, so that no load needs a mask."""
    lane = tl.arange(0, BLOCK_WORDS)
    if NUM_WORDS % BLOCK_WORDS == 0 and NUM_TOKENS == 1:
        word = start + lane  # shorter, but with more tokens the compiler keeps pointers that spill
    else:
        word = tl.minimum(start + lane // 4 * 4, NUM_WORDS - 4) + lane % 4  # whole vectors, and the compiler sees it
    return word[None, :]


@jit()
def keep_order(x):
    """Returns `x`; the assembler moves no later load before it. It leaves no instruction behind but a NOP.

    Free to, it asks for the activations of many tokens at once, which takes 150 registers.
    """
    return tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1
    )


@jit()
def _zeros(NUM_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    totals = ()
    for _ in tl.static_range(NUM_TOKENS):
        totals = totals + (tl.zeros([BLOCK_ROWS, BLOCK_WORDS // 4], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return totals


@jit()
def _rows_times_tokens(
    p0,
    p1,
    p2,
    values_ptr,
    x_scale_ptr,
    x_sums_ptr,
    planes_ptr,
    scale_ptr,
    offset_ptr,
    row,
    bit_width,
    scale_factor,
    offset_factor,
    plane_stride,
    NUM_WORDS: tl.constexpr,
    NUM_USED_GROUPS: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
    MIN_WIDTH: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    WORDS_PER_GROUP: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """One body: all of K for a block of rows. Returns a tuple of `[rows, words of a step / 4]`, one for each token."""
    BLOCK_GROUPS: tl.constexpr = BLOCK_WORDS // WORDS_PER_GROUP
    IS_ORDERED: tl.constexpr = NUM_TOKENS > 4 and USE_ASM  # fewer tokens fit whatever the order of their loads
    num_groups: tl.constexpr = NUM_WORDS // WORDS_PER_GROUP
    totals = _zeros(NUM_TOKENS, BLOCK_ROWS, BLOCK_WORDS)
    # 32 bits: an offset that the compiler knows to be 64 bits wide becomes a pointer of two registers for every plane.
    row_offset = row[:, None] * NUM_WORDS
    pair_offset = row[:, None] * num_groups
    is_read = tl.full([BLOCK_ROWS, BLOCK_WORDS], True, tl.int1)
    for start in range(0, NUM_WORDS, BLOCK_WORDS):
        word = word_index(start, NUM_WORDS, BLOCK_WORDS, NUM_TOKENS)
        # x is loaded through pointers of the weight tile's shape: a row that is spread afterwards would have to change
        # its layout through shared memory, with barriers in this loop.
        word_offset = word + tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.int32)
        words = code_words(
            p0, p1, p2, planes_ptr, row_offset + word, plane_stride, is_read, bit_width, MAX_WIDTH, USE_ASM
        )
        next_offset = row_offset + word_index(start + BLOCK_WORDS, NUM_WORDS, BLOCK_WORDS, NUM_TOKENS)
        has_next = is_read & (start < NUM_WORDS - BLOCK_WORDS)
        if not IS_ORDERED:
            p0, p1, p2 = load_base_planes(planes_ptr, next_offset, plane_stride, has_next, bit_width, MIN_WIDTH)
        group = (
            start // WORDS_PER_GROUP
            + tl.arange(0, BLOCK_GROUPS)[None, :]
            + tl.zeros([BLOCK_ROWS, BLOCK_GROUPS], tl.int32)
        )
        in_pair = group < NUM_USED_GROUPS  # zeros elsewhere: what stands for words beyond the row counts nothing
        scale = tl.load(scale_ptr + pair_offset + group, mask=in_pair, other=0.0).to(tl.float32)
        offset = tl.load(offset_ptr + pair_offset + group, mask=in_pair, other=0.0).to(tl.float32)
        offset += scale * offset_factor
        scale *= scale_factor
        updated = ()
        for m in tl.static_range(NUM_TOKENS):
            x_word = m * NUM_WORDS + word_offset
            x_sums = tl.load(x_sums_ptr + x_word)
            if IS_INT8:
                if IS_ORDERED:  # where it takes fewer registers
                    x_scale = tl.load(x_scale_ptr + x_word)
                dots = dot_int8(words, values_ptr + m * 8 * NUM_WORDS, word_offset, NUM_WORDS, MAX_WIDTH, USE_ASM)
                if not IS_ORDERED:
                    x_scale = tl.load(x_scale_ptr + x_word)
                dots = dots.to(tl.float32) * x_scale
            else:
                dots = dot_float(words, values_ptr + m * 32 * NUM_WORDS, word_offset, NUM_WORDS, MAX_WIDTH)
            products = sum_neighbours(dots, WORDS_PER_GROUP)
            sums = sum_neighbours(x_sums, WORDS_PER_GROUP)
            if WORDS_PER_GROUP == 4:
                total = totals[m] + scale * products + offset * sums
            else:
                total = totals[m] + sum_neighbours(scale * products + offset * sums, 4 // WORDS_PER_GROUP)
            if IS_ORDERED:
                total = keep_order(total)
            updated = updated + (total,)  # type: ignore[assignment]  # noqa: RUF005
        totals = updated
        if IS_ORDERED:  # before the tokens these would take another 12 registers
            p0, p1, p2 = load_base_planes(planes_ptr, next_offset, plane_stride, has_next, bit_width, MIN_WIDTH)
    return totals


@jit(
    do_not_specialize=["num_outputs"],
    do_not_specialize_on_alignment=["bit_widths_ptr", "segments_ptr", "bias_ptr", "residual_ptr", "out_ptr"],
)
def _gemv_kernel(
    values_ptr,
    x_scale_ptr,
    x_sums_ptr,
    planes_ptr,
    scale_ptr,
    offset_ptr,
    bit_widths_ptr,
    segments_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_outputs,
    NUM_WORDS: tl.constexpr,
    NUM_USED_GROUPS: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    NUM_WIDTHS: tl.constexpr,
    MIN_WIDTH: tl.constexpr,
    WIDTH_TABLE: tl.constexpr,
    WORDS_PER_GROUP: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    num_groups: tl.constexpr = NUM_WORDS // WORDS_PER_GROUP
    plane_stride = num_outputs.to(tl.int64) * NUM_WORDS
    block = tl.program_id(0)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < num_outputs
    row = tl.minimum(row, num_outputs - 1)
    first = row[:, None] * NUM_WORDS + word_index(0, NUM_WORDS, BLOCK_WORDS, NUM_TOKENS)
    is_read = tl.full([BLOCK_ROWS, BLOCK_WORDS], True, tl.int1)
    if MIN_WIDTH >= 3:
        p0, p1, p2 = load_base_planes(planes_ptr, first, plane_stride, is_read, 8, MIN_WIDTH)
    unit = 0
    if HAS_SEGMENTS:
        unit = tl.load(segments_ptr + block * BLOCK_ROWS // 4)
    bit_width = read_width(bit_widths_ptr, unit, MIN_WIDTH)
    if MIN_WIDTH < 3:
        p0, p1, p2 = load_base_planes(planes_ptr, first, plane_stride, is_read, bit_width, MIN_WIDTH)
    slice_idx, scale_factor, offset_factor = pair_of_width(bit_width, NUM_WIDTHS, WIDTH_TABLE)
    slice_offset = slice_idx.to(tl.int64) * num_outputs * num_groups
    totals = _zeros(NUM_TOKENS, BLOCK_ROWS, BLOCK_WORDS)
    for max_width in tl.static_range(8, 3, -4):  # unrolled, since a body's planes are counted while compiling
        if (bit_width > 4) == (max_width == 8):
            totals = _rows_times_tokens(
                p0,
                p1,
                p2,
                values_ptr,
                x_scale_ptr,
                x_sums_ptr,
                planes_ptr,
                scale_ptr + slice_offset,
                offset_ptr + slice_offset,
                row,
                bit_width,
                scale_factor / (1 << (max_width - bit_width)).to(tl.float32),
                offset_factor,
                plane_stride,
                NUM_WORDS,
                NUM_USED_GROUPS,
                max_width,
                MIN_WIDTH,
                NUM_TOKENS,
                WORDS_PER_GROUP,
                IS_INT8,
                BLOCK_ROWS,
                BLOCK_WORDS,
                USE_ASM,
            )
    for m in tl.static_range(NUM_TOKENS):
        y = tl.sum(totals[m], axis=1)
        column = m * num_outputs.to(tl.int64) + row
        if HAS_BIAS:
            y += tl.load(bias_ptr + row).to(tl.float32)
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + column, mask=exists, other=0.0).to(tl.float32)
        tl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty), mask=exists)
