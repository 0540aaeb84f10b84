"""Attention of new tokens over a static cache, its result packed for the bitplane product.

A token has a cache row and a length of its own: several tokens of one row, each seeing one place more than the one
before it, are what verifies drafts. Both are read on the device, so one captured graph serves every length up to the
cache's size: programs whose places are beyond it return at once. Each token has programs of its own, so its result has
the same bits whatever stands beside it. Places are split among programs, because the key heads of
one sequence are too few to fill a device; a second kernel joins the parts and packs. No atomics: the same bits in every
run.
"""
# Kernel functions are Triton's own dialect; the launcher above them is checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.kernels.activations import ActivationMode, PackedActivations, output_pointers, store_packed
from flexquant_rl.kernels.launching import (
    FLOAT_TYPES,
    POSITION_TYPES,
    check_rows,
    check_tensor,
    jit,
    next_power_of_two,
    require_triton,
    tl,
)

_BLOCK_PLACES = 64
_MAX_SPLITS = 32
"""Parts of a row at most: the joining kernel holds all of them at once."""
_MIN_DOT = 16


@dataclass(frozen=True, eq=False)
class AttentionParts:
    """Buffers between the two kernels; those of one captured graph are shared by all its layers.

    Attributes:
        mixed: `[S, M * H, D]` float32, values mixed by each of S parts, not yet normalised.
        norms: `[2, S, M * H]` float32, each part's largest score and sum of exponentials.
        places_per_part: Places of the cache in a part, a multiple of 64.
    """

    mixed: Tensor
    norms: Tensor
    places_per_part: int

    @staticmethod
    def allocate(
        num_tokens: int,
        num_heads: int,
        head_dim: int,
        num_places: int,
        *,
        device: torch.device | str,
        places_per_part: int | None = None,
    ) -> AttentionParts:
        """Allocates for M tokens of H heads over caches of `num_places`.

        Raises:
            ValueError: If `places_per_part` is not a multiple of 64 or makes more than 32 parts.
        """
        if places_per_part is None:
            places_per_part = -(-num_places // (_MAX_SPLITS * _BLOCK_PLACES)) * _BLOCK_PLACES
        num_parts = -(-num_places // max(1, places_per_part))
        if places_per_part < 1 or places_per_part % _BLOCK_PLACES or num_parts > _MAX_SPLITS:
            raise ValueError(
                f"places_per_part={places_per_part} for {num_places} places must be a multiple of {_BLOCK_PLACES} and "
                f"make at most {_MAX_SPLITS} parts; leave it out"
            )
        rows = num_tokens * num_heads
        return AttentionParts(
            torch.empty(num_parts, rows, head_dim, dtype=torch.float32, device=device),
            torch.empty(2, num_parts, rows, dtype=torch.float32, device=device),
            places_per_part,
        )


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scale: float,
    rows: Tensor | None = None,
    mode: ActivationMode = "int8",
    parts: AttentionParts | None = None,
    out: PackedActivations | None = None,
) -> PackedActivations:
    """Attends to places 0 to the token's own and packs the result.

    Computes ``softmax(scale * q @ k.T) @ v`` per head; products take the cache's dtype (as `tl.dot` does), sums are
    float32. Never synchronises; with all buffers given it allocates nothing. Two launches.

    Shapes: M tokens, H query heads, J key heads (J divides H), D head size, R cache rows, L places.

    Args:
        queries: `[M, H, D]` in the cache's dtype.
        keys: `[R, J, L, D]` float16, bfloat16 or float32; the tokens' own keys are in it already.
        values: As `keys`.
        positions: `[M]` int32 or int64 on the device, the last place to attend to; read as L - 1 if larger. A token at
            -1 attends to nothing and gets zeros: it fills up a launch of fixed size.
        scale: Factor of the scores, usually ``1 / sqrt(D)``.
        rows: `[M]` int32 or int64 on the device, the cache row of each token, read as the nearest one that exists;
            None: token m belongs to row m, or every token to row 0 where there is only one.
        mode: How to hold the result, if `out` is not given.
        parts: Buffers between the kernels; allocated if not given.
        out: Buffers for `[M, H * D]`; allocated if not given.

    Returns:
        `out`, or new buffers.

    Raises:
        ValueError: If a tensor has another dtype, shape, device, stride or alignment, J does not divide H, or tokens
            and cache rows cannot be matched.
        RuntimeError: If Triton is not installed.
    """
    device = queries.device
    require_triton(device)
    check_tensor("keys", keys, dtype=FLOAT_TYPES, shape=(-1, -1, -1, -1), device=device)
    num_rows, num_key_heads, num_places, head_dim = keys.shape
    check_tensor("values", values, dtype=keys.dtype, shape=keys.shape, device=device)
    check_tensor("queries", queries, dtype=keys.dtype, shape=(-1, -1, head_dim), device=device)
    num_tokens, num_heads = queries.shape[:2]
    if min(keys.shape) < 1 or num_heads % num_key_heads:
        raise ValueError(f"{num_heads} query heads cannot share keys of shape {list(keys.shape)}; J must divide H")
    check_tensor("positions", positions, dtype=POSITION_TYPES, shape=(num_tokens,), device=device)
    check_rows(rows, num_tokens, num_rows, device)
    if parts is None:
        parts = AttentionParts.allocate(num_tokens, num_heads, head_dim, num_places, device=device)
    num_parts = -(-num_places // parts.places_per_part)
    num_queries = num_tokens * num_heads
    check_tensor("mixed", parts.mixed, dtype=torch.float32, shape=(num_parts, num_queries, head_dim), device=device)
    check_tensor("norms", parts.norms, dtype=torch.float32, shape=(2, num_parts, num_queries), device=device)
    num_inputs = num_heads * head_dim
    if out is None:
        out = PackedActivations.allocate(num_tokens, num_inputs, device=device, mode=mode)
    out.check(num_tokens, num_inputs, device)
    group = num_heads // num_key_heads
    block_dim = max(_MIN_DOT, next_power_of_two(head_dim))
    _attend_kernel[(num_tokens * num_key_heads, num_parts)](
        queries,
        keys,
        values,
        positions,
        positions if rows is None else rows,
        parts.mixed,
        parts.norms,
        float(scale),
        num_rows,
        num_places,
        num_queries,
        HAS_ROWS=rows is not None,
        HAS_ONE_ROW=num_rows == 1,
        NUM_KEY_HEADS=num_key_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PLACES_PER_PART=parts.places_per_part,
        BLOCK_GROUP=max(_MIN_DOT, next_power_of_two(group)),
        BLOCK_DIM=block_dim,
        BLOCK_PLACES=_BLOCK_PLACES,
        IS_EXACT=keys.dtype == torch.float32,
        num_warps=8 if block_dim > 64 else 4,  # heads of 128 take 137 registers with 4 warps, 80 with 8
        enable_fp_fusion=True,
    )
    _join_kernel[(num_tokens, out.num_words)](
        parts.mixed,
        parts.norms,
        positions,
        *output_pointers(out),
        num_places,
        num_queries,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        NUM_PARTS=num_parts,
        PLACES_PER_PART=parts.places_per_part,
        NUM_WORDS=out.num_words,
        IS_INT8=out.scale is not None,
        BLOCK_PARTS=next_power_of_two(num_parts),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


@jit(
    do_not_specialize=["scale", "num_rows", "num_places", "num_queries"],
    do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"],
)
def _attend_kernel(
    queries_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    rows_ptr,
    mixed_ptr,
    norms_ptr,
    scale,
    num_rows,
    num_places,
    num_queries,
    HAS_ROWS: tl.constexpr,
    HAS_ONE_ROW: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PLACES_PER_PART: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    """One part of the places for the query heads that share a key head."""
    token = tl.program_id(0) // NUM_KEY_HEADS
    part = tl.program_id(1)
    length = tl.minimum(tl.load(positions_ptr + token).to(tl.int32) + 1, num_places)
    first = part * PLACES_PER_PART
    if first < length:
        # Heads of a token that share a key head are side by side, so row 0 of a program is GROUP * program_id.
        query = tl.arange(0, BLOCK_GROUP)
        dim = tl.arange(0, BLOCK_DIM)
        row = tl.program_id(0) * GROUP + query
        in_tile = (query < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        q = tl.load(queries_ptr + row.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :], mask=in_tile, other=0.0)
        if HAS_ROWS:
            cache_row = tl.minimum(tl.maximum(tl.load(rows_ptr + token).to(tl.int32), 0), num_rows - 1)
        elif HAS_ONE_ROW:
            cache_row = token * 0
        else:
            cache_row = token
        key_head = tl.program_id(0) % NUM_KEY_HEADS
        cache_offset = (cache_row * NUM_KEY_HEADS + key_head).to(tl.int64) * num_places * HEAD_DIM
        largest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_GROUP], tl.float32)
        mixed = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        precision: tl.constexpr = "ieee" if IS_EXACT else "tf32"
        for start in range(first, tl.minimum(first + PLACES_PER_PART, length), BLOCK_PLACES):
            place = start + tl.arange(0, BLOCK_PLACES)
            exists = (place < length)[:, None] & (dim < HEAD_DIM)[None, :]
            offset = cache_offset + place[:, None] * HEAD_DIM + dim[None, :]
            k = tl.load(keys_ptr + offset, mask=exists, other=0.0)
            v = tl.load(values_ptr + offset, mask=exists, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale
            scores = tl.where((place < length)[None, :], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))  # finite: the block's first place exists
            decay = tl.exp(largest - new_largest)
            weights = tl.exp(scores - new_largest[:, None])
            total = total * decay + tl.sum(weights, axis=1)
            mixed = mixed * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=precision)
            largest = new_largest
        target = part * num_queries + row
        tl.store(norms_ptr + target, largest, mask=query < GROUP)
        tl.store(norms_ptr + tl.num_programs(1) * num_queries + target, total, mask=query < GROUP)
        tl.store(mixed_ptr + target.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :], mixed, mask=in_tile)


