"""Drafts that cost no step, and a record of how drafts fared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_LONGEST_NGRAM, _SHORTEST_NGRAM = 3, 2


@dataclass
class DraftRecord:
    """How drafts fared, of one sequence.

    Attributes:
        num_passes: Passes that verified.
        num_tokens: Tokens that came out of them.
        num_draft_steps: Steps at draft widths.
        drafted_at: Drafts that waited at each place of a round.
        accepted_at: Of these, those that were kept.
    """

    num_passes: int = 0
    num_tokens: int = 0
    num_draft_steps: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def add(self, num_drafts: int, num_accepted: int) -> None:
        """Notes a round."""
        self.num_passes += 1
        self.num_tokens += num_accepted + 1
        missing = num_drafts - len(self.drafted_at)
        self.drafted_at += [0] * missing
        self.accepted_at += [0] * missing
        for place in range(num_drafts):
            self.drafted_at[place] += 1
            self.accepted_at[place] += place < num_accepted

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a verifying pass gave; NaN before the first."""
        return self.num_tokens / self.num_passes if self.num_passes else math.nan


def copied_drafts(text: NDArray[np.int64], max_drafts: int) -> list[int]:
    """What followed the last tokens of a text where they occurred before: three of them, else two, the latest place.

    Args:
        text: `[T]` token ids.
        max_drafts: Tokens at most.

    Returns:
        The tokens; none if the end of the text is new.

    References:
        Prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding.
    """
    for size in range(_LONGEST_NGRAM, _SHORTEST_NGRAM - 1, -1):
        if len(text) <= size or max_drafts < 1:
            continue
        before = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
        places = (before == text[-size:]).all(1).nonzero()[0]
        if len(places):
            begin = int(places[-1]) + size
            found: list[int] = text[begin : begin + max_drafts].tolist()
            return found
    return []
