"""Token-by-token decoding of a batch of sequences with bit-widths chosen anew at every token.

The widths are an argument of every call and nothing here remembers them. Rows are independent sequences: they may be at
different positions and run at different widths in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.kv_cache import RowCache
from flexquant_rl.engine.linear import REFERENCE_WIDTH
from flexquant_rl.engine.model import NestedCausalLM, Unit

_SCORE_TOKENS_PER_PASS = 8192
"""Tokens per parallel pass: bounds the logits' memory (8,192 x 4,096 x 4 bytes = 128 MiB on the embedded model)."""
_MIN_SHARED_TOKENS = 8
"""A shorter prompt that all rows share is read sooner than its keys and values are copied to every row."""


@dataclass(frozen=True)
class StepOutput:
    """What one pass over each row yields, at its last token.

    Attributes:
        logits: `[R, vocab]` float32.
        residual_update: `[R, U]` float32, ‖Δh‖/‖h‖ of the unit's layer; 0 for the head.
        crest: `[R, U]` float32, max|h|/rms(h) of the layer's input; 0 for the head.
    """

    logits: Tensor
    residual_update: Tensor
    crest: Tensor


class DecoderModel(Protocol):
    """The facts about a model that the environment needs."""

    @property
    def units(self) -> tuple[Unit, ...]:
        """What a policy controls."""

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """Stored widths, ascending."""

    @property
    def num_units(self) -> int:
        """U."""

    @property
    def vocab_size(self) -> int:
        """Size of the output distribution."""

    @property
    def max_context(self) -> int:
        """Tokens a row can hold."""

    @property
    def fingerprint(self) -> str:
        """Identity of the nested weights."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def has_reference(self) -> bool:
        """Whether width 0 can be asked for."""

    def embedding_matrix(self) -> Tensor:
        """`[vocab, d]`."""

    def mean_bit_width(self, bit_widths: Tensor) -> Tensor:
        """Parameter-weighted mean of `[..., U]`."""


class Decoder(Protocol):
    """What the environment needs of a session, so that tests can pass one without a model."""

    @property
    def model(self) -> DecoderModel:
        """The model behind the session."""

    @property
    def lengths(self) -> Tensor:
        """`[R]` int64 tokens held per row."""

    def prefill(
        self, prompt_ids: Tensor, *, rows: Tensor | None = None, bit_widths: Tensor | None = None
    ) -> StepOutput:
        """Restarts rows with prompts."""

    def step(self, bit_widths: Tensor, token_ids: Tensor) -> StepOutput:
        """Decodes one token per row."""

    def score(self, token_ids: Tensor, bit_widths: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Teacher-forced logits of whole sequences."""

    def fork(self) -> Decoder:
        """An independent copy."""

    def close(self) -> None:
        """Frees the cache."""


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
        max_length = check_max_length(max_length, model)
        self._model = model
        self._num_rows = num_rows
        self._max_length = max_length
        self._cache: RowCache | None = RowCache(model.num_layers, num_rows, max_length, model.device)

    @property
    def model(self) -> NestedCausalLM:
        """The model behind the session."""
        return self._model

    @property
    def lengths(self) -> Tensor:
        """`[R]` int64 tokens held per row."""
        return self._open_cache().lengths

    def prefill(
        self, prompt_ids: Tensor, *, rows: Tensor | None = None, bit_widths: Tensor | None = None
    ) -> StepOutput:
        """Restarts rows, each with a prompt of the same length. If the pass fails, these rows are empty.

        Args:
            prompt_ids: `[R', T]` int64.
            rows: `[R']` int64 rows to restart; default all.
            bit_widths: `[U]`; default the largest stored width everywhere.

        Raises:
            InputError: If the prompt is empty or longer than a row, or a width is not stored.
        """
        if bit_widths is None:
            bit_widths = torch.full((self._model.num_units,), max(self._model.bit_widths))
        return self._run(prompt_ids, bit_widths, rows, restart=True)

    def step(self, bit_widths: Tensor, token_ids: Tensor) -> StepOutput:
        """Appends one token to every row.

        Args:
            bit_widths: `[U]` or `[R, U]` int64; 0 reads the unquantised weights.
            token_ids: `[R]` int64.

        Raises:
            InputError: If a row is full or a width is not stored.
        """
        return self._run(token_ids[:, None], bit_widths, None, restart=False)

    def score(self, token_ids: Tensor, bit_widths: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Teacher-forced logits of whole sequences, many tokens at a time; the session's own rows are untouched.

        Every token writes its keys and values at its own widths, so this equals decoding step by step with widths that
        are known in advance, up to float rounding. What comes before `first` is read once if it is the same in all
        rows, tokens and widths.

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
        prompt = self._shared_prompt(token_ids, widths, first)
        parts = [
            self._score_rows(token_ids[i : i + per_pass], widths[i : i + per_pass], first, prompt)
            for i in range(0, rows, per_pass)
        ]
        return torch.cat(parts)

    def fork(self) -> DecodeSession:
        """An independent copy of the session, keys and values included."""
        twin = DecodeSession(self._model, num_rows=self._num_rows, max_length=self._max_length)
        twin._cache = self._open_cache().copy()
        return twin

    def close(self) -> None:
        """Frees the cache; any later call raises. Closing twice is fine."""
        self._cache = None

    def _shared_prompt(self, token_ids: Tensor, widths: Tensor, first: int) -> RowCache | None:
        """Keys and values of the first tokens if all rows read the same there, as when choices of widths compete."""
        tokens, read_at = token_ids[:, :first], widths[:, :first]
        if len(tokens) == 1 or first < _MIN_SHARED_TOKENS:
            return None
        if bool((tokens != tokens[:1]).any()) or bool((read_at != read_at[:1]).any()):
            return None
        prompt = DecodeSession(self._model, max_length=token_ids.shape[1])
        prompt._run(tokens[:1], read_at[:1], None, restart=True)
        return prompt._open_cache()

    def _score_rows(self, token_ids: Tensor, widths: Tensor, first: int, prompt: RowCache | None) -> Tensor:
        """Logits from position `first` on, `[R', T - first, vocab]`; with a prompt only what follows is read."""
        keep = token_ids.shape[1] - first
        if prompt is None:
            return self._model.forward(token_ids, widths, keep=keep).logits
        cache = prompt.copy(num_rows=len(token_ids))
        positions, mask = cache.begin(keep, None, restart=False)
        rest, read_at = token_ids[:, first:], widths[:, first:]
        return self._model.forward(rest, read_at, keep=keep, cache=cache, positions=positions, mask=mask).logits

    def _open_cache(self) -> RowCache:
        if self._cache is None:
            raise RuntimeError("this DecodeSession is closed")
        return self._cache

    def _run(self, token_ids: Tensor, bit_widths: Tensor, rows: Tensor | None, *, restart: bool) -> StepOutput:
        cache = self._open_cache()
        num_rows, length = token_ids.shape
        expected_rows = self._num_rows if rows is None else len(rows)
        if num_rows != expected_rows:
            raise ValueError(f"{num_rows} sequences were given for {expected_rows} rows; give one for each")
        if length == 0:
            raise InputError("the prompt is empty; at least one token is needed")
        held = 0 if restart else int(cache.lengths.max())
        check_room(length, held, self._max_length)
        widths = self._expand(bit_widths, num_rows, length)
        device = self._model.device
        positions, mask = cache.begin(length, None if rows is None else rows.to(device), restart=restart)
        result = self._model.forward(token_ids.to(device), widths, keep=1, cache=cache, positions=positions, mask=mask)
        cache.commit()
        assert result.residual_update is not None and result.crest is not None
        return StepOutput(
            result.logits[:, -1], self._model.per_unit(result.residual_update), self._model.per_unit(result.crest)
        )

    def _expand(self, bit_widths: Tensor, rows: int, length: int) -> Tensor:
        """Checks widths and broadcasts them to `[rows, length, U]`."""
        check_bit_widths(bit_widths, self._model.bit_widths, self._model.num_units)
        if bit_widths.ndim == 2:
            bit_widths = bit_widths[:, None, :]
        return bit_widths.expand(rows, length, self._model.num_units)


def greedy_tokens(logits: Tensor) -> Tensor:
    """The likeliest tokens of `[R, vocab]` logits, `[R]` int64 on the CPU."""
    # NumPy's argmax of 32,000 floats takes a ninth of torch's time (2.13): 50 us, 2% of a step of 100 million weights.
    return torch.from_numpy(logits.cpu().numpy().argmax(-1))


def check_max_length(max_length: int | None, model: NestedCausalLM) -> int:
    """Returns how many tokens a row shall hold, the model's context by default; InputError if that is exceeded."""
    max_length = max_length or model.max_context
    if max_length > model.max_context:
        raise InputError(
            f"{max_length} tokens (prompt and continuation) were asked for, but the model's context holds "
            f"{model.max_context}; shorten the prompt or the continuation"
        )
    return max_length


def check_room(num_tokens: int, held: int, max_length: int) -> None:
    """Raises InputError if a row that holds `held` tokens has no room for more."""
    if held + num_tokens > max_length:
        raise InputError(
            f"{held + num_tokens} tokens do not fit into a row of {max_length}; shorten the prompt or the continuation"
        )


def check_bit_widths(bit_widths: Tensor, stored: Sequence[int], num_units: int) -> None:
    """Raises InputError if a width vector has the wrong length or a width that is not stored."""
    if bit_widths.shape[-1] != num_units:
        raise InputError(f"{bit_widths.shape[-1]} bit-widths were given, but the model has {num_units} units")
    allowed = torch.zeros(9, dtype=torch.bool)
    allowed[[REFERENCE_WIDTH, *stored]] = True
    flat = bit_widths.flatten().cpu()
    wrong = flat[(flat < 0) | (flat > 8) | ~allowed[flat.clamp(0, 8)]]
    if len(wrong):
        raise InputError(
            f"bit-width {int(wrong[0])} is not stored; this model holds {', '.join(map(str, stored))}: "
            "choose one of them or quantise again with --bit-widths"
        )
