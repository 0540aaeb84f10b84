"""What the reference says after every token that the episodes read: the distribution that output KL is measured from.

When the next token comes from the text, the reference's pass over the whole window does not depend on any action, so it
is made in one parallel pass when the episode starts. When the model continues freely, a reference decoder steps along.
In both, the keys and values of the reference come from the reference width throughout, prompt included.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import StaticController
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.output_kl import LOGITS_AT_A_TIME, kl_nats, reference_width
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.decoding.decoder import Decoder, DecoderModel
from flexquant_rl.engine.decoding.next_token import NextTokens
from flexquant_rl.engine.layer_walk import LayerWalk, can_walk
from flexquant_rl.engine.model import NestedCausalLM

_DISTRIBUTION_BYTES = 1 << 29
"""Distributions of a whole batch and episode are kept up to this size."""
_CALL_TOKENS = 2048


class Reference(Protocol):
    """The reference's distributions for R rows."""

    def start(self, tokens: Tensor, rows: Tensor, windows: Tensor) -> None:
        """Begins rows `[R']` with text `[R', window_tokens]`, which is that of the windows `[R']`."""

    def log_probs(self, position: Tensor) -> Tensor:
        """Log-probabilities after the tokens that a step at positions `[R]` has read, `[R, vocab]`. Once a step."""

    def close(self) -> None:
        """Frees what the reference holds; closing twice is fine."""


class TextReference:
    """The reference over a given text: one parallel pass, then look-ups.

    Distributions are kept where they are few. Else the states before the head are, a vocabulary's number of times
    smaller, and every step makes the distributions that it needs.

    Args:
        decoder: Scores text; its rows are not touched.
        num_rows: R.
        first: Tokens of the prompt.
    """

    def __init__(self, decoder: Decoder, num_rows: int, first: int) -> None:
        self._decoder = decoder
        self._rows = torch.arange(num_rows)
        self._first = first
        self._kept: _KeptDistributions | _KeptStates | None = None
        self._windows: Tensor | None = None  # that all rows started with together

    def start(self, tokens: Tensor, rows: Tensor, windows: Tensor) -> None:
        """See `Reference.start`."""
        is_whole = torch.equal(rows, self._rows)
        if is_whole and self._windows is not None and torch.equal(windows, self._windows):
            return  # the same text again, as when several policies are compared
        self._windows = windows.clone() if is_whole else None
        read = tokens[:, :-1]
        if self._kept is None:
            self._kept = self._make_store(read)
        self._kept.put(read, rows)

    def log_probs(self, position: Tensor) -> Tensor:
        """See `Reference.log_probs`."""
        return self._store().at(self._rows, position)

    def kl_nats(self, tokens: Tensor, rows: Tensor, bit_widths: Tensor) -> Tensor:
        """Output KL at every token of the continuation, had it been read at given widths.

        Args:
            tokens: `[R', window_tokens]` int64, the text of the rows.
            rows: `[R']` int64.
            bit_widths: `[R', U]`, or `[R', max_new_tokens, U]` for tokens that differ, int64; the prompt is read at the
                largest width, as it is in an episode.

        Returns:
            `[R', max_new_tokens]` float32 on the CPU.
        """
        read = tokens[:, :-1]
        model = self._decoder.model
        per_token = torch.full((*read.shape, model.num_units), max(model.bit_widths))
        per_token[:, self._first :] = (bit_widths if bit_widths.dim() == 3 else bit_widths[:, None]).cpu()
        found = []
        for part in _pieces(len(rows), (read.shape[1] - self._first) * model.vocab_size):
            log_probs = self._decoder.score(read[part], per_token[part], first=self._first).log_softmax(-1)
            found.append(kl_nats(self._store().of(rows[part]), log_probs).cpu())
        return torch.cat(found)

    def close(self) -> None:
        """The decoder is another's; there is nothing to free."""

    def _make_store(self, read: Tensor) -> _KeptDistributions | _KeptStates:
        model, num_rows = self._decoder.model, len(self._rows)
        kept_bytes = num_rows * (read.shape[1] - self._first) * model.vocab_size * 4
        if (
            kept_bytes > _DISTRIBUTION_BYTES
            and isinstance(model, NestedCausalLM)
            and can_walk(model, read, reference_width(model))
        ):
            return _KeptStates(model, num_rows, self._first)
        return _KeptDistributions(self._decoder, num_rows, self._first)

    def _store(self) -> _KeptDistributions | _KeptStates:
        assert self._kept is not None, "start() first"
        return self._kept


