"""A Llama-family model as the GPU's decode step reads it: fused matrices, norms, rotation tables.

Made from the description that the CPU's lean decoder uses: a model's parts are found in one place, llama_parts.py.
q, k, v and gate, up are one matrix each, whose rows their modules hold from then on; every other tensor is the
model's own. So weights exist once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.llama_parts import decoder_weights
from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.model import NestedCausalLM, decoder_layers
from flexquant_rl.kernels.bitplane import NestedWeight
from flexquant_rl.kernels.native_decoder import LayerWeights, LinearWeights

_PARTS = ("planes", "scale", "offset")


@dataclass(frozen=True)
class StepLinear:
    """One product of a step, of one unit.

    Attributes:
        weight: The stored bitplanes; None where the matrix is not nested.
        bias: `[N]` float32 or None.
        dense: `[N, K]` float32 where the matrix is not nested, as an output head may be.
    """

    weight: NestedWeight | None
    bias: Tensor | None = None
    dense: Tensor | None = None


@dataclass(frozen=True)
class StepLayer:
    """One decoder layer. Norms are float32; those of heads are `[head_dim]`, None where absent."""

    qkv: StepLinear
    output: StepLinear
    gate_up: StepLinear
    down: StepLinear
    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_unit: int
    mlp_unit: int


@dataclass(frozen=True)
class StepWeights:
    """What a step reads, on one device.

    Attributes:
        layers: Decoder layers.
        embedding: `[V, K]` float32.
        final_norm: `[K]` float32.
        head: The output head.
        head_unit: Its unit; -1 where it is not nested.
        cosine: `[P, head_dim / 2]` float32, P positions at most.
        sine: As `cosine`.
        num_heads: Query heads.
        num_key_heads: Key heads.
        head_dim: Size of a head.
        norm_epsilon: Epsilon of all norms.
        attention_scale: Factor of the scores.
        num_units: U.
    """

    layers: tuple[StepLayer, ...]
    embedding: Tensor
    final_norm: Tensor
    head: StepLinear
    head_unit: int
    cosine: Tensor
    sine: Tensor
    num_heads: int
    num_key_heads: int
    head_dim: int
    norm_epsilon: float
    attention_scale: float
    num_units: int

    @property
    def max_length(self) -> int:
        """Positions that the rotation tables hold."""
        return len(self.cosine)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.embedding.device


def fuse_weights(model: NestedCausalLM) -> None:
    """Puts q, k, v and gate, up of every layer into one matrix each; the second time does nothing.

    The model holds the same numbers as before, still once: its modules' tensors become rows of these matrices, one
    layer after the other, so that no more than a layer ever exists twice.
    """
    for layer in decoder_layers(model.tree):
        parts: Any = layer
        attention, mlp = parts.self_attn, parts.mlp
        _put_together([attention.q_proj, attention.k_proj, attention.v_proj])
        _put_together([mlp.gate_proj, mlp.up_proj])


def _put_together(linears: Sequence[NestedLinear]) -> None:
    for part in _PARTS:
        tensors = [getattr(linear, part) for linear in linears]
        if _whole(tensors) is None:
            rows = torch.cat(tensors, dim=1).split([tensor.shape[1] for tensor in tensors], dim=1)
            for linear, own in zip(linears, rows, strict=True):
                setattr(linear, part, own)


def _whole(tensors: Sequence[Tensor]) -> Tensor | None:
    """The contiguous `[S, N, W]` whose rows the tensors `[S, N_i, W]` are, one after another; None if they are not."""
    first = tensors[0]
    num_slices, _, row_size = first.shape
    num_rows = sum(tensor.shape[1] for tensor in tensors)
    strides, start = (num_rows * row_size, row_size, 1), first.storage_offset()
    for tensor in tensors:
        is_next = tensor.storage_offset() == start and tensor.stride() == strides
        if not is_next or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        start += tensor.shape[1] * row_size
    return first.as_strided((num_slices, num_rows, row_size), strides)


def step_weights(model: NestedCausalLM, max_length: int) -> StepWeights:
    """Describes a model that `why_other_numbers` finds nothing against; fuses its weights (`fuse_weights`).

    Args:
        model: On the device that will decode.
        max_length: Tokens that a sequence can hold.
    """
    fuse_weights(model)
    weights = decoder_weights(model, max_length)
    head = weights.head
    return StepWeights(
        layers=tuple(_step_layer(layer) for layer in weights.layers),
        embedding=weights.embedding,
        final_norm=weights.final_norm,
        head=StepLinear(head.nested, head.bias, head.dense if head.nested is None else None),
        head_unit=weights.head_unit,
        cosine=weights.cosine.to(model.device),
        sine=weights.sine.to(model.device),
        num_heads=weights.num_heads,
        num_key_heads=weights.num_key_value_heads,
        head_dim=weights.head_dim,
        norm_epsilon=weights.norm_epsilon,
        attention_scale=weights.attention_scale,
        num_units=weights.num_units,
    )


def _step_layer(layer: LayerWeights) -> StepLayer:
    return StepLayer(
        qkv=_fused((layer.query, layer.key, layer.value)),
        output=_fused((layer.output,)),
        gate_up=_fused((layer.gate, layer.up)),
        down=_fused((layer.down,)),
        attention_norm=layer.attention_norm,
        mlp_norm=layer.mlp_norm,
        query_norm=layer.query_norm,
        key_norm=layer.key_norm,
        attention_unit=layer.attention_unit,
        mlp_unit=layer.mlp_unit,
    )


def _fused(linears: Sequence[LinearWeights]) -> StepLinear:
    """Linears with the same input, whose rows follow one another, as one."""
    nested = [linear.nested for linear in linears if linear.nested is not None]
    assert len(nested) == len(linears), "every linear of a decoder layer is nested"
    first, bias = nested[0], None
    if any(linear.bias is not None for linear in linears):
        biases = [
            torch.zeros(linear.shape[0], dtype=torch.float32, device=first.planes.device)
            if linear.bias is None
            else linear.bias
            for linear in linears
        ]
        bias = torch.cat(biases)
    if len(nested) == 1:
        return StepLinear(first, bias)
    planes, scale, offset = (_whole([getattr(weight, part) for weight in nested]) for part in _PARTS)
    assert planes is not None and scale is not None and offset is not None, "fuse_weights put them together"
    return StepLinear(NestedWeight(planes, scale, offset, first.bit_widths, first.group_size, first.num_inputs), bias)
