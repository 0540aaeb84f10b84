"""Passes over a fixed number of tokens on the GPU, each size captured when it is first asked for.

A pass takes up to 16 tokens of one row; fewer than its size are filled up with padding, which is at no place: it writes
no key and no value, and nobody looks at its logits. Where the tokens go is computed on the device, from the row's
length there, which the pass then moves on. So a replay depends on the host for tokens, row and widths alone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.graph_capture import Capture
from flexquant_rl.engine.decoding.graph_loop import FIRST_BUCKET, bucket_sizes
from flexquant_rl.engine.decoding.graph_pass import TokenPass
from flexquant_rl.engine.decoding.graph_weights import StepWeights
from flexquant_rl.kernels.activations import ActivationMode
from flexquant_rl.kernels.attention import AttentionParts

PASS_SIZES = (1, 2, 4, 8, 16)
"""Tokens of a pass: a step, and verify steps of a round, which holds 15 drafts at most."""

_LARGEST_FLOAT_PASS = 8
"""In mode "float" the compiler takes minutes for a product of more tokens: it is a reference, not the fast path."""

_MOST_FREE = 2
"""Caches that are kept for later with their graphs: of one row, and of as many as are scored together."""

PADDING_TOKEN = 0
"""What fills up a pass; any token of the vocabulary would do."""


@dataclass(eq=False)
class _Bucket:
    """A static cache `[2, L, R, J, size, D]` of all rows, and what is bound to it, by tokens of a pass."""

    cache: Tensor
    parts: dict[int, AttentionParts] = field(default_factory=dict)
    graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)


@dataclass(eq=False)
class GraphRows:
    """Keys and values of R rows. A row is in one bucket at a time, the smallest that holds its next token.

    So the bits of a token depend on its place alone: how attention splits a cache among programs depends on its size.

    Attributes:
        lengths: `[R]` int64 on the device, tokens held.
        buckets: By size.
    """

    lengths: Tensor
    buckets: dict[int, _Bucket] = field(default_factory=dict)


class _SizedPass:
    """A pass of M tokens and what it is told: tokens, their row, how many are none of the padding, widths."""

    def __init__(self, model: TokenPass) -> None:
        count, device, num_units = model.num_tokens, model.weights.device, model.weights.num_units
        self.model = model
        # One tensor: one copy a pass.
        self.inputs = torch.zeros(2 * count + 1 + num_units, dtype=torch.int64, device=device)
        self.token_ids, self.rows, self.count, self.bit_widths = self.inputs.split([count, count, 1, num_units])
        self.positions = torch.zeros(count, dtype=torch.int64, device=device)
        self._offsets = torch.arange(count, device=device)
        self._is_padding = torch.zeros(count, dtype=torch.bool, device=device)

    def tell(self, row: int, token_ids: list[int], bit_widths: Tensor) -> None:
        """Puts on the device what the next launch reads; never waits for it."""
        size = self.model.num_tokens
        padding = [PADDING_TOKEN] * (size - len(token_ids))
        told = [*token_ids, *padding, *[row] * size, len(token_ids), *bit_widths.tolist()]
        self.inputs.copy_(on_host(told, self.inputs.device), non_blocking=True)

    def launch(self, rows: GraphRows, bucket: _Bucket) -> None:
        """Reads the tokens and moves their row on. Launches only."""
        self.model.bit_widths.copy_(self.bit_widths)
        torch.index_select(rows.lengths, 0, self.rows, out=self.positions)
        self.positions.add_(self._offsets)
        torch.ge(self._offsets, self.count, out=self._is_padding)
        self.positions.masked_fill_(self._is_padding, -1)
        size = self.model.num_tokens
        self.model(self.token_ids, self.positions, bucket.cache, bucket.parts[size], rows=self.rows)
        self.model.measure()
        rows.lengths.index_add_(0, self.rows[:1], self.count)


def on_host(numbers: list[int], device: torch.device) -> Tensor:
    """`[n]` int64 on the host, where `device` can fetch it without the host waiting."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")


