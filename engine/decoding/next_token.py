"""What comes after an output distribution: the likeliest token, a sampled one, or the next one of a given text."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.decoder import greedy_tokens


class NextTokens(Protocol):
    """Chooses the next token of each row."""

    def __call__(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """`[R', vocab]` logits of rows `[R']` (default all) to tokens, `[R']` int64 on the CPU."""


class Greedy:
    """The likeliest token."""

    def __call__(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `NextTokens`."""
        return greedy_tokens(logits)


class Sampler:
    """Samples each row with a temperature, a nucleus and a seed of its own; temperature 0 is greedy.

    Args:
        num_rows: R; every row is greedy until `start` says otherwise.
    """

    def __init__(self, num_rows: int) -> None:
        self._temperature = [0.0] * num_rows
        self._top_p = [1.0] * num_rows
        self._generators = [torch.Generator() for _ in range(num_rows)]

    def start(self, row: int, *, temperature: float, top_p: float = 1.0, seed: int = 0) -> None:
        """Sets how a row is sampled from now on.

        Args:
            row: Index of the row.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_p: Only the likeliest tokens whose probabilities reach this sum are sampled, 0 < top_p <= 1.
            seed: Seed of the row's own generator, so that rows do not disturb each other.
        """
        self._temperature[row] = temperature
        self._top_p[row] = top_p
        self._generators[row].manual_seed(seed)

    def __call__(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `NextTokens`."""
        indices = range(len(logits)) if rows is None else rows.tolist()
        if all(self.is_greedy(index) for index in indices):
            return greedy_tokens(logits)
        return torch.tensor([self._sample(row, index) for row, index in zip(logits, indices, strict=True)])

    def is_greedy(self, row: int) -> bool:
        """Whether a row takes the likeliest token."""
        return self._temperature[row] == 0

    def distribution(self, logits: Tensor, row: int) -> Tensor:
        """What `[vocab]` logits of a row that is not greedy are sampled from, `[vocab]` float32 on the CPU, sum 1."""
        probs = (logits / self._temperature[row]).softmax(-1).cpu()
        if self._top_p[row] == 1:
            return probs
        inside = nucleus(probs, self._top_p[row])
        return inside / inside.sum()

    def draw(self, probs: Tensor, row: int) -> int:
        """A token of `[vocab]` probabilities, which need not be normalised, by the row's own generator."""
        return int(torch.multinomial(probs, 1, generator=self._generators[row]))

    def uniform(self, row: int) -> float:
        """A number from 0 to below 1 by the row's own generator."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generators[row]))

    def _sample(self, logits: Tensor, row: int) -> int:
        if self.is_greedy(row):
            return int(greedy_tokens(logits[None]))
        return self.draw(self.distribution(logits, row), row)


class Replay:
    """The tokens of a given text, one after the other.

    Args:
        token_ids: `[R, T]` int64.
    """

    def __init__(self, token_ids: Tensor) -> None:
        self._token_ids = token_ids
        self._positions = [0] * len(token_ids)

    def __call__(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `NextTokens`; the logits are not looked at. One row's token may be a view of the text."""
        chosen = range(len(self._positions)) if rows is None else rows.tolist()
        places = [self._positions[row] for row in chosen]
        for row in chosen:
            self._positions[row] += 1
        if len(places) == 1:  # a row that is timed: indexing by lists takes as long as a small policy
            return self._token_ids[chosen[0], places[0]].view(1)
        return self._token_ids[list(chosen), places]


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Sets to 0 all but the likeliest tokens of `[vocab]` probabilities whose sum reaches `top_p`; not normalised."""
    ordered, order = probs.sort(descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p  # the token that reaches the sum stays
    return probs.scatter(-1, order[outside], 0.0)
