"""How far each layer moved the residual stream, all layers and tokens in one launch: two signals of a policy."""
# Kernel functions are Triton's own dialect; the launcher above them is checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor

from flexquant_rl.kernels.launching import check_tensor, constant, jit, next_power_of_two, require_triton, tl
from flexquant_rl.kernels.rms_norm import MAX_INPUTS
from flexquant_rl.kernels.signal_constants import NORM_FLOOR

_NORM_FLOOR = constant(NORM_FLOOR)


def layer_statistics(hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Compares the residual stream before and after every layer.

    Row 0 of the result is ``|h' - h| / |h|`` (`residual_update`), row 1 ``max |h| / rms(h)`` (`crest`), as
    `engine/linear.py` defines them; the last column belongs to the head, which has neither, and is 0. One program per
    column and token.

    Args:
        hidden: `[L + 1, M, K]` float32, the input of each layer and the output of the last, for M tokens; K at most
            32,768.
        out: `[M, 2, L + 1]` float32; allocated if not given.

    Returns:
        `out`, or a new tensor.

    Raises:
        ValueError: If a tensor has another dtype, shape, device or stride, or K is too large.
        RuntimeError: If Triton is not installed.
    """
    device = hidden.device
    require_triton(device)
    check_tensor("hidden", hidden, dtype=torch.float32, shape=(-1, -1, -1), device=device)
    num_layers, num_tokens, num_inputs = hidden.shape[0] - 1, *hidden.shape[1:]
    if num_layers < 1 or num_inputs > MAX_INPUTS:
        raise ValueError(f"hidden is {list(hidden.shape)}; pass [L + 1, M, K] with L >= 1 and K <= {MAX_INPUTS}")
    if out is None:
        out = torch.empty(num_tokens, 2, num_layers + 1, dtype=torch.float32, device=device)
    check_tensor("out", out, dtype=torch.float32, shape=(num_tokens, 2, num_layers + 1), device=device)
    block = next_power_of_two(num_inputs)
    _statistics_kernel[(num_layers + 1, num_tokens)](
        hidden,
        out,
        num_layers,
        NUM_INPUTS=num_inputs,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        enable_fp_fusion=True,
    )
    return out


@jit(do_not_specialize=["num_layers"], do_not_specialize_on_alignment=["out_ptr"])
def _statistics_kernel(hidden_ptr, out_ptr, num_layers, NUM_INPUTS: tl.constexpr, BLOCK: tl.constexpr):
    layer = tl.program_id(0)
    token = tl.program_id(1)
    num_tokens = tl.num_programs(1)
    index = tl.arange(0, BLOCK)
    exists = (index < NUM_INPUTS) & (layer < num_layers)
    source = hidden_ptr + (layer.to(tl.int64) * num_tokens + token) * NUM_INPUTS + index
    before = tl.load(source, mask=exists, other=0.0)
    update = tl.load(source + num_tokens.to(tl.int64) * NUM_INPUTS, mask=exists, other=0.0) - before
    norm = tl.maximum(tl.sqrt_rn(tl.sum(before * before, axis=0)), _NORM_FLOOR)
    largest = tl.max(tl.abs(before), axis=0)
    target = out_ptr + token * 2 * (num_layers + 1) + layer
    tl.store(target, tl.sqrt_rn(tl.sum(update * update, axis=0)) / norm)
    root = tl.sqrt_rn(tl.full([], NUM_INPUTS * 1.0, tl.float32))
    tl.store(target + num_layers + 1, largest * root / norm)