class GraphPasses:
    """Runs passes over rows, one at a time: a call of another thread waits.

    Attributes:
        weights: The model.
        sizes: Sizes of the buckets.
        pass_sizes: Tokens of a pass, ascending: `PASS_SIZES`, in mode "float" up to 8.

    Args:
        weights: The model, on the device.
        mode: How activations of nested products are held: "int8", or "float" as a reference.
        cache_dtype: Type of keys and values.
        first_bucket: Size of the smallest cache.
        captures: Whether passes are captured and replayed, rather than launched; default: on a CUDA device.
    """

    def __init__(
        self,
        weights: StepWeights,
        *,
        mode: ActivationMode = "int8",
        cache_dtype: torch.dtype = torch.float16,
        first_bucket: int = FIRST_BUCKET,
        captures: bool | None = None,
    ) -> None:
        self.weights = weights
        self.sizes = bucket_sizes(weights.max_length, first_bucket)
        self.pass_sizes = tuple(size for size in PASS_SIZES if mode == "int8" or size <= _LARGEST_FLOAT_PASS)
        self._mode = mode
        self._cache_dtype = cache_dtype
        captures = weights.device.type == "cuda" if captures is None else captures
        self._capture = Capture(weights.device) if captures else None
        self._passes: dict[int, _SizedPass] = {}
        self._free: list[GraphRows] = []
        self._lock = threading.Lock()

    def take(self, num_rows: int) -> GraphRows:
        """Empty rows: some that were given back, with their graphs, or new ones."""
        with self._lock:
            for index, rows in enumerate(self._free):
                if len(rows.lengths) == num_rows:
                    rows.lengths.zero_()
                    return self._free.pop(index)
        return GraphRows(torch.zeros(num_rows, dtype=torch.int64, device=self.weights.device))

    def give_back(self, rows: GraphRows) -> None:
        """Keeps rows for the next one that takes as many; of those that are kept the oldest go."""
        with self._lock:
            self._free = [*self._free, rows][-_MOST_FREE:]

    def bucket_size(self, num_tokens: int) -> int:
        """Size of the smallest bucket that holds so many tokens."""
        return next(size for size in self.sizes if size >= num_tokens)

    def bucket(self, rows: GraphRows, size: int) -> Tensor:
        """The cache `[2, L, R, J, size, D]` of a bucket, which is made if need be."""
        if size not in rows.buckets:
            weights = self.weights
            shape = (2, len(weights.layers), len(rows.lengths), weights.num_key_heads, size, weights.head_dim)
            rows.buckets[size] = _Bucket(torch.zeros(shape, dtype=self._cache_dtype, device=weights.device))
        return rows.buckets[size].cache

    def read(
        self, rows: GraphRows, row: int, size: int, token_ids: list[int], bit_widths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Appends tokens to a row.

        Args:
            rows: Of this object.
            row: Index of the row.
            size: The bucket that holds the row and has room for the tokens.
            token_ids: 1 token to as many as the largest pass has.
            bit_widths: `[U]` integers on the CPU, stored widths.

        Returns:
            Logits `[n, V]` and statistics `[n, 2, L + 1]` of the n tokens, float32 on the device.
        """
        count = len(token_ids)
        num_tokens = next(taken for taken in self.pass_sizes if taken >= count)
        with self._lock:
            step, bucket = self._prepared(rows, size, num_tokens)
            step.tell(row, token_ids, bit_widths)
            graph = bucket.graphs.get(num_tokens)
            if graph is None:
                step.launch(rows, bucket)
            else:
                graph.replay()
            return step.model.logits[:count].clone(), step.model.statistics[:count].clone()

    def prepare(self, rows: GraphRows, size: int, num_tokens: int) -> None:
        """Compiles and captures a pass of one of the sizes over a bucket, where that has not happened yet."""
        with self._lock:
            self._prepared(rows, size, num_tokens)

    def _prepared(self, rows: GraphRows, size: int, num_tokens: int) -> tuple[_SizedPass, _Bucket]:
        """A pass and the bucket that it runs over, with its buffers and its graph."""
        weights = self.weights
        self.bucket(rows, size)
        bucket = rows.buckets[size]
        if num_tokens not in self._passes:
            model = TokenPass(weights, num_tokens, mode=self._mode, cache_dtype=self._cache_dtype)
            self._passes[num_tokens] = _SizedPass(model)
        step = self._passes[num_tokens]
        if num_tokens not in bucket.parts:
            bucket.parts[num_tokens] = AttentionParts.allocate(
                num_tokens, weights.num_heads, weights.head_dim, size, device=weights.device
            )
        if self._capture is not None and num_tokens not in bucket.graphs:
            step.inputs.zero_()  # padding alone: compiling changes no row
            bucket.graphs[num_tokens] = self._capture(lambda: step.launch(rows, bucket))
        return step, bucket
