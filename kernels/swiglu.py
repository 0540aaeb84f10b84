"""The gated activation between the two halves of an MLP, its result packed for the bitplane product."""
# Kernel functions are Triton's own dialect; the launcher above them is checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from torch import Tensor

from flexquant_rl.kernels.activations import (
    ActivationMode,
    PackedActivations,
    launch_packing,
    load_words,
    store_packed,
)
from flexquant_rl.kernels.launching import FLOAT_TYPES, check_tensor, jit, require_triton, tl


def swiglu(
    gate_up: Tensor, *, mode: ActivationMode = "int8", out: PackedActivations | None = None
) -> PackedActivations:
    """Computes ``silu(gate) * up`` in float32 and packs it as `pack_activations`.

    Args:
        gate_up: `[M, 2F]` float16, bfloat16 or float32, contiguous: F gates, then F values, as the fused product of the
            two leaves them.
        mode: How to hold the values, if `out` is not given.
        out: Buffers for `[M, F]`; allocated if not given.

    Returns:
        `out`, or new buffers.

    Raises:
        ValueError: If a tensor has another dtype, shape, device, stride or alignment, or 2F is odd.
        RuntimeError: If Triton is not installed.
    """
    require_triton(gate_up.device)
    check_tensor("gate_up", gate_up, dtype=FLOAT_TYPES, shape=(-1, -1), device=gate_up.device)
    num_tokens, num_columns = gate_up.shape
    if num_columns % 2 or num_columns == 0:
        raise ValueError(f"gate_up has {num_columns} columns but needs as many gates as values; pass [M, 2F]")
    return launch_packing(_swiglu_kernel, gate_up, num_tokens, num_columns // 2, mode=mode, out=out)


@jit()
def _swiglu_kernel(
    gate_up_ptr,
    values_ptr,
    scale_ptr,
    sums_ptr,
    NUM_INPUTS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first_word = tl.program_id(1) * BLOCK_WORDS
    word = first_word + tl.arange(0, BLOCK_WORDS)
    row_ptr = gate_up_ptr + token * 2 * NUM_INPUTS
    gate = load_words(row_ptr, first_word, NUM_INPUTS, BLOCK_WORDS)
    up = load_words(row_ptr + NUM_INPUTS, first_word, NUM_INPUTS, BLOCK_WORDS)
    store_packed(gate * tl.sigmoid(gate) * up, word, token, values_ptr, scale_ptr, sums_ptr, NUM_WORDS, IS_INT8)
