"""Plain torch definitions of the kernels around the product: packing, norms, SwiGLU, rotary, the policy network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from flexquant_rl.kernels.activations import QUADS_PER_WORD, ActivationMode, PackedActivations
from flexquant_rl.kernels.bitplane import WORD_BITS, NestedWeight, padded_inputs, unpack_codes

_TINY = 1e-35  # below it 127 / x would overflow


def pack_activations(
    x: Tensor, *, mode: ActivationMode = "int8", dtype: torch.dtype = torch.float32
) -> PackedActivations:
    """Packs activations as `flexquant_rl.kernels.activations.pack_activations` does.

    Args:
        x: `[M, K]` floating point.
        mode: How to hold the values.
        dtype: Type of the values in mode "float".
    """
    num_tokens, num_inputs = x.shape
    words = functional.pad(x.float(), (0, padded_inputs(num_inputs) - num_inputs)).view(num_tokens, -1, WORD_BITS)
    if mode == "float":
        stored = words.to(dtype)
        values = stored.transpose(1, 2).contiguous()
        return PackedActivations(values, None, stored.float().sum(2), num_inputs)
    largest = words.abs().amax(2)
    is_finite = torch.isfinite(largest)
    is_used = is_finite & (largest >= _TINY)
    # Tensors on both sides: with a number torch multiplies by a reciprocal, which rounds twice.
    limit = torch.full_like(largest, 127.0)
    inverse = limit / torch.where(is_used, largest, 1.0)
    q = torch.where(is_used[..., None], words * inverse[..., None], 0.0).round()
    scale = torch.where(is_finite, torch.where(is_used, largest, 0.0) / limit, torch.nan)
    lanes = q.to(torch.int8).view(num_tokens, -1, QUADS_PER_WORD, 4).transpose(1, 2).contiguous()  # [M, 8, W, 4]
    return PackedActivations(lanes.view(torch.int32)[..., 0].contiguous(), scale, q.sum(2) * scale, num_inputs)


def unpack_activations(x: PackedActivations) -> Tensor:
    """The values that packed activations stand for, `[M, Kp]` float32, padding included."""
    if x.scale is None:
        return x.values.float().transpose(1, 2).reshape(x.num_tokens, -1)
    lanes = x.values.view(torch.int8).view(x.num_tokens, QUADS_PER_WORD, -1, 4).transpose(1, 2)  # [M, W, 8, 4]
    return (lanes.float() * x.scale[..., None, None]).reshape(x.num_tokens, -1)


def gemv(
    x: PackedActivations,
    weight: NestedWeight,
    row_widths: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The product with a width for every row, integer sums exact, everything after them in float64.

    Args:
        x: M packed tokens.
        weight: N outputs.
        row_widths: `[N]` integers; clamped to the stored range.
        bias: `[N]`.
        residual: `[M, N]`.

    Returns:
        `[M, N]` float64.
    """
    num_padded = weight.num_padded_inputs
    used_groups = -(-weight.num_inputs // weight.group_size)
    words_per_group = weight.group_size // WORD_BITS
    result = torch.empty(x.num_tokens, weight.num_outputs, dtype=torch.float64, device=x.device)
    widths = row_widths.clamp(weight.bit_widths[0], weight.bit_widths[-1])
    for width in widths.unique().tolist():
        rows = widths == width
        codes = unpack_codes(weight.planes[:, rows], bit_width=width, num_inputs=num_padded).double()
        scale, offset = (pair[rows, :used_groups].double() for pair in weight.scale_and_offset(width))
        if x.scale is None:
            dots = codes.view(len(codes), 1, -1, WORD_BITS) * unpack_activations(x).double().view(
                1, x.num_tokens, -1, WORD_BITS
            )
            per_word = dots.sum(3)
        else:
            lanes = x.values.view(torch.int8).view(x.num_tokens, QUADS_PER_WORD, -1, 4).transpose(1, 2)
            quantised = lanes.double().reshape(x.num_tokens, -1, WORD_BITS)
            # The largest sum, 32 * 255 * 127, is far below 2^53: float64 holds these integers exactly.
            dots = torch.einsum("mwi,nwi->nmw", quantised, codes.view(len(codes), -1, WORD_BITS))
            per_word = dots * x.scale.double()
        products = per_word.unflatten(2, (-1, words_per_group)).sum(3)[..., :used_groups]
        sums = x.sums.double().unflatten(1, (-1, words_per_group)).sum(2)[:, :used_groups]
        result[:, rows] = (products * scale[:, None]).sum(2).T + sums @ offset.T
    if bias is not None:
        result += bias.double()
    if residual is not None:
        result += residual.double()
    return result


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32."""
    values = x.float()
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight.float()


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of `[M, 2F]`, the gate first, in float32: `[M, F]`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return functional.silu(gate) * up


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `[M, H, D]` by `cos`, `sin` `[M, D / 2]`: the halves of a head are the parts of D / 2 complex numbers."""
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def policy_logits(weights: dict[str, Tensor], signals: Tensor, *, num_units: int) -> Tensor:
    """Scores of the policy network (engine/control/policy.py, `PrecisionNet.logits`) from its state dict.

    Args:
        weights: The state dict.
        signals: `[B, G + U * F]` float32.
        num_units: U.

    Returns:
        `[B, U, V]` float32.
    """
    num_global = weights["encode_global.0.weight"].shape[1]
    mean, std = weights["mean"], weights["std"]
    global_signals = (signals[:, :num_global] - mean[:num_global]) / std[:num_global]
    unit_signals = signals[:, num_global:].unflatten(1, (num_units, -1))
    unit_signals = (unit_signals - mean[num_global:]) / std[num_global:]

    def linear(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    context = linear("encode_global.0", global_signals).tanh()[:, None].expand(-1, num_units, -1)
    hidden = linear("encode_unit.0", torch.cat([unit_signals, context], dim=-1)).tanh()
    return linear("width_head", linear("encode_unit.2", hidden).tanh())
