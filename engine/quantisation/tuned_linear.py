"""Linears whose codes are frozen and whose scales and offsets, one pair per group and width, follow a gradient.

A pair has two coordinates in units of its own cell: how far the values are spread, and how far they are moved. The
codes of a group have mean m and deviation r, so that with steps (a, d) and the pair (s, o) that it began with

    scale = s * (1 + a / r),   offset = o + s * (d - a * m / r).

A step in either moves the weights of the group by as much, whatever the width, and the two do not disturb each other:
one learning rate serves all. The dense matrix is made block by block, in the backward pass once more, and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexquant_rl.engine.linear import REFERENCE_WIDTH, NestedLinear, active_plan
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels.bitplane import NUM_PLANES, unpack_codes

# Weights of one block: enough work for a product, on a CPU a little more than its caches hold.
_CPU_BLOCK, _GPU_BLOCK = 1 << 21, 1 << 25
# Rounding to bfloat16 moves a weight by up to a 512th of itself: little at these widths, half a cell at 8 bits.
_WIDEST_BFLOAT16 = 6


def has_bfloat16(device: torch.device) -> bool:
    """Whether a product in bfloat16 is faster than one in float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _PairProduct(torch.autograd.Function):
    """`x @ W.T` with ``W = scale * (codes >> shift) + offset``, differentiable in x, scale and offset.

    Shapes: M tokens, N outputs, K inputs, P parts of a row, K / P inputs each, that share a pair.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, codes: Tensor, shift: int, dtype: torch.dtype
    ) -> Tensor:
        """`[M, K]` float32, `[N, P]`, `[N, P]`, `[N, K]` uint8 -> `[M, N]` float32; products are in `dtype`."""
        ctx.save_for_backward(x, scale, offset, codes)
        ctx.shift, ctx.dtype = shift, dtype
        out = x.new_empty(len(x), len(codes))
        inputs = x.to(dtype)
        for rows in _row_blocks(codes):
            weight, _ = _decode(codes[rows], scale[rows], offset[rows], shift)
            out[:, rows] = inputs @ weight.to(dtype).T
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        """Gradients of x (where wanted), scale and offset."""
        x, scale, offset, codes = ctx.saved_tensors
        shift, dtype = ctx.shift, ctx.dtype
        x_grad = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        scale_grad = torch.empty_like(scale)
        inputs, grad_low = x.to(dtype), grad.to(dtype)
        for rows in _row_blocks(codes):
            weight, values = _decode(codes[rows], scale[rows], offset[rows], shift)
            if x_grad is not None:
                x_grad += (grad_low[:, rows] @ weight.to(dtype)).float()
            weight_grad = (grad_low[:, rows].T @ inputs).float()
            scale_grad[rows] = weight_grad.view_as(values).mul_(values).sum(-1)
        offset_grad = grad.T @ x.view(len(x), scale.shape[1], -1).sum(-1)
        return x_grad, scale_grad, offset_grad, None, None, None


def _row_blocks(codes: Tensor) -> Iterator[slice]:
    num_rows = max(1, (_GPU_BLOCK if codes.is_cuda else _CPU_BLOCK) // codes.shape[1])
    for start in range(0, len(codes), num_rows):
        yield slice(start, start + num_rows)


def _decode(codes: Tensor, scale: Tensor, offset: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """The weights `[n, K]` of a block of rows, and their codes at this width `[n, P, K / P]`, float32."""
    values = (codes >> shift).view(*scale.shape, -1).float()
    return torch.addcmul(offset[..., None], values, scale[..., None]).flatten(1), values


class _WidthPairs(nn.Module):
    """The pairs of one width of one linear: where they began, and the steps away from there.

    Args:
        codes: `[N, K]` uint8, 8-bit codes.
        scale: `[N, G]` float16.
        offset: `[N, G]` float16.
        bit_width: The width.
        group_size: Inputs of a group.
    """

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor, bit_width: int, group_size: int) -> None:
        super().__init__()
        self.shift = NUM_PLANES - bit_width
        self._scale, self._offset = scale.float(), offset.float()
        means, deviations = [], []
        for start in range(0, codes.shape[1], group_size):
            values = (codes[:, start : start + group_size] >> self.shift).float()
            means.append(values.mean(1))
            deviations.append(values.std(1, correction=0))
        self._mean = torch.stack(means, 1)
        deviation = torch.stack(deviations, 1)
        self._spread = torch.where(deviation > 0, 1 / deviation, 0.0)  # where all codes are equal there is nothing
        self.steps = nn.Parameter(torch.zeros(2, *scale.shape, device=scale.device))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Scale and offset now, `[N, G]` float32, differentiable in the steps."""
        spread, moved = self.steps[0] * self._spread, self.steps[1]
        return self._scale * (1 + spread), self._offset + self._scale * (moved - spread * self._mean)

    @torch.no_grad()
    def stored(self) -> tuple[Tensor, Tensor]:
        """The pairs as a checkpoint holds them, `[N, G]` float16; unchanged where nothing moved.

        The offset is fitted to the rounded scale, so that rounding the scale leaves no bias.
        """
        scale, offset = self.pairs()
        rounded = scale.clamp_min(0).half()
        stored_offset = (offset + (scale - rounded.float()) * self._mean).half()
        still = (self.steps == 0).all(0)
        return (
            torch.where(still, self._scale.half(), rounded),
            torch.where(still, self._offset.half(), stored_offset),
        )


