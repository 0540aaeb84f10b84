"""Plain-torch reference of the decode step: a whole sequence at once, in float64, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from flexquant_rl.kernels.native_decoder import DecoderWeights, LayerWeights, LinearWeights
from flexquant_rl.kernels.reference import dequantize


def decode_reference(weights: DecoderWeights, token_ids: Tensor, bit_widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reads a sequence from its beginning with one bit-width per unit.

    Shapes: T tokens, U units, L layers.

    Args:
        weights: The model.
        token_ids: `[T]` int64.
        bit_widths: `[U]` int64; 0 reads the unquantised weights.

    Returns:
        logits `[T, vocab]`, residual_update `[T, L]` and crest `[T, L]`; float64.
    """
    hidden = weights.embedding[token_ids].double()
    residual_update, crest = [], []
    for layer in weights.layers:
        before = hidden
        hidden = hidden + _attention(weights, layer, hidden, int(bit_widths[layer.attention_unit]))
        normed = _rms_norm(hidden, layer.mlp_norm, weights.norm_epsilon)
        mlp_width = int(bit_widths[layer.mlp_unit])
        gate, up = _linear(layer.gate, normed, mlp_width), _linear(layer.up, normed, mlp_width)
        hidden = hidden + _linear(layer.down, functional.silu(gate) * up, mlp_width)
        residual_update.append((hidden - before).norm(dim=1) / before.norm(dim=1))
        crest.append(before.abs().amax(1) / before.square().mean(1).sqrt())
    head_width = 0 if weights.head_unit < 0 else int(bit_widths[weights.head_unit])
    logits = _linear(weights.head, _rms_norm(hidden, weights.final_norm, weights.norm_epsilon), head_width)
    return logits, torch.stack(residual_update, dim=1), torch.stack(crest, dim=1)


def _attention(weights: DecoderWeights, layer: LayerWeights, hidden: Tensor, bit_width: int) -> Tensor:
    normed = _rms_norm(hidden, layer.attention_norm, weights.norm_epsilon)
    num_tokens = len(hidden)

    def heads(linear: LinearWeights, norm: Tensor | None, *, rotated: bool) -> Tensor:
        """`[heads, T, head_dim]`."""
        x = _linear(linear, normed, bit_width).view(num_tokens, -1, weights.head_dim).transpose(0, 1)
        x = x if norm is None else _rms_norm(x, norm, weights.norm_epsilon)
        return _rotate(x, weights.cosine[:num_tokens], weights.sine[:num_tokens]) if rotated else x

    queries = heads(layer.query, layer.query_norm, rotated=True)
    keys = heads(layer.key, layer.key_norm, rotated=True)
    values = heads(layer.value, None, rotated=False)
    group = weights.num_heads // weights.num_key_value_heads
    scores = queries @ keys.repeat_interleave(group, 0).transpose(1, 2) * weights.attention_scale
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ values.repeat_interleave(group, 0)
    return _linear(layer.output, mixed.transpose(0, 1).flatten(1), bit_width)


def _linear(linear: LinearWeights, x: Tensor, bit_width: int) -> Tensor:
    if bit_width == 0:
        assert linear.dense is not None, "width 0 needs the unquantised weights"
        matrix = linear.dense
    else:
        assert linear.nested is not None, "a stored width needs nested weights"
        matrix = dequantize(linear.nested, bit_width=bit_width)
    return functional.linear(x, matrix.double(), None if linear.bias is None else linear.bias.double())


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.double()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates the pairs (i, i + d / 2) of `[heads, T, d]` by the angle of each position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
