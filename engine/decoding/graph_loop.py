"""The loop over tokens on the GPU: policy, model, signals, sampling and bookkeeping in one captured graph per token.

Nothing here waits for the device. A step's launches depend on the host only through the bucket, a static cache of a
certain size, whose graph is replayed; everything else (token, position, widths, signals) is read from device memory.
Without capture the same steps run one launch at a time: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flexquant_rl.engine.decoding.graph_weights import StepLayer, StepLinear, StepWeights
from flexquant_rl.engine.decoding.graph_widths import WidthSource
from flexquant_rl.kernels.activations import ActivationMode, PackedActivations
from flexquant_rl.kernels.attention import AttentionParts, attend
from flexquant_rl.kernels.gemv import gemv
from flexquant_rl.kernels.layer_statistics import layer_statistics
from flexquant_rl.kernels.next_token import TokenBook, choose_token
from flexquant_rl.kernels.rms_norm import rms_norm
from flexquant_rl.kernels.rotary import rotary
from flexquant_rl.kernels.swiglu import swiglu
from flexquant_rl.kernels.token_signals import SignalState, update_signals

FIRST_BUCKET = 256
_WARM_UP_STEPS = 2


def bucket_sizes(max_length: int, first: int = FIRST_BUCKET) -> tuple[int, ...]:
    """Sizes of the caches that a sequence moves through: `first` doubled again and again, the last `max_length`."""
    sizes = []
    size = first
    while size < max_length:
        sizes.append(size)
        size *= 2
    return (*sizes, max_length)


@dataclass
class Bucket:
    """A static cache and what is bound to it.

    Attributes:
        cache: `[2, L, 1, J, size, D]`: keys and values of each layer.
        parts: Buffers of attention.
        graph: The captured step, or None.
    """

    cache: Tensor
    parts: AttentionParts
    graph: torch.cuda.CUDAGraph | None = None

    @property
    def size(self) -> int:
        """Tokens that it holds."""
        return self.cache.shape[4]


class _Buffers:
    """Every tensor that a step writes, made once."""

    def __init__(self, weights: StepWeights, mode: ActivationMode, cache_dtype: torch.dtype) -> None:
        device = weights.device
        vocab_size, num_inputs = weights.embedding.shape
        num_queries = weights.num_heads * weights.head_dim
        ffn = {_num_inputs(layer.down) for layer in weights.layers}
        (num_hidden,) = ffn  # one size for all layers, as in every model of the family

        def floats(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        def packed(size: int) -> PackedActivations:
            return PackedActivations.allocate(1, size, device=device, mode=mode)

        self.residual = floats(len(weights.layers) + 1, num_inputs)  # the input of each layer, and the last output
        self.middle = floats(1, num_inputs)
        self.normed = packed(num_inputs)
        self.qkv = floats(1, num_queries + 2 * weights.num_key_heads * weights.head_dim)
        self.queries = torch.empty(1, weights.num_heads, weights.head_dim, dtype=cache_dtype, device=device)
        self.mixed = packed(num_queries)
        self.gate_up = floats(1, 2 * num_hidden)
        self.gated = packed(num_hidden)
        self.logits = floats(1, vocab_size)
        self.statistics = floats(2, len(weights.layers) + 1)
        self.bit_widths = torch.zeros(weights.num_units, dtype=torch.int32, device=device)
        self.width_of = [self.bit_widths[unit : unit + 1] for unit in range(weights.num_units)]


def _num_inputs(linear: StepLinear) -> int:
    assert linear.weight is not None
    return linear.weight.num_inputs


class DecodeLoop:
    """Decodes one sequence step by step, and never waits for the device.

    Attributes:
        weights: The model.
        source: Where widths come from.
        book: Token, position, logs.
        signals: What the policy sees; None where nobody looks.
        held: Tokens in the cache, as the host counts them.
        captures: Whether steps are captured and replayed, rather than launched one by one.

    Args:
        weights: The model, on the device.
        source: Where widths come from, on the same device.
        mode: How activations of nested products are held: "int8", or "float" as a reference.
        cache_dtype: Type of keys and values.
        first_bucket: Size of the smallest cache.
        captures: Default: where the device is a CUDA device.
    """

    def __init__(
        self,
        weights: StepWeights,
        source: WidthSource,
        *,
        mode: ActivationMode = "int8",
        cache_dtype: torch.dtype = torch.float16,
        first_bucket: int = FIRST_BUCKET,
        captures: bool | None = None,
    ) -> None:
        self.weights = weights
        self.source = source
        self.captures = weights.device.type == "cuda" if captures is None else captures
        self.held = 0
        self._buffers = _Buffers(weights, mode, cache_dtype)
        self._cache_dtype = cache_dtype
        self._sizes = bucket_sizes(weights.max_length, first_bucket)
        self._buckets: dict[int, Bucket] = {}
        self._bucket: Bucket | None = None
        self._stream: torch.cuda.Stream | None = None  # where steps are compiled and captured
        self._pool: Any = None
        vocab_size = len(weights.embedding)
        capacity = weights.max_length + 1
        self.book = TokenBook.allocate(vocab_size, weights.num_units, capacity, device=weights.device)
        self.signals = None if source.constants is None else SignalState.allocate(source.constants)

    @property
    def logits(self) -> Tensor:
        """`[1, V]` float32, of the last step; overwritten by the next."""
        return self._buffers.logits

    @property
    def statistics(self) -> Tensor:
        """`[2, L + 1]` float32, residual updates and crests of the last step; unset where nobody looks at signals."""
        return self._buffers.statistics

    @property
    def bit_widths(self) -> Tensor:
        """`[U]` int32, of the last step."""
        return self._buffers.bit_widths

    @property
    def bucket(self) -> Bucket:
        """The cache in use."""
        assert self._bucket is not None, "begin() chooses the first bucket"
        return self._bucket

    def prepare(self, first: int, last: int) -> None:
        """Makes every bucket that a sequence passes through, and captures its graph.

        Compiles kernels where that has not happened yet, so it may take a while. Must come before `begin`: the steps
        that warm up leave traces in the state.

        Args:
            first: Tokens of the prompt.
            last: Tokens of the whole sequence at most, within the weights' `max_length`.
        """
        for below, size in pairwise((0, *self._sizes)):
            if size not in self._buckets and first <= size and below < last:
                self._buckets[size] = self._new_bucket(size)

    def begin(
        self,
        keys_and_values: Iterable[tuple[Tensor, Tensor]],
        logits: Tensor,
        statistics: Tensor,
        *,
        largest_width: int,
        kl_weight: float = 1.0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Starts after a prompt of T tokens and chooses the first token.

        Args:
            keys_and_values: For each layer `[1, J, T, D]` each.
            logits: `[1, V]` float32, of the prompt's last token.
            statistics: `[2, L]` float32: residual updates and crests of the layers at that token.
            largest_width: Width that the prompt was read at.
            kl_weight: The dial.
            temperature: 0 is greedy.
            seed: Seed of the sampling.
        """
        buffers, book = self._buffers, self.book
        pairs = list(keys_and_values)
        self.held = pairs[0][0].shape[2]
        self._bucket = self._bucket_for(self.held)
        for layer, pair in enumerate(pairs):
            for which, tensor in enumerate(pair):
                self._bucket.cache[which, layer, :, :, : self.held] = tensor
        buffers.logits.copy_(logits)
        buffers.statistics.zero_()
        buffers.statistics[:, :-1] = statistics
        buffers.bit_widths.fill_(largest_width)
        book.position.fill_(self.held)
        book.count.zero_()
        book.temperature.fill_(temperature)
        book.seed.fill_(seed)
        if self.signals is not None:
            self.signals.recent_widths.fill_(largest_width)
            self.signals.dial.copy_(torch.tensor([kl_weight], dtype=torch.float32).log10())
        self._observe(is_first=True)

    def advance(self, num_steps: int) -> None:
        """Makes steps: replays, or launches. Moves to the next bucket where one is full.

        Raises:
            ValueError: If the cache of the longest sequence is full.
        """
        for _ in range(num_steps):
            if self.held == self.bucket.size:
                self._move()
            if self.bucket.graph is None:
                self._step(self.bucket)
            else:
                self.bucket.graph.replay()
            self.held += 1

    def _bucket_for(self, num_tokens: int) -> Bucket:
        for size in self._sizes:
            if size >= num_tokens and size in self._buckets:
                return self._buckets[size]
        raise ValueError(f"no bucket holds {num_tokens} tokens; call prepare() for the whole sequence first")

    def _move(self) -> None:
        old = self.bucket
        new = self._bucket_for(self.held + 1)
        new.cache[:, :, :, :, : old.size].copy_(old.cache)
        self._bucket = new

    def _new_bucket(self, size: int) -> Bucket:
        weights = self.weights
        shape = (2, len(weights.layers), 1, weights.num_key_heads, size, weights.head_dim)
        cache = torch.zeros(shape, dtype=self._cache_dtype, device=weights.device)
        parts = AttentionParts.allocate(1, weights.num_heads, weights.head_dim, size, device=weights.device)
        bucket = Bucket(cache, parts)
        if self.captures:
            bucket.graph = self._capture(bucket)
        return bucket

    def _capture(self, bucket: Bucket) -> torch.cuda.CUDAGraph:
        """Compiles on a side stream, then captures one step there; all graphs share the stream and a memory pool.

        cuBLAS keeps a workspace for every stream: on another one it would be allocated from the pool, while capturing.
        """
        device = self.weights.device
        for counter in (self.book.token, self.book.position, self.book.count):
            counter.zero_()  # what an earlier sequence left may be beyond this bucket
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_STEPS):
                self._step(bucket)
            self._observe(is_first=True)  # what begin() launches is compiled now too
        torch.cuda.current_stream(device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._step(bucket)
        return graph

    def _step(self, bucket: Bucket) -> None:
        """One token: widths, model, signals, next token. Launches only."""
        buffers, weights = self._buffers, self.weights
        self.source.choose(buffers.bit_widths, self.signals, self.book.count)
        torch.index_select(weights.embedding, 0, self.book.token, out=buffers.residual[:1])
        for index, (layer, (before, after)) in enumerate(
            zip(weights.layers, pairwise(buffers.residual.split(1)), strict=True)
        ):
            self._attention(layer, before, bucket.cache[0, index], bucket.cache[1, index], bucket.parts)
            self._mlp(layer, after)
        self._head(buffers.residual[-1:])
        self._observe(is_first=False)

    def _attention(self, layer: StepLayer, before: Tensor, keys: Tensor, values: Tensor, parts: AttentionParts) -> None:
        buffers, weights = self._buffers, self.weights
        width = buffers.width_of[layer.attention_unit]
        rms_norm(before, layer.attention_norm, eps=weights.norm_epsilon, out=buffers.normed)
        _multiply(layer.qkv, buffers.normed, width, out=buffers.qkv)
        rotary(
            buffers.qkv,
            weights.cosine,
            weights.sine,
            self.book.position,
            keys,
            values,
            q_norm=layer.query_norm,
            k_norm=layer.key_norm,
            eps=weights.norm_epsilon,
            out=buffers.queries,
        )
        attend(
            buffers.queries,
            keys,
            values,
            self.book.position,
            scale=weights.attention_scale,
            parts=parts,
            out=buffers.mixed,
        )
        _multiply(layer.output, buffers.mixed, width, residual=before, out=buffers.middle)

    def _mlp(self, layer: StepLayer, after: Tensor) -> None:
        buffers = self._buffers
        width = buffers.width_of[layer.mlp_unit]
        rms_norm(buffers.middle, layer.mlp_norm, eps=self.weights.norm_epsilon, out=buffers.normed)
        _multiply(layer.gate_up, buffers.normed, width, out=buffers.gate_up)
        swiglu(buffers.gate_up, out=buffers.gated)
        _multiply(layer.down, buffers.gated, width, residual=buffers.middle, out=after)

    def _head(self, hidden: Tensor) -> None:
        buffers, weights = self._buffers, self.weights
        if weights.head.dense is None:
            rms_norm(hidden, weights.final_norm, eps=weights.norm_epsilon, out=buffers.normed)
            _multiply(weights.head, buffers.normed, buffers.width_of[weights.head_unit], out=buffers.logits)
            return
        # An unquantised head: torch's product, whose temporaries are in the graph's own pool.
        normed = functional.rms_norm(hidden, hidden.shape[-1:], weights.final_norm, weights.norm_epsilon)
        torch.mm(normed, weights.head.dense.t(), out=buffers.logits)
        if weights.head.bias is not None:
            buffers.logits.add_(weights.head.bias)

    def _observe(self, *, is_first: bool) -> None:
        """Chooses the next token and, where a policy looks at them, brings the signals up to date."""
        buffers, book = self._buffers, self.book
        token = choose_token(buffers.logits[0], buffers.bit_widths, book, is_first=is_first)
        if self.signals is None or self.source.constants is None:
            return
        if not is_first:
            layer_statistics(buffers.residual, out=buffers.statistics)
        update_signals(
            self.source.constants,
            self.signals,
            buffers.logits[0],
            buffers.statistics,
            buffers.bit_widths,
            token,
            book.count,
            is_first=is_first,
        )


def _multiply(
    linear: StepLinear, x: PackedActivations, width: Tensor, *, residual: Tensor | None = None, out: Tensor
) -> None:
    assert linear.weight is not None, "only the head may be unquantised"
    gemv(x, linear.weight, width, bias=linear.bias, residual=residual, out=out)
