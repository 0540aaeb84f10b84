"""CPU decode step: one native call reads a token through a whole Llama-family model on bitplanes.

Between two matrix products of a small model Python and a tensor library take longer than the products themselves, so
the walk through the layers is native too. This module describes the model to cpp/decoder.h and owns the buffers;
what the numbers mean (which Hugging Face module they come from) is known one layer up, in
engine/decoding/llama_parts.py.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.kernels import huge_pages
from flexquant_rl.kernels.bitplane import NUM_PLANES, NestedWeight
from flexquant_rl.kernels.native import (
    BAD_ARGUMENT,
    ISA_CODES,
    MAX_TOKENS,
    MODE_CODES,
    OK,
    STATUS_TEXTS,
    Isa,
    Mode,
    check_weight,
    choose_isa,
    load_library,
    weight_struct,
)
from flexquant_rl.kernels.native_structs import (
    CACHE_BLOCK,
    WORKSPACE_ALIGNMENT,
    DecoderStruct,
    LayerStruct,
    LinearStruct,
    WeightStruct,
)

_MAX_HUGE_CACHE_BYTES = 32 << 20
_OUTPUT_BYTES = 1 << 20  # of logits that are made ahead; a result that is kept keeps as much


@dataclass(frozen=True)
class LinearWeights:
    """One linear, `y = W x + bias`, nested, unquantised or both.

    Attributes:
        nested: The stored bitplanes, or None.
        dense: `[N, K]` float32 unquantised matrix stored by columns (`dense.t()` is contiguous), read at width 0; or
            None.
        bias: `[N]` float32 or None.
    """

    nested: NestedWeight | None
    dense: Tensor | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        if self.nested is not None:
            return self.nested.num_outputs, self.nested.num_inputs
        assert self.dense is not None
        return self.dense.shape[0], self.dense.shape[1]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norm weights are float32; query_norm and key_norm are `[head_dim]`, None where absent."""

    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    output: LinearWeights
    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights
    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_unit: int
    mlp_unit: int


@dataclass(frozen=True)
class DecoderWeights:
    """A Llama-family model.

    Attributes:
        layers: Decoder layers.
        embedding: `[vocab, hidden]` float32.
        final_norm: `[hidden]` float32.
        head: Output head, N = vocab.
        head_unit: Its index in a bit-width vector, or -1 if it is always read unquantised.
        cosine: `[T, head_dim / 2]` float32, rotation of each position.
        sine: `[T, head_dim / 2]` float32.
        num_heads: Query heads.
        num_key_value_heads: Heads of keys and values; divides `num_heads`.
        head_dim: Even.
        norm_epsilon: Added to the mean square in every norm.
        attention_scale: Factor of the scores.
        num_units: Length of a bit-width vector.
    """

    layers: Sequence[LayerWeights]
    embedding: Tensor
    final_norm: Tensor
    head: LinearWeights
    head_unit: int
    cosine: Tensor
    sine: Tensor
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_epsilon: float
    attention_scale: float
    num_units: int


_LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one sequence.

    Attributes:
        blocks: `[layers, key-value heads, C / 16, 2, 16 * head_dim]` float32: the keys of 16 positions, `[head_dim,
            16]`, then their values, `[16, head_dim]`.
    """

    blocks: Tensor

    @staticmethod
    def empty(shape: torch.Size) -> LayerCache:
        """A cache of zeros."""
        # A step reads a few kilobytes of each head of each layer: with small pages, most of them cost a page walk. But
        # the first token already touches every huge page, so a large cache, mostly empty for long, has small ones.
        is_small = shape.numel() * torch.float32.itemsize <= _MAX_HUGE_CACHE_BYTES
        return LayerCache(
            huge_pages.zeros(shape, torch.float32) if is_small else torch.zeros(shape, dtype=torch.float32)
        )

    def copy(self, length: int) -> LayerCache:
        """An independent copy of the first `length` positions; nothing else is touched."""
        twin = LayerCache.empty(self.blocks.shape)
        used = -(-length // CACHE_BLOCK)
        twin.blocks[:, :, :used].copy_(self.blocks[:, :, :used])
        return twin


@dataclass(frozen=True)
class _Output:
    """Tensors for the results of one call, and their addresses in the order of fq_decode's arguments."""

    logits: Tensor
    residual_update: Tensor
    crest: Tensor
    logits_address: int
    residual_update_address: int
    crest_address: int