class TunedLinear(nn.Module):
    """Stands in for a `NestedLinear` while its pairs are tuned; reads the width of the active `WidthPlan`.

    Args:
        linear: What it stands in for, with its unquantised weights.
        widths: The widths that are tuned.
    """

    def __init__(self, linear: NestedLinear, widths: Sequence[int]) -> None:
        super().__init__()
        weight = linear.weight
        assert linear.reference_weight is not None, "tuning compares with the unquantised weights"
        self.bias, self.unit_idx, self._reference = linear.bias, linear.unit_idx, linear.reference_weight
        self.num_inputs, self.num_outputs = weight.num_inputs, weight.num_outputs
        self._group_size = weight.group_size
        self._num_groups = -(-weight.num_inputs // weight.group_size)  # those that hold inputs
        self._codes = unpack_codes(weight.planes, bit_width=NUM_PLANES, num_inputs=weight.num_inputs)
        self._part = math.gcd(weight.num_inputs, weight.group_size)
        self.by_width = nn.ModuleDict()
        for width in widths:
            index = weight.bit_widths.index(width)
            used = slice(0, self._num_groups)
            self.by_width[str(width)] = _WidthPairs(
                self._codes, weight.scale[index, :, used], weight.offset[index, :, used], width, weight.group_size
            )
        self.arithmetic = torch.float32
        self.rounds = False

    def steps(self, width: int) -> nn.Parameter:
        """What is tuned of a width, `[2, N, G]` float32: zero is where the pairs began."""
        return self._of(width).steps

    def stored(self, width: int) -> tuple[Tensor, Tensor]:
        """Scale and offset of a width as they are to be stored, `[N, G]` float16, groups that hold inputs."""
        return self._of(width).stored()

    def _of(self, width: int) -> _WidthPairs:
        pairs = self.by_width[str(width)]
        assert isinstance(pairs, _WidthPairs)
        return pairs

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies, `[..., K]` -> `[..., N]`; all tokens read one width, 0 the unquantised weights."""
        plan = active_plan()
        assert plan is not None, "called under a plan, as a nested linear is"
        [(width, _)] = plan.groups(self.unit_idx, x).runs
        if width == REFERENCE_WIDTH:
            return F.linear(x, self._reference, self.bias)
        pairs = self._of(width)
        scale, offset = (each.float() for each in (pairs.stored() if self.rounds else pairs.pairs()))
        num_parts = self._codes.shape[1] // self._part
        scale, offset = (
            each.repeat_interleave(self._group_size // self._part, 1)[:, :num_parts] for each in (scale, offset)
        )
        dtype = self.arithmetic if width <= _WIDEST_BFLOAT16 else torch.float32
        inputs = x.reshape(-1, x.shape[-1])
        out: Tensor = _PairProduct.apply(  # type: ignore[no-untyped-call]
            inputs, scale, offset, self._codes, pairs.shift, dtype
        )
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)


@contextmanager
def tunable(model: NestedCausalLM, widths: Sequence[int]) -> Iterator[dict[str, TunedLinear]]:
    """Inside the block the model's nested linears are tunable ones, by name; after it they are what they were.

    Args:
        model: A model with its unquantised weights. Nobody else may run it meanwhile.
        widths: The widths that are tuned.
    """
    nested = model.nested_linears()
    tuned: dict[str, TunedLinear] = {}
    try:
        for name, linear in nested.items():
            tuned[name] = TunedLinear(linear, widths)
            model.hf_model.set_submodule(name, tuned[name])
        yield tuned
    finally:
        for name in tuned:
            model.hf_model.set_submodule(name, nested[name])
