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
from flexquant_rl.engine.control.output_kl import kl_nats, reference_width
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.decoding.decoder import Decoder, DecoderModel
from flexquant_rl.engine.decoding.next_token import NextTokens


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

    Args:
        decoder: Scores text; its rows are not touched.
        num_rows: R.
        first: Tokens of the prompt.
    """

    def __init__(self, decoder: Decoder, num_rows: int, first: int) -> None:
        self._decoder = decoder
        self._rows = torch.arange(num_rows)
        self._first = first
        self._widths = _reference_widths(decoder.model)
        self._log_probs: Tensor | None = None  # [R, max_new_tokens, vocab]
        self._windows: Tensor | None = None  # that all rows started with together

    def start(self, tokens: Tensor, rows: Tensor, windows: Tensor) -> None:
        """See `Reference.start`."""
        is_whole = torch.equal(rows, self._rows)
        if is_whole and self._windows is not None and torch.equal(windows, self._windows):
            return  # the same text again, as when several policies are compared
        read = self._decoder.score(tokens[:, :-1], self._widths, first=self._first).log_softmax(-1)
        self._windows = windows.clone() if is_whole else None
        if is_whole:
            self._log_probs = read
            return
        if self._log_probs is None:
            self._log_probs = read.new_zeros(len(self._rows), *read.shape[1:])
        self._log_probs[rows] = read

    def log_probs(self, position: Tensor) -> Tensor:
        """See `Reference.log_probs`."""
        return self._of_all()[self._rows, position]

    def kl_nats(self, tokens: Tensor, rows: Tensor, bit_widths: Tensor) -> Tensor:
        """Output KL at every token of the continuation, had it been read at given widths.

        Args:
            tokens: `[R', window_tokens]` int64, the text of the rows.
            rows: `[R']` int64.
            bit_widths: `[R', U]` int64; the prompt is read at the largest width, as it is in an episode.

        Returns:
            `[R', max_new_tokens]` float32 on the CPU.
        """
        read = tokens[:, :-1]
        model = self._decoder.model
        per_token = torch.full((*read.shape, model.num_units), max(model.bit_widths))
        per_token[:, self._first :] = bit_widths[:, None].cpu()
        log_probs = self._decoder.score(read, per_token, first=self._first).log_softmax(-1)
        reference = self._of_all()
        return kl_nats(reference if torch.equal(rows, self._rows) else reference[rows], log_probs).cpu()

    def close(self) -> None:
        """The decoder is another's; there is nothing to free."""

    def _of_all(self) -> Tensor:
        assert self._log_probs is not None, "start() first"
        return self._log_probs


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
