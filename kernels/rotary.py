"""What happens between the fused q, k, v product and attention, in one kernel: norms, rotation, the cache write."""
# Kernel functions are Triton's own dialect; the launcher above them is checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor

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


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    rows: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """Splits a fused product into heads, rotates q and k, and writes k and v into the cache.

    With `q_norm` and `k_norm` (Qwen3) each head is first normalised by its root mean square, ``x / sqrt(mean(x^2) +
    eps) * norm``. The rotation takes a head's halves as the parts of D / 2 complex numbers, as Hugging Face's Llama
    does. Position and row are read on the device; a token whose place does not exist writes nothing to the cache.

    Shapes: M tokens, H query heads, J key heads, D head size, P positions of the table, R cache rows, L cache places.

    Args:
        qkv: `[M, (H + 2J) * D]` float16, bfloat16 or float32: query heads, key heads, value heads.
        cos: `[P, D / 2]` float32, with the model's scaling of frequencies already in it.
        sin: `[P, D / 2]` float32.
        positions: `[M]` int32 or int64 on the device: place in the cache, and row of the table (at most P - 1).
        keys: `[R, J, L, D]` float16, bfloat16 or float32, written in place.
        values: As `keys`.
        rows: `[M]` int32 or int64 on the device, the cache row of each token; None: token m belongs to row m, or every
            token to row 0 where there is only one.
        q_norm: `[D]`, or None for no norm.
        k_norm: `[D]`; given exactly when `q_norm` is.
        eps: Epsilon of the norms.
        out: `[M, H, D]` float16, bfloat16 or float32 for the rotated queries; in the cache's dtype if not given.

    Returns:
        The queries: `out`, or a new tensor.

    Raises:
        ValueError: If a tensor has another dtype, shape, device or stride, or tokens and cache rows cannot be matched.
        RuntimeError: If Triton is not installed.
    """
    device = qkv.device
    require_triton(device)
    check_tensor("keys", keys, dtype=FLOAT_TYPES, shape=(-1, -1, -1, -1), device=device)
    check_tensor("values", values, dtype=keys.dtype, shape=keys.shape, device=device)
    num_rows, num_key_heads, num_places, head_dim = keys.shape
    check_tensor("qkv", qkv, dtype=FLOAT_TYPES, shape=(-1, -1), device=device)
    num_tokens, num_columns = qkv.shape
    num_heads = num_columns // head_dim - 2 * num_key_heads if head_dim else 0
    if num_heads < 1 or head_dim % 2 or num_columns % head_dim:
        raise ValueError(
            f"qkv has {num_columns} columns but the cache has {num_key_heads} heads of {head_dim}; pass an even head "
            "size and [M, (H + 2J) * D]"
        )
    check_tensor("cos", cos, dtype=torch.float32, shape=(-1, head_dim // 2), device=device)
    check_tensor("sin", sin, dtype=torch.float32, shape=cos.shape, device=device)
    check_tensor("positions", positions, dtype=POSITION_TYPES, shape=(num_tokens,), device=device)
    check_rows(rows, num_tokens, num_rows, device)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm belong together; pass both or neither")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(name, norm, dtype=FLOAT_TYPES, shape=(head_dim,), device=device)
    if out is None:
        out = torch.empty(num_tokens, num_heads, head_dim, dtype=keys.dtype, device=device)
    check_tensor("out", out, dtype=FLOAT_TYPES, shape=(num_tokens, num_heads, head_dim), device=device)
    _rotary_kernel[(num_tokens, num_heads + 2 * num_key_heads)](
        qkv,
        cos,
        sin,
        positions,
        positions if rows is None else rows,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        keys,
        values,
        out,
        float(eps),
        cos.shape[0],
        num_rows,
        num_places,
        NUM_HEADS=num_heads,
        NUM_KEY_HEADS=num_key_heads,
        HEAD_DIM=head_dim,
        HAS_ROWS=rows is not None,
        HAS_ONE_ROW=num_rows == 1,
        HAS_NORM=q_norm is not None,
        BLOCK_HALF=next_power_of_two(head_dim // 2),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return out


@jit(
    do_not_specialize=["eps", "num_positions", "num_rows", "num_places"],
    do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"],
)
def _rotary_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    rows_ptr,
    q_norm_ptr,
    k_norm_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    eps,
    num_positions,
    num_rows,
    num_places,
    NUM_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_ONE_ROW: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions_ptr + token).to(tl.int64)
    if HAS_ROWS:
        cache_row = tl.load(rows_ptr + token).to(tl.int64)
    elif HAS_ONE_ROW:
        cache_row = token * 0
    else:
        cache_row = token
    dim = tl.arange(0, BLOCK_HALF)
    in_half = dim < HALF
    source = qkv_ptr + token * ((NUM_HEADS + 2 * NUM_KEY_HEADS) * HEAD_DIM) + head * HEAD_DIM + dim
    first = tl.load(source, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=in_half, other=0.0).to(tl.float32)
    is_value = head >= NUM_HEADS + NUM_KEY_HEADS
    if HAS_NORM:
        norm_ptr = k_norm_ptr
        if head < NUM_HEADS:
            norm_ptr = q_norm_ptr
        mean_square = tl.sum(first * first + second * second, axis=0) / HEAD_DIM
        inverse = tl.where(is_value, 1.0, tl.rsqrt(mean_square + eps))
        norm_first = tl.load(norm_ptr + dim, mask=in_half, other=0.0).to(tl.float32)
        norm_second = tl.load(norm_ptr + HALF + dim, mask=in_half, other=0.0).to(tl.float32)
        first *= inverse * tl.where(is_value, 1.0, norm_first)
        second *= inverse * tl.where(is_value, 1.0, norm_second)
    angle = tl.minimum(tl.maximum(position, 0), num_positions - 1) * HALF + dim
    cos = tl.where(is_value, 1.0, tl.load(cos_ptr + angle, mask=in_half, other=0.0))
    sin = tl.where(is_value, 0.0, tl.load(sin_ptr + angle, mask=in_half, other=0.0))
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    if head < NUM_HEADS:
        target = out_ptr + (token * NUM_HEADS + head) * HEAD_DIM + dim
        tl.store(target, rotated_first.to(out_ptr.dtype.element_ty), mask=in_half)
        tl.store(target + HALF, rotated_second.to(out_ptr.dtype.element_ty), mask=in_half)
    elif (position >= 0) & (position < num_places) & (cache_row >= 0) & (cache_row < num_rows):
        key_head = (head - NUM_HEADS) % NUM_KEY_HEADS
        place = ((cache_row * NUM_KEY_HEADS + key_head) * num_places + position) * HEAD_DIM + dim
        target = keys_ptr + place
        if is_value:
            target = values_ptr + place
        tl.store(target, rotated_first.to(keys_ptr.dtype.element_ty), mask=in_half)
        tl.store(target + HALF, rotated_second.to(keys_ptr.dtype.element_ty), mask=in_half)
