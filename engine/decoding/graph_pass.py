"""The model over a fixed number of tokens on the GPU: embedding, layers, head, as launches that a graph can hold.

Weights are read once for all tokens. Whatever a pass depends on (tokens, places, cache rows, widths) is in tensors on
the device, and whatever it writes is allocated once, so the same launches serve every pass of that size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from flexquant_rl.engine.decoding.graph_weights import StepLayer, StepLinear, StepWeights
from flexquant_rl.kernels.activations import ActivationMode, PackedActivations
from flexquant_rl.kernels.attention import AttentionParts, attend
from flexquant_rl.kernels.gemv import gemv
from flexquant_rl.kernels.layer_statistics import layer_statistics
from flexquant_rl.kernels.rms_norm import rms_norm
from flexquant_rl.kernels.rotary import rotary
from flexquant_rl.kernels.swiglu import swiglu


class TokenPass:
    """Launches a model over M tokens.

    A token's numbers depend on nothing that stands beside it in the pass: every kernel sums them up in one order,
    whatever M is. Only an output head that is not nested is torch's product, whose order may change with M.

    Attributes:
        weights: The model.
        num_tokens: M.
        bit_widths: `[U]` int32, the widths of the pass; the caller writes them.
        logits: `[M, V]` float32 of the last pass.
        statistics: `[M, 2, L + 1]` float32, residual updates and crests, as of the last `measure`.

    Args:
        weights: The model, on the device.
        num_tokens: M, at most what a product takes.
        mode: How activations of nested products are held: "int8", or "float" as a reference.
        cache_dtype: Type of keys and values.
    """

    def __init__(
        self, weights: StepWeights, num_tokens: int, *, mode: ActivationMode, cache_dtype: torch.dtype
    ) -> None:
        device = weights.device
        vocab_size, num_inputs = weights.embedding.shape
        num_layers, num_queries = len(weights.layers), weights.num_heads * weights.head_dim
        ffn = {_num_inputs(layer.down) for layer in weights.layers}
        (num_hidden,) = ffn  # one size for all layers, as in every model of the family

        def floats(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        def packed(size: int) -> PackedActivations:
            return PackedActivations.allocate(num_tokens, size, device=device, mode=mode)

        self.weights = weights
        self.num_tokens = num_tokens
        self.bit_widths = torch.zeros(weights.num_units, dtype=torch.int32, device=device)
        self.logits = floats(num_tokens, vocab_size)
        self.statistics = floats(num_tokens, 2, num_layers + 1)
        self._width_of = [self.bit_widths[unit : unit + 1] for unit in range(weights.num_units)]
        self._residual = floats(num_layers + 1, num_tokens, num_inputs)  # each layer's input, and the last output
        self._middle = floats(num_tokens, num_inputs)
        self._normed = packed(num_inputs)
        self._qkv = floats(num_tokens, num_queries + 2 * weights.num_key_heads * weights.head_dim)
        self._queries = torch.empty(num_tokens, weights.num_heads, weights.head_dim, dtype=cache_dtype, device=device)
        self._mixed = packed(num_queries)
        self._gate_up = floats(num_tokens, 2 * num_hidden)
        self._gated = packed(num_hidden)

    def __call__(
        self, token_ids: Tensor, positions: Tensor, cache: Tensor, parts: AttentionParts, *, rows: Tensor | None = None
    ) -> None:
        """Reads tokens: writes their keys and values at their places, and `logits`. Launches only.

        Args:
            token_ids: `[M]` int64.
            positions: `[M]` int64, ascending by one within a row; a token at -1 fills up the pass and leaves no trace.
            cache: `[2, L, R, J, size, D]`: keys and values of each layer.
            parts: Buffers of attention for M tokens over this cache.
            rows: `[M]` int64, the cache row of each token; None where there is one row.
        """
        torch.index_select(self.weights.embedding, 0, token_ids, out=self._residual[0])
        for index, (layer, (before, after)) in enumerate(
            zip(self.weights.layers, pairwise(self._residual.unbind(0)), strict=True)
        ):
            self._attention(layer, before, positions, cache[:, index], parts, rows)
            self._mlp(layer, after)
        self._head(self._residual[-1])

    def measure(self) -> None:
        """Brings `statistics` up to date with the last pass. Launches only."""
        layer_statistics(self._residual, out=self.statistics)

    def _attention(
        self,
        layer: StepLayer,
        before: Tensor,
        positions: Tensor,
        keys_and_values: Tensor,
        parts: AttentionParts,
        rows: Tensor | None,
    ) -> None:
        weights = self.weights
        width = self._width_of[layer.attention_unit]
        keys, values = keys_and_values
        rms_norm(before, layer.attention_norm, eps=weights.norm_epsilon, out=self._normed)
        _multiply(layer.qkv, self._normed, width, out=self._qkv)
        rotary(
            self._qkv,
            weights.cosine,
            weights.sine,
            positions,
            keys,
            values,
            rows=rows,
            q_norm=layer.query_norm,
            k_norm=layer.key_norm,
            eps=weights.norm_epsilon,
            out=self._queries,
        )
        attend(
            self._queries,
            keys,
            values,
            positions,
            scale=weights.attention_scale,
            rows=rows,
            parts=parts,
            out=self._mixed,
        )
        _multiply(layer.output, self._mixed, width, residual=before, out=self._middle)

    def _mlp(self, layer: StepLayer, after: Tensor) -> None:
        width = self._width_of[layer.mlp_unit]
        rms_norm(self._middle, layer.mlp_norm, eps=self.weights.norm_epsilon, out=self._normed)
        _multiply(layer.gate_up, self._normed, width, out=self._gate_up)
        swiglu(self._gate_up, out=self._gated)
        _multiply(layer.down, self._gated, width, residual=self._middle, out=after)

    def _head(self, hidden: Tensor) -> None:
        weights = self.weights
        if weights.head.dense is None:
            rms_norm(hidden, weights.final_norm, eps=weights.norm_epsilon, out=self._normed)
            _multiply(weights.head, self._normed, self._width_of[weights.head_unit], out=self.logits)
            return
        # An unquantised head: torch's product, whose temporaries are in the graph's own pool.
        normed = functional.rms_norm(hidden, hidden.shape[-1:], weights.final_norm, weights.norm_epsilon)
        torch.mm(normed, weights.head.dense.t(), out=self.logits)
        if weights.head.bias is not None:
            self.logits.add_(weights.head.bias)


def _num_inputs(linear: StepLinear) -> int:
    assert linear.weight is not None
    return linear.weight.num_inputs


def _multiply(
    linear: StepLinear, x: PackedActivations, width: Tensor, *, residual: Tensor | None = None, out: Tensor
) -> None:
    assert linear.weight is not None, "only the head may be unquantised"
    gemv(x, linear.weight, width, bias=linear.bias, residual=residual, out=out)