class NativeDecoder:
    """Decodes on the CPU, one call at a time.

    The result is the same, bit for bit, for any number of threads. Weights are read in place: they must not be freed
    or resized while this object is in use (it holds references). Threads may share a decoder, each with caches of its
    own: a call waits until the one before it has left the buffer of intermediate results.

    Args:
        weights: The model.
        num_threads: Threads used at most.
        mode: "int8" rounds the activations of nested products to int8, one scale per 32 inputs; "float32" keeps them.
        isa: Body to use; default: `FQ_CPU_ISA`, else the fastest.

    Raises:
        ValueError: If shapes, dtypes, devices or options disagree.
        RuntimeError: If there is no native library.
    """

    def __init__(
        self, weights: DecoderWeights, *, num_threads: int = 1, mode: Mode = "int8", isa: Isa | None = None
    ) -> None:
        """Describes the model to the library and allocates what a call needs."""
        library = load_library()
        if library is None:
            raise RuntimeError("the native kernels could not be built; decode with Hugging Face instead")
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads} must be at least 1; use 1 for no pool")
        self.weights = weights
        self.num_threads = num_threads
        self.mode: Mode = mode
        self.isa: Isa = choose_isa(isa)
        self.max_length = weights.cosine.shape[0]
        self._cache_length = -(-self.max_length // CACHE_BLOCK) * CACHE_BLOCK
        self.vocab_size, self.hidden_size = weights.embedding.shape
        heads = (len(weights.layers), weights.num_key_value_heads)
        self._cache_shape = torch.Size((*heads, self._cache_length // CACHE_BLOCK, 2, CACHE_BLOCK * weights.head_dim))
        self._kept: list[Any] = []  # what the structs point at
        self._decoder = self._describe()
        self._address = ctypes.addressof(self._decoder)
        self._options = (MODE_CODES[mode], ISA_CODES[self.isa], num_threads)
        self._decode = _declared(library)
        num_bytes = int(library.fq_decoder_workspace_bytes(self._address, MODE_CODES[mode]))
        self._lock = threading.Lock()  # of the workspace and the outputs
        self._outputs: list[_Output] = []
        self._workspace = torch.empty(num_bytes + WORKSPACE_ALIGNMENT, dtype=torch.uint8)
        self._workspace_address = -(-self._workspace.data_ptr() // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT

    def new_cache(self) -> LayerCache:
        """Room for `max_length` tokens of one sequence."""
        # Zeros: the last block is read whole, and a score that is not finite would spoil its neighbours.
        return LayerCache.empty(self._cache_shape)

    def __call__(
        self, cache: LayerCache, token_ids: Tensor, position: int, bit_widths: Tensor, *, num_logits: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Appends tokens to a sequence.

        Shapes: T tokens (1..16), U units.

        Args:
            cache: A cache of this decoder; entries `[position, position + T)` are written.
            token_ids: `[T]` int64.
            position: Tokens that the cache holds already.
            bit_widths: `[U]` int64 on the CPU; 0 reads the unquantised weights.
            num_logits: Results are computed for this many of the last tokens, n = 1..T.

        Returns:
            logits `[n, vocab]`, then residual_update `[n, U]` and crest `[n, U]` of each unit's layer, 0 for the head.
            New float32 tensors. Row i is, bit for bit, what a call with this token alone returns.

        Raises:
            ValueError: If an argument is outside its domain: a token beyond the vocabulary, a full cache, a width that
                some linear does not hold.
        """
        if cache.blocks.shape != self._cache_shape:
            raise ValueError(f"the cache is {list(cache.blocks.shape)}; pass one of this decoder: new_cache() makes it")
        token_ids, bit_widths = token_ids.contiguous(), bit_widths.contiguous()
        for name, tensor, size in (
            ("token_ids", token_ids, len(token_ids)),
            ("bit_widths", bit_widths, self.weights.num_units),
        ):
            if tensor.dtype != torch.int64 or tensor.device.type != "cpu" or tuple(tensor.shape) != (size,):
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; pass int64 [{size}] on the CPU"
                )
        with self._lock:  # the call itself runs without the interpreter's lock
            output = self._new_output() if num_logits == 1 else self._new_outputs(1, max(num_logits, 0))[0]
            status = self._decode(
                self._address,
                cache.blocks.data_ptr(),
                token_ids.data_ptr(),
                len(token_ids),
                position,
                bit_widths.data_ptr(),
                *self._options,
                self._workspace_address,
                output.logits_address,
                num_logits,
                output.residual_update_address,
                output.crest_address,
            )
        if status == BAD_ARGUMENT:
            raise ValueError(
                f"{len(token_ids)} tokens at position {position}, {num_logits} logits, widths {bit_widths.tolist()}: "
                f"at most {MAX_TOKENS} tokens below {self.vocab_size}, {self.max_length} positions, stored widths only"
            )
        if status != OK:
            raise RuntimeError(f"native decoder failed: {STATUS_TEXTS.get(status, status)}")
        return output.logits, output.residual_update, output.crest

    def _new_output(self) -> _Output:
        """Tensors that nobody has seen, for a call with one row of results."""
        # After a step has swept the caches every tensor operation takes tens of microseconds, so some are made ahead.
        if not self._outputs:
            self._outputs = self._new_outputs(max(1, _OUTPUT_BYTES // (4 * self.vocab_size)), 1)
        return self._outputs.pop()

    def _new_outputs(self, count: int, num_logits: int) -> list[_Output]:
        logits = torch.empty(count, num_logits, self.vocab_size, dtype=torch.float32)
        statistics = torch.empty(count, 2, num_logits, self.weights.num_units, dtype=torch.float32)
        parts = zip(logits, *statistics.unbind(1), strict=True)
        return [_Output(*tensors, *(tensor.data_ptr() for tensor in tensors)) for tensors in parts]

    def _describe(self) -> DecoderStruct:
        weights = self.weights
        hidden = self.hidden_size
        group_sizes = {
            linear.nested.group_size
            for layer in weights.layers
            for linear in (getattr(layer, name) for name in _LINEARS)
            if linear.nested is not None
        }
        if weights.head.nested is not None:
            group_sizes.add(weights.head.nested.group_size)
        if len(group_sizes) > 1:
            raise ValueError(f"linears have group sizes {sorted(group_sizes)}; quantise all with the same one")
        if weights.head_dim % 2 or weights.num_heads % weights.num_key_value_heads:
            raise ValueError(
                f"head_dim={weights.head_dim} must be even and num_heads={weights.num_heads} a multiple of "
                f"num_key_value_heads={weights.num_key_value_heads}"
            )
        layers = (LayerStruct * len(weights.layers))(*(self._layer(layer) for layer in weights.layers))
        self._kept.append(layers)
        half = weights.head_dim // 2
        return DecoderStruct(
            layers=ctypes.addressof(layers),
            embedding=self._address_of("embedding", weights.embedding, (self.vocab_size, hidden)),
            final_norm=self._address_of("final_norm", weights.final_norm, (hidden,)),
            cosine=self._address_of("cosine", weights.cosine, (self.max_length, half)),
            sine=self._address_of("sine", weights.sine, (self.max_length, half)),
            head=self._linear("head", weights.head, (self.vocab_size, hidden)),
            num_layers=len(weights.layers),
            vocab_size=self.vocab_size,
            hidden_size=hidden,
            num_heads=weights.num_heads,
            num_key_value_heads=weights.num_key_value_heads,
            head_dim=weights.head_dim,
            max_length=self.max_length,
            cache_length=self._cache_length,
            num_units=weights.num_units,
            head_unit=weights.head_unit,
            group_size=group_sizes.pop() if group_sizes else 128,
            norm_epsilon=weights.norm_epsilon,
            attention_scale=weights.attention_scale,
        )

    def _layer(self, layer: LayerWeights) -> LayerStruct:
        weights, hidden = self.weights, self.hidden_size
        attention = weights.num_heads * weights.head_dim
        cached = weights.num_key_value_heads * weights.head_dim
        inner = layer.gate.shape[0]
        shapes = {
            "query": (attention, hidden),
            "key": (cached, hidden),
            "value": (cached, hidden),
            "output": (hidden, attention),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        sizes = {name: (hidden if name in ("attention_norm", "mlp_norm") else weights.head_dim,) for name in _NORMS}
        return LayerStruct(
            **{name: self._linear(name, getattr(layer, name), shape) for name, shape in shapes.items()},
            **{name: self._address_of(name, getattr(layer, name), size) for name, size in sizes.items()},
            attention_unit=layer.attention_unit,
            mlp_unit=layer.mlp_unit,
        )

    def _linear(self, name: str, linear: LinearWeights, shape: tuple[int, int]) -> LinearStruct:
        if (linear.nested is None and linear.dense is None) or linear.shape != shape:
            raise ValueError(f"{name} holds {linear} but must be [{shape[0]}, {shape[1]}]")
        widths = None
        if linear.nested is not None:
            check_weight(linear.nested)
            stored = linear.nested.bit_widths
            structs = (WeightStruct * (NUM_PLANES + 1))(
                *(weight_struct(linear.nested, b) if b in stored else WeightStruct() for b in range(NUM_PLANES + 1))
            )
            self._kept.append((structs, linear.nested))
            widths = ctypes.addressof(structs)
        dense = None if linear.dense is None else linear.dense.t()
        return LinearStruct(
            widths=widths,
            dense=self._address_of(f"{name}.dense.t()", dense, (shape[1], shape[0])),
            bias=self._address_of(f"{name}.bias", linear.bias, (shape[0],)),
            num_outputs=shape[0],
            num_inputs=shape[1],
        )

    def _address_of(self, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> int | None:
        """Address of a contiguous float32 CPU tensor of the given shape; keeps it alive."""
        if tensor is None:
            return None
        is_plain = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not is_plain or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}; pass "
                f"contiguous float32 {list(shape)} on the CPU"
            )
        self._kept.append(tensor)
        return tensor.data_ptr()


def _declared(library: ctypes.CDLL) -> Any:
    """`fq_decode` with its argument types, so that addresses are passed as 64-bit integers."""
    int64, int32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    library.fq_decoder_workspace_bytes.argtypes = (pointer, int32)
    library.fq_decoder_workspace_bytes.restype = int64
    decode = library.fq_decode
    decode.argtypes = (
        *(pointer, pointer, pointer, int64, int64, pointer, int32, int32, int32),
        *(pointer, pointer, int64, pointer, pointer),
    )
    return decode
