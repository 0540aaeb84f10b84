"""What all pictures have in common: fonts, colours, titles, captions and how a figure becomes a file.

Figures are drawn without pyplot, so nothing here depends on a display, a backend or global state. Text is never parsed
as mathematics: tokens of real text are full of dollar signs.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from flexquant_rl.engine.files import replacing

DPI = 150
GREY = "#5b5b5b"
"""Of what explains."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.axisbelow": True,
    "axes.labelsize": 10.5,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "text.parse_math": False,
}
"""For `matplotlib.rc_context`."""

_LEFT_INCHES = 0.14
_CAPTION_SIZE = 8.5
_CHARACTERS_PER_INCH = 14.7
"""Of a caption in its size."""


def title_above(figure: Figure, title: str) -> None:
    """One bold line at the left of the top."""
    figure.suptitle(title, x=_left(figure), ha="left", fontsize=13, fontweight="bold")


def caption_below(figure: Figure, caption: str) -> None:
    """The conditions, wrapped below the axes."""
    wrapped = textwrap.wrap(caption, int(_CHARACTERS_PER_INCH * figure.get_figwidth()))
    figure.supxlabel("\n".join(wrapped), x=_left(figure), ha="left", fontsize=_CAPTION_SIZE, color=GREY)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def decimal_label(value: float, position: object = None) -> str:
    """`0.00005` rather than `5e-05`, down to where counting zeros is harder; for matplotlib's `FuncFormatter`."""
    return f"{value:.6f}".rstrip("0").rstrip(".") if value >= 0.99e-5 else f"{value:g}"


def label_log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Plain decimals at 1, 2 and 5, or at whole decades where there are many."""
    decades = math.log10(max(values) / min(values)) if values else 1.0
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=30))
    axes.yaxis.set_major_formatter(FuncFormatter(decimal_label))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _left(figure: Figure) -> float:
    return _LEFT_INCHES / figure.get_figwidth()
