"""How many drafts a round holds, and how many of them are looked up. Imports nothing that is slow."""

from __future__ import annotations

from typing import Any

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import is_whole_number, shown

MOST_PENDING = 15
"""Drafts of a round at most: with the upcoming token they are the 16 tokens that one native pass reads."""
NGRAM_DRAFTS = 7
"""Drafts that are looked up unless told otherwise: with the upcoming token they are eight, as many as the
CPU kernels keep the sums of at once."""

DOUBTED_NGRAM_DRAFTS = 2
"""Those of a round behind a lookup that was mostly wrong: a wrong lookup of two costs a pass over three tokens."""


def next_ngram_drafts(ngram_drafts: int, num_found: int, num_accepted: int) -> int:
    """Drafts that the next round looks up at most, behind one that found so many and had so many accepted."""
    return ngram_drafts if 2 * num_accepted >= num_found else min(ngram_drafts, DOUBTED_NGRAM_DRAFTS)


def check_ngram_drafts(ngram_drafts: Any, name: str = "ngram_drafts") -> None:
    """Raises InputError, which calls it by that name, on what is no number of drafts, or one that no round can hold."""
    if not is_whole_number(ngram_drafts) or not 0 <= ngram_drafts <= MOST_PENDING:
        raise InputError(
            f"{name}={shown(ngram_drafts)} must be 0 to {MOST_PENDING}, a whole number; 0 looks nothing up"
        )
