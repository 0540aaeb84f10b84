"""The loop over tokens on the GPU: policy, model, signals, sampling and bookkeeping in one captured graph per token.

Nothing here waits for the device. A step's launches depend on the host only through the bucket, a static cache of a
certain size, whose graph is replayed; everything else (token, position, widths, signals) is read from device memory.
Without capture the same steps run one launch at a time: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.graph_capture import Capture
from flexquant_rl.engine.decoding.graph_pass import TokenPass
from flexquant_rl.engine.decoding.graph_weights import StepWeights
from flexquant_rl.engine.decoding.graph_widths import WidthSource
from flexquant_rl.kernels.activations import ActivationMode
from flexquant_rl.kernels.attention import AttentionParts
from flexquant_rl.kernels.next_token import TokenBook, choose_token
from flexquant_rl.kernels.token_signals import SignalState, update_signals

FIRST_BUCKET = 256


def bucket_sizes(max_length: int, first: int = FIRST_BUCKET) -> tuple[int, ...]:
    """Sizes of the caches that a sequence moves through: `first` doubled again and again, the last `max_length`."""
    sizes = []
    size = first
    while size < max_length:
        sizes.append(size)
        size *= 2
    return (*sizes, max_length)


def buckets_between(sizes: Sequence[int], first: int, last: int) -> list[int]:
    """The buckets that a sequence of `first` tokens passes through until it has `last`."""
    return [size for below, size in pairwise((0, *sizes)) if first <= size and below < last]


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
        self._pass = self._new_pass(weights, mode, cache_dtype)
        self._cache_dtype = cache_dtype
        self._sizes = bucket_sizes(weights.max_length, first_bucket)
        self._buckets: dict[int, Bucket] = {}
        self._bucket: Bucket | None = None
        self._capture: Capture | None = None
        vocab_size = len(weights.embedding)
        capacity = weights.max_length + 1
        self.book = TokenBook.allocate(vocab_size, weights.num_units, capacity, device=weights.device)
        self.signals = None if source.constants is None else SignalState.allocate(source.constants)

    @property
    def logits(self) -> Tensor:
        """`[1, V]` float32, of the last step; overwritten by the next."""
        return self._pass.logits

    @property
    def statistics(self) -> Tensor:
        """`[2, L + 1]` float32, residual updates and crests of the last step; unset where nobody looks at signals."""
        return self._pass.statistics[0]

    @property
    def bit_widths(self) -> Tensor:
        """`[U]` int32, of the last step."""
        return self._pass.bit_widths

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
        for size in buckets_between(self._sizes, first, last):
            if size not in self._buckets:
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
        step, book = self._pass, self.book
        pairs = list(keys_and_values)
        self.held = pairs[0][0].shape[2]
        self._bucket = self._bucket_for(self.held)
        for layer, pair in enumerate(pairs):
            for which, tensor in enumerate(pair):
                self._bucket.cache[which, layer, :, :, : self.held] = tensor
        step.logits.copy_(logits)
        step.statistics.zero_()
        step.statistics[0, :, :-1] = statistics
        step.bit_widths.fill_(largest_width)
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
            self._capture = self._capture or Capture(weights.device)
            for counter in (self.book.token, self.book.position, self.book.count):
                counter.zero_()  # what an earlier sequence left may be beyond this bucket
            bucket.graph = self._capture(lambda: self._step(bucket), also=lambda: self._observe(is_first=True))
        return bucket

    def _new_pass(self, weights: StepWeights, mode: ActivationMode, cache_dtype: torch.dtype) -> TokenPass:
        """The model over one token; a benchmark puts another one in its place."""
        return TokenPass(weights, 1, mode=mode, cache_dtype=cache_dtype)

    def _step(self, bucket: Bucket) -> None:
        """One token: widths, model, signals, next token. Launches only."""
        self.source.choose(self._pass.bit_widths, self.signals, self.book.count)
        self._pass(self.book.token, self.book.position, bucket.cache, bucket.parts)
        self._observe(is_first=False)

    def _observe(self, *, is_first: bool) -> None:
        """Chooses the next token and, where a policy looks at them, brings the signals up to date."""
        step, book = self._pass, self.book
        token = choose_token(step.logits[0], step.bit_widths, book, is_first=is_first)
        if self.signals is None or self.source.constants is None:
            return
        if not is_first:
            step.measure()
        update_signals(
            self.source.constants,
            self.signals,
            step.logits[0],
            step.statistics[0],
            step.bit_widths,
            token,
            book.count,
            is_first=is_first,
        )
