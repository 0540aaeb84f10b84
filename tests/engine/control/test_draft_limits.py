"""How many drafts a round may have, and how many of them are looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexquant_rl.engine.control.draft_limits import next_ngram_drafts
from flexquant_rl.engine.control.served_drafts import drafts_at
from flexquant_rl.engine.errors import InputError


@pytest.mark.parametrize(
    ("num_found", "num_accepted", "following"),
    [(7, 7, 7), (7, 4, 7), (7, 3, 2), (7, 0, 2), (2, 1, 7), (2, 0, 2), (1, 0, 2), (1, 1, 7)],
)
def test_a_lookup_is_doubted_behind_one_that_was_mostly_wrong(
    num_found: int, num_accepted: int, following: int
) -> None:
    assert next_ngram_drafts(7, num_found, num_accepted) == following
    assert next_ngram_drafts(1, num_found, num_accepted) == 1, "never more than were asked for"


@pytest.mark.parametrize(
    ("length", "confidence", "message"),
    [
        (0, 0.4, "length=0 must be 1 to 15"),
        (16, 0.4, "length=16"),
        (2.5, 0.4, "length=2.5 must be 1 to 15 drafts, a whole number"),
        ("x", 0.4, "length='x' must be 1 to 15"),
        (3, 1.5, "confidence=1.5 is no probability"),
        (3, "x", "confidence='x' is no probability"),
    ],
)
def test_drafts_that_there_are_none_of(length: Any, confidence: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        drafts_at("d", torch.full((2,), 3), torch.full((2,), 8), length=length, min_confidence=confidence)