class _KeptDistributions:
    """Log-probabilities of all positions, for vocabularies and batches that are small, and for any decoder."""

    def __init__(self, decoder: Decoder, num_rows: int, first: int) -> None:
        self._decoder = decoder
        self._num_rows = num_rows
        self._first = first
        self._widths = _reference_widths(decoder.model)
        self._log_probs: Tensor | None = None  # [R, max_new_tokens, vocab]

    def put(self, read: Tensor, rows: Tensor) -> None:
        """Reads text `[R', T]` for rows `[R']`."""
        score, row_floats = self._decoder.score, (read.shape[1] - self._first) * self._decoder.model.vocab_size
        if len(rows) * row_floats <= LOGITS_AT_A_TIME and len(rows) == self._num_rows:
            found = score(read, self._widths, first=self._first).log_softmax(-1)
            self._log_probs = found if torch.equal(rows, torch.arange(len(rows))) else found[rows.argsort()]
            return
        for part in _pieces(len(rows), row_floats):
            found = score(read[part], self._widths, first=self._first).log_softmax(-1)
            if self._log_probs is None:
                self._log_probs = found.new_zeros(self._num_rows, *found.shape[1:])
            self._log_probs[rows[part]] = found

    def at(self, rows: Tensor, position: Tensor) -> Tensor:
        """`[R', vocab]` at a position `[R']` of each row."""
        assert self._log_probs is not None
        return self._log_probs[rows, position]

    def of(self, rows: Tensor) -> Tensor:
        """`[R', max_new_tokens, vocab]`, all positions."""
        assert self._log_probs is not None
        return self._log_probs[rows]


class _KeptStates:
    """What enters the final norm and the head, at all positions."""

    def __init__(self, model: NestedCausalLM, num_rows: int, first: int) -> None:
        self._walk = LayerWalk(model)
        self._num_rows = num_rows
        self._first = first
        self._widths = _reference_widths(model)
        self._states: Tensor | None = None  # [R, max_new_tokens, d]

    def put(self, read: Tensor, rows: Tensor) -> None:
        """Reads text `[R', T]` for rows `[R']`, layer by layer."""
        read = read.to(self._walk.model.device)
        batches = read.split(max(1, _CALL_TOKENS // read.shape[1]))
        states = [self._walk.enter(batch) for batch in batches]
        widths = self._widths.expand(read.shape[1], -1)
        for layer_idx in range(self._walk.model.num_layers):
            for index, batch in enumerate(batches):
                states[index] = self._walk.layer(layer_idx, batch, states[index], widths)
        found = torch.cat([part[:, self._first :] for part in states])
        if self._states is None:
            self._states = found.new_zeros(self._num_rows, *found.shape[1:])
        self._states[rows] = found

    def at(self, rows: Tensor, position: Tensor) -> Tensor:
        """`[R', vocab]` at a position `[R']` of each row."""
        assert self._states is not None
        return self._log_probs(self._states[rows, position][:, None])[:, 0]

    def of(self, rows: Tensor) -> Tensor:
        """`[R', max_new_tokens, vocab]`, all positions."""
        assert self._states is not None
        return self._log_probs(self._states[rows])

    def _log_probs(self, states: Tensor) -> Tensor:
        """Of states `[R', T, d]`; what the tokens were no longer matters."""
        tokens = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        widths = self._widths.expand(states.shape[1], -1)
        return self._walk.logits(tokens, states, widths, states.shape[1]).log_softmax(-1)


def _pieces(num_rows: int, row_floats: int) -> list[slice]:
    """Rows to take at a time, so that what has a vocabulary's size stays small."""
    step = max(1, LOGITS_AT_A_TIME // row_floats)
    return [slice(i, i + step) for i in range(0, num_rows, step)]


class SteppingReference:
    """The reference beside a free continuation: a decoder of its own that reads the same tokens.

    Args:
        decoder: Forked once.
        num_rows: R.
        first: Tokens of the prompt.
        next_tokens: Gives the tokens that the episodes have chosen.
    """

    def __init__(self, decoder: Decoder, num_rows: int, first: int, next_tokens: NextTokens) -> None:
        self._widths = _reference_widths(decoder.model)
        self._first = first
        controller = StaticController(StaticAllocation("reference", self._widths), num_rows)
        self._runner = PolicyRunner(decoder.fork(), controller, next_tokens)

    def start(self, tokens: Tensor, rows: Tensor, windows: Tensor) -> None:
        """See `Reference.start`; reads the prompts only."""
        prompts = tokens[:, : self._first]
        output = self._runner.decoder.prefill(prompts, rows=rows, bit_widths=self._widths)
        self._runner.begin(output, torch.ones(len(rows), dtype=torch.float32), rows)

    def log_probs(self, position: Tensor) -> Tensor:
        """See `Reference.log_probs`; moves on by a token."""
        return self._runner.step().output.logits.log_softmax(-1)

    def close(self) -> None:
        """See `Reference.close`."""
        self._runner.decoder.close()


def _reference_widths(model: DecoderModel) -> Tensor:
    return torch.full((model.num_units,), reference_width(model))
