"""Bit-widths beside generated text: as background colours on a terminal that has them, else as a line of numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

# Few bits are light and many are dark, as in the pictures of a run: viridis in the 256 colours of a terminal.
_BACKGROUNDS = (227, 148, 77, 36, 30, 24, 54)
_DARK_FROM = 30  # of these backgrounds on, white letters are easier to read than black ones
_RESET = "\x1b[0m"


def has_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose user wants colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, bit_width: float, stored: Sequence[int]) -> str:
    """The text on the colour of a width.

    Args:
        text: A token; a line break in it carries no colour, which would run to the edge of the screen.
        bit_width: Mean over the units, bits.
        stored: The widths of the model, ascending; the ends of the scale.
    """
    span = max(stored[-1] - stored[0], 1)
    place = min(max((bit_width - stored[0]) / span, 0.0), 1.0)
    index = round(place * (len(_BACKGROUNDS) - 1))
    letters = 231 if index >= _BACKGROUNDS.index(_DARK_FROM) else 16
    start = f"\x1b[48;5;{_BACKGROUNDS[index]};38;5;{letters}m"
    return "\n".join(f"{start}{line}{_RESET}" if line else "" for line in text.split("\n"))


def legend(stored: Sequence[int]) -> str:
    """One coloured field for each stored width."""
    return "bits: " + "".join(coloured(f" {width} ", width, stored) for width in stored)


def coloured_text(pieces: Sequence[str], bit_widths: Sequence[float], stored: Sequence[int]) -> str:
    """A whole text, each piece on the colour of its width, and the legend on a line below.

    Args:
        pieces: What each token adds to the text.
        bit_widths: Mean width of each, bits.
        stored: The widths of the model, ascending.
    """
    text = "".join(coloured(piece, bits, stored) for piece, bits in zip(pieces, bit_widths, strict=True))
    return f"{text}\n{legend(stored)}"


def numbers(bit_widths: Sequence[float]) -> str:
    """One number for each token."""
    return "bits: " + " ".join(f"{bits:.1f}" for bits in bit_widths)
