"""How drafts of the same weights are settled: the options. Imports nothing that is slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexquant_rl.engine.errors import InputError

MAX_DRAFTS = 15
"""Drafts of a round at most: with the token that they follow they are one pass of the native kernels."""


@dataclass(frozen=True)
class Verification:
    """How drafts are made and settled.

    Attributes:
        bit_width: Width of all units in the passes that verify; what comes out is what this width gives.
        max_drafts: Drafts of a round at most; 0 drafts nothing.
        min_confidence: A draft whose top-1 probability is lower is the last of its round; 0 never stops.
        copy_drafts: Whether drafts are copied from the text so far, where its last tokens occurred before.
    """

    bit_width: int
    max_drafts: int = 4
    min_confidence: float = 0.0
    copy_drafts: bool = False

    def check(self, bit_widths: Sequence[int]) -> None:
        """Raises InputError if a value is outside its domain, or the width is none of those stored."""
        if self.bit_width not in bit_widths:
            stored = ", ".join(map(str, bit_widths))
            raise InputError(f"verify_width={self.bit_width} is not stored; use one of {stored}")
        if type(self.max_drafts) is not int or not 0 <= self.max_drafts <= MAX_DRAFTS:
            raise InputError(f"max_drafts={self.max_drafts!r} must be a whole number from 0 to {MAX_DRAFTS}")
        if not (0 <= self.min_confidence <= 1):  # not so for NaN
            raise InputError(f"min_confidence={self.min_confidence} must be from 0 to 1; 0 never stops a round")
