"""A static key-value cache whose rows have lengths of their own, behind Hugging Face's cache interface.

Sequences of a batch may be at different positions and be restarted one by one, which Hugging Face's own caches do not
offer. The attention mask for a call is made here too, since only the cache knows which entries are valid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Call:
    """Where the tokens of the forward pass under way go."""

    def __init__(self, rows: Tensor | None, positions: Tensor) -> None:
        self.rows = rows
        self.positions = positions
        self.end = int(positions.max()) + 1
        start = int(positions[0, 0])
        # All rows at the same position: a plain slice instead of scattered writes.
        self.start = start if rows is None and bool((positions[:, 0] == start).all()) else None


class RowCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, `[num_rows, heads, max_length, head_dim]`, allocated at the first write."""

    def __init__(self, owner: RowCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates for the heads and dtype that the model turns out to use."""
        shape = (self._owner.num_rows, key_states.shape[1], self._owner.max_length)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes `[R', heads, T, head_dim]` at the call's rows and positions; returns all that those rows may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        call = self._owner.call
        assert call is not None and self.keys is not None and self.values is not None
        for storage, new in ((self.keys, key_states), (self.values, value_states)):
            if call.start is not None:
                storage[:, :, call.start : call.end] = new
            else:
                rows = torch.arange(len(new), device=new.device) if call.rows is None else call.rows
                storage[rows[:, None], :, call.positions] = new.transpose(1, 2)
        if call.rows is None:
            return self.keys[:, :, : call.end], self.values[:, :, : call.end]
        return self.keys[call.rows, :, : call.end], self.values[call.rows, :, : call.end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset; unused with a ready mask, correct all the same."""
        assert self._owner.call is not None
        return self._owner.call.end, 0

    def get_seq_length(self) -> int:
        """The longest row."""
        return int(self._owner.lengths.max())

    def get_max_length(self) -> int:
        """Capacity in tokens."""
        return self._owner.max_length

    def get_max_cache_shape(self) -> int:
        """Capacity in tokens, under the name that older transformers 5 releases ask for."""
        return self._owner.max_length


class RowCache(Cache):
    """The cache of a `DecodeSession`.

    Args:
        num_layers: Decoder layers.
        num_rows: Sequences.
        max_length: Tokens a row can hold.
        device: Where the model runs.
    """

    def __init__(self, num_layers: int, num_rows: int, max_length: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self.max_length = max_length
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.call: _Call | None = None
        super().__init__(layers=[RowCacheLayer(self) for _ in range(num_layers)])

    def begin(self, num_tokens: int, rows: Tensor | None, *, restart: bool) -> tuple[Tensor, Tensor]:
        """Opens a call that appends `num_tokens` to each of `rows` (None: all).

        Returns:
            Positions `[R', T]` int64 and an additive float32 mask `[R', 1, T, end]`.
        """
        lengths = self.lengths if rows is None else self.lengths[rows]
        start = torch.zeros_like(lengths) if restart else lengths
        positions = start[:, None] + torch.arange(num_tokens, device=start.device)
        self.call = _Call(rows, positions)
        if restart:
            # Layer after layer overwrites the old entries: until `commit` and after an aborted call the rows are empty.
            self.lengths[slice(None) if rows is None else rows] = 0
        visible = torch.arange(self.call.end, device=start.device) <= positions[:, None, :, None]
        mask = torch.zeros(visible.shape, dtype=torch.float32, device=start.device)
        mask.masked_fill_(~visible, torch.finfo(torch.float32).min)
        return positions, mask

    def commit(self) -> None:
        """Closes the call: its tokens now count. Without it, an aborted call leaves the lengths as they were."""
        assert self.call is not None
        new_lengths = self.call.positions[:, -1] + 1
        if self.call.rows is None:
            self.lengths.copy_(new_lengths)
        else:
            self.lengths[self.call.rows] = new_lengths
        self.call = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values of all rows, 0 before the first write."""
        layers = [layer for layer in self.layers if isinstance(layer, RowCacheLayer)]
        held = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes for tensor in held)

    def copy(self, *, num_rows: int | None = None) -> RowCache:
        """An independent copy; `num_rows` repeats the row of a cache that has one."""
        num_rows = num_rows or self.num_rows
        twin = RowCache(len(self.layers), num_rows, self.max_length, self.lengths.device)
        twin.lengths.copy_(self.lengths)
        for mine, theirs in zip(self.layers, twin.layers, strict=True):
            assert isinstance(mine, RowCacheLayer) and isinstance(theirs, RowCacheLayer)
            if mine.keys is not None and mine.values is not None:
                theirs.keys, theirs.values = (
                    held.expand(num_rows, -1, -1, -1).clone() for held in (mine.keys, mine.values)
                )
                theirs.is_initialized = True
        return twin
