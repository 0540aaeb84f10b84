"""The reference decoder: rows of tokens through Hugging Face's modules, for any architecture that can be nested."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.decoder import (
    ExtendOutput,
    StepOutput,
    check_bit_widths,
    check_max_length,
    check_tokens,
    check_truncation,
    check_width_shape,
)
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import REFERENCE_WIDTH
from flexquant_rl.engine.model import NestedCausalLM

if TYPE_CHECKING:
    from flexquant_rl.engine.decoding.kv_cache import RowCache

_SCORE_TOKENS_PER_PASS = 8192
"""Tokens per parallel pass: bounds the logits' memory (8,192 x 4,096 x 4 bytes = 128 MiB on the embedded model)."""


class DecodeSession:
    """Decodes `num_rows` sequences with one model.

    Args:
        model: Nested weights.
        num_rows: R, sequences in the batch.
        max_length: Tokens a row can hold; default: the model's context.

    Raises:
        InputError: If `max_length` exceeds the context.
    """

    def __init__(self, model: NestedCausalLM, *, num_rows: int = 1, max_length: int | None = None) -> None:
        # Here, not above: it is a cache of transformers, and the lean decoder needs none of it.
        from flexquant_rl.engine.decoding.kv_cache import RowCache

        max_length = check_max_length(max_length, model)
        self._model = model
        self._num_rows = num_rows
        self._max_length = max_length
        device = model.hf_model.device  # the modules are made now, where they must be, and not in the first call
        self._cache: RowCache | None = RowCache(model.num_layers, num_rows, max_length, device)

    @property
    def model(self) -> NestedCausalLM:
        """The model behind the session."""
        return self._model

    @property
    def lengths(self) -> Tensor:
        """`[R]` int64 tokens held per row."""
        return self._open_cache().lengths

    @property
    def max_length(self) -> int:
        """Tokens that a row can hold."""
        return self._max_length

    def prefill(
        self, prompt_ids: Tensor, *, rows: Tensor | None = None, bit_widths: Tensor | None = None
    ) -> StepOutput:
        """See `Decoder.prefill`."""
        if bit_widths is None:
            bit_widths = torch.full((self._model.num_units,), max(self._model.bit_widths))
        return self._run(prompt_ids, bit_widths, rows, keep=1, restart=True).at(-1)

    def extend(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> ExtendOutput:
        """See `Decoder.extend`; widths may differ from token to token too, `[R', M, U]`."""
        return self._run(token_ids, bit_widths, rows, keep=None, restart=False)

    def step(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> StepOutput:
        """See `Decoder.step`."""
        return self.extend(token_ids[..., None], bit_widths, rows=rows).at(0)

    def truncate(self, lengths: Tensor) -> None:
        """See `Decoder.truncate`."""
        cache = self._open_cache()
        check_truncation(lengths.cpu(), cache.lengths.cpu())
        cache.lengths.copy_(lengths)  # what is beyond is masked, and overwritten before it counts again

    def score(self, token_ids: Tensor, bit_widths: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Teacher-forced logits of whole sequences, many tokens at a time; the session's own rows are untouched.

        Every token writes its keys and values at its own widths, so this equals decoding step by step with widths that
        are known in advance, up to float rounding.

        Args:
            token_ids: `[R', T]` int64.
            bit_widths: None for the unquantised weights, or `[U]`, `[R', U]`, `[R', T, U]` int64.
            first: Logits of earlier positions are left out.

        Returns:
            `[R', T - first, vocab]` float32; position t predicts token t + 1.

        Raises:
            InputError: If T exceeds the context, no position is left to score, or a width is not stored.
        """
        rows, length = token_ids.shape
        if not 0 <= first < length <= self._model.max_context:
            raise InputError(
                f"{length} tokens, logits from position {first}: there must be a position to score and at most "
                f"{self._model.max_context} tokens, the model's context; cut the text into shorter windows"
            )
        if bit_widths is None:
            bit_widths = torch.full((self._model.num_units,), REFERENCE_WIDTH)
        widths = self._expand(bit_widths, rows, length)
        per_pass = max(1, _SCORE_TOKENS_PER_PASS // length)
        token_ids = token_ids.to(self._model.device)
        keep = length - first
        parts = [
            self._model.forward(token_ids[i : i + per_pass], widths[i : i + per_pass], keep=keep).logits
            for i in range(0, rows, per_pass)
        ]
        return torch.cat(parts)

    def fork(self) -> DecodeSession:
        """An independent copy of the session, keys and values included."""
        twin = DecodeSession(self._model, num_rows=self._num_rows, max_length=self._max_length)
        twin._cache = self._open_cache().copy()
        return twin

    def branches(self, lengths: Tensor) -> DecodeSession:
        """A session of R' rows, each a copy of the first `lengths[r]` tokens, `[R']` int64, of this one's only row."""
        cache = self._open_cache()
        assert self._num_rows == 1, "of one row"
        check_truncation(lengths.cpu(), cache.lengths.cpu().expand(len(lengths)))
        twin = DecodeSession(self._model, num_rows=len(lengths), max_length=self._max_length)
        twin._cache = cache.copy(num_rows=len(lengths))
        twin._cache.lengths.copy_(lengths)
        return twin

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return self._open_cache().num_bytes

    def close(self) -> None:
        """Frees the cache; any later call raises. Closing twice is fine."""
        self._cache = None

    def _open_cache(self) -> RowCache:
        if self._cache is None:
            raise RuntimeError("this DecodeSession is closed")
        return self._cache

    def _run(
        self, token_ids: Tensor, bit_widths: Tensor, rows: Tensor | None, *, keep: int | None, restart: bool
    ) -> ExtendOutput:
        """Reads tokens; the output at the last `keep` of them, None for all."""
        cache = self._open_cache()
        check_tokens(self, token_ids, rows, is_prompt=restart)
        num_rows, length = token_ids.shape
        check_width_shape(bit_widths, num_rows, length)
        device = self._model.device
        rows = None if rows is None else rows.to(device)
        widths = self._expand(bit_widths, num_rows, length)
        positions, mask = cache.begin(length, rows, restart=restart)
        result = self._model.forward(
            token_ids.to(device), widths, keep=keep or length, cache=cache, positions=positions, mask=mask
        )
        cache.commit()
        return ExtendOutput.of_pass(self._model, result)

    def _expand(self, bit_widths: Tensor, rows: int, length: int) -> Tensor:
        """Checks widths and broadcasts them to `[rows, length, U]`."""
        check_bit_widths(bit_widths, self._model.bit_widths, self._model.num_units)
        if bit_widths.ndim == 2:
            bit_widths = bit_widths[:, None, :]
        return bit_widths.expand(rows, length, self._model.num_units)