@jit(do_not_specialize=["num_places", "num_queries"], do_not_specialize_on_alignment=["positions_ptr"])
def _join_kernel(
    mixed_ptr,
    norms_ptr,
    positions_ptr,
    values_ptr,
    scale_ptr,
    sums_ptr,
    num_places,
    num_queries,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PLACES_PER_PART: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Joins the parts of 32 neighbouring inputs of the output projection, which need not belong to one head."""
    token = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    length = tl.minimum(tl.load(positions_ptr + token).to(tl.int32) + 1, num_places)
    part = tl.arange(0, BLOCK_PARTS)[:, None]
    index = word * 32 + tl.arange(0, 32)[None, :]
    exists = (part * PLACES_PER_PART < length) & (index < NUM_HEADS * HEAD_DIM)
    row = part * num_queries + token * NUM_HEADS + index // HEAD_DIM
    largest = tl.load(norms_ptr + row, mask=exists, other=float("-inf"))
    total = tl.load(norms_ptr + NUM_PARTS * num_queries + row, mask=exists, other=0.0)
    mixed = tl.load(mixed_ptr + row * HEAD_DIM + index % HEAD_DIM, mask=exists, other=0.0)
    top = tl.max(tl.where(exists, largest, -1e38), axis=0)[None, :]
    weights = tl.where(exists, tl.exp(largest - top), 0.0)
    divisor = tl.sum(weights * total, axis=0)
    # Nothing was summed up beyond the row, nor for a token that attends to nothing: zeros. A NaN is no zero and stays.
    x = tl.sum(weights * mixed, axis=0) / tl.where(divisor == 0, 1.0, divisor)
    store_packed(
        tl.reshape(x, (1, 8, 4)),
        word + tl.arange(0, 1),
        token,
        values_ptr,
        scale_ptr,
        sums_ptr,
        NUM_WORDS,
        IS_INT8,
    )
