"""The definition of the product over bitplanes in its kernel's place: Triton's interpreter takes seconds for it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from flexquant_rl.kernels import reference_ops
from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.bitplane import NestedWeight


def defined_product(
    x: PackedActivations,
    weight: NestedWeight,
    bit_widths: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """As `gemv` for one unit; each token alone, so that its bits do not depend on those beside it, as the kernel's."""
    rows = bit_widths[:1].expand(weight.num_outputs)
    for token in range(x.num_tokens):
        one = slice(token, token + 1)
        alone = replace(x, values=x.values[one], scale=None if x.scale is None else x.scale[one], sums=x.sums[one])
        beside = None if residual is None else residual[one]
        out[one] = reference_ops.gemv(alone, weight, rows, bias=bias, residual=beside)
    return out
