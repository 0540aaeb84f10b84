"""Root-mean-square norm that leaves its result packed for the bitplane product, in one kernel."""
# Kernel functions are Triton's own dialect; the launcher above them is checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from torch import Tensor

from flexquant_rl.kernels.activations import (
    ActivationMode,
    PackedActivations,
    load_words,
    output_pointers,
    store_packed,
)
from flexquant_rl.kernels.launching import (
    FLOAT_TYPES,
    check_tensor,
    jit,
    next_power_of_two,
    require_triton,
    tl,
)

MAX_INPUTS = 32_768
"""A program holds a whole token in registers."""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    mode: ActivationMode = "int8",
    out: PackedActivations | None = None,
) -> PackedActivations:
    """Normalises tokens and packs them for the product.

    Computes ``x / sqrt(mean(x^2) + eps) * weight`` in float32, then packs as `pack_activations`. One program per token.

    Args:
        x: `[M, K]` float16, bfloat16 or float32, contiguous, K at most 32,768.
        weight: `[K]` float16, bfloat16 or float32.
        eps: Added to the mean square.
        mode: How to hold the values, if `out` is not given.
        out: Buffers for `[M, K]`; allocated if not given.

    Returns:
        `out`, or new buffers.

    Raises:
        ValueError: If a tensor has another dtype, shape, device, stride or alignment, or K is too large.
        RuntimeError: If Triton is not installed.
    """
    require_triton(x.device)
    check_tensor("x", x, dtype=FLOAT_TYPES, shape=(-1, -1), device=x.device)
    num_tokens, num_inputs = x.shape
    if num_inputs > MAX_INPUTS:
        raise ValueError(f"x has {num_inputs} inputs but a program holds {MAX_INPUTS}; normalise it with torch")
    check_tensor("weight", weight, dtype=FLOAT_TYPES, shape=(num_inputs,), device=x.device)
    if out is None:
        out = PackedActivations.allocate(num_tokens, num_inputs, device=x.device, mode=mode)
    out.check(num_tokens, num_inputs, x.device)
    block_words = next_power_of_two(out.num_words)
    _rms_norm_kernel[(num_tokens,)](
        x,
        weight,
        *output_pointers(out),
        float(eps),
        NUM_INPUTS=num_inputs,
        NUM_WORDS=out.num_words,
        IS_INT8=out.scale is not None,
        BLOCK_WORDS=block_words,
        num_warps=num_warps_for(block_words),
        enable_fp_fusion=False,
    )
    return out


def num_warps_for(block_words: int) -> int:
    """Warps for a token of `block_words` words: 16 values per thread, as long as there are warps."""
    return min(32, max(4, block_words // 16))


@jit(do_not_specialize=["eps"])
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    values_ptr,
    scale_ptr,
    sums_ptr,
    eps,
    NUM_INPUTS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK_WORDS)
    x = load_words(x_ptr + token * NUM_INPUTS, 0, NUM_INPUTS, BLOCK_WORDS)
    square_sum = tl.sum(tl.sum(tl.sum(x * x, axis=2), axis=1), axis=0)
    root = tl.sqrt_rn(tl.div_rn(square_sum, NUM_INPUTS * 1.0) + eps)
    normalised = x * tl.div_rn(1.0, root) * load_words(weight_ptr, 0, NUM_INPUTS, BLOCK_WORDS)
    store_packed(normalised, word, token, values_ptr, scale_ptr, sums_ptr, NUM_WORDS, IS_INT8)
