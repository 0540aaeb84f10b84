"""The picture of policies of drafts: speed by policy, by the cost table and by the clock, and acceptance by place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from flexquant_rl.agents.evaluation.draft_rows import DraftRow, Kind
from flexquant_rl.agents.evaluation.drafting import acceptance
from flexquant_rl.agents.evaluation.drawing import GREY, STYLE, caption_below, save_figure, title_above
from flexquant_rl.agents.policies.families import ORACLE, PPO, STATIC
from flexquant_rl.fq_env.trace_table import TraceTable

_RULE_COLOUR = "#6A3D9A"
_COLOURS: dict[Kind, str] = {
    "plain": GREY,
    "rule": _RULE_COLOUR,
    "learned": PPO.colour,
    "reference": ORACLE.colour,
    "bound": ORACLE.colour,
}
_FIXED_COLOUR = STATIC.colour
_MOST_CHARACTERS = 44


def plot_drafts(
    rows: Sequence[DraftRow], table: TraceTable, widths: Sequence[float], path: Path, *, title: str, caption: str
) -> None:
    """Draws the speed of every policy over plain decoding, and how acceptance falls along a round, as a PNG.

    The cost table's speeds have 95% intervals over documents; the clock's, where there are some, are in a panel of
    their own.

    Args:
        rows: Every policy, in order from the top.
        table: The test sequences.
        widths: Width of each level.
        path: Path of the PNG, written atomically.
        title: One line.
        caption: The conditions, wrapped below the axes.
    """
    is_timed = any(row.speedup_measured is not None for row in rows)
    with matplotlib.rc_context(STYLE):
        height = max(4.6, 1.9 + 0.32 * len(rows))
        figure = Figure(
            figsize=(14 if is_timed else 11.5, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
        )
        ratios = (3, 2.2, 2.8) if is_timed else (3, 2.8)
        panels = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
        places = np.arange(len(rows))[::-1]
        _draw_modelled(panels[0], rows, places)
        if is_timed:
            _draw_measured(panels[1], rows, places)
        _draw_acceptance(panels[-1], table, widths)
        title_above(figure, title)
        caption_below(figure, f"{caption.rstrip(' .')}. Bars: 95% bootstrap intervals over test documents.")
        save_figure(figure, path)


def _draw_modelled(axes: Axes, rows: Sequence[DraftRow], places: np.ndarray) -> None:
    for row, place in zip(rows, places, strict=True):
        bars = [[max(row.speedup_modelled - row.speedup_low, 0)], [max(row.speedup_high - row.speedup_modelled, 0)]]
        marker = "*" if row.kind in ("reference", "bound") else "o" if row.kind == "learned" else "s"
        axes.errorbar(
            [row.speedup_modelled],
            [place],
            xerr=bars,
            color=_colour(row),
            marker=marker,
            markersize=12 if marker == "*" else 7,
            markeredgecolor="white",
            capsize=2.5,
            linestyle="none",
        )
    axes.set_yticks(places.tolist(), [_label(row) for row in rows], fontsize=9)
    _dress_speeds(axes, len(rows), "speed over plain decoding, by the cost table")


def _draw_measured(axes: Axes, rows: Sequence[DraftRow], places: np.ndarray) -> None:
    for row, place in zip(rows, places, strict=True):
        if row.speedup_measured is not None:
            axes.plot([row.speedup_measured], [place], color=_colour(row), marker="D", markersize=6.5)
    axes.set_yticks(places.tolist(), [""] * len(rows))
    _dress_speeds(axes, len(rows), "the same, by the clock")


def _dress_speeds(axes: Axes, num_rows: int, label: str) -> None:
    axes.set_ylim(-0.6, num_rows - 0.4)
    axes.axvline(1, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.grid(axis="both", linewidth=0.6)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    axes.margins(x=0.08)


def _draw_acceptance(axes: Axes, table: TraceTable, widths: Sequence[float]) -> None:
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 0.95, max(len(widths), 2)))
    places = np.arange(1, table.depth + 1)
    by_place = acceptance(table).by_place()
    for shares, width, shade in zip(by_place, widths, shades, strict=False):
        axes.plot(places, shares, color=shade, marker="o", markersize=4.5, label=f"{width} bits")
    lowest = max(0.0, np.floor(10 * by_place.min() - 1) / 10)  # a tenth below all of them: differences are seen
    axes.set_ylim(lowest, 1 + 0.02 * (1 - lowest))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("place of the draft in its round")
    axes.set_ylabel("share that agrees, all before agreeing")
    axes.grid(linewidth=0.8)
    axes.legend(title="drafted at", loc="lower left")


def _colour(row: DraftRow) -> str:
    return _FIXED_COLOUR if row.family == "fixed" else _COLOURS[row.kind]


def _label(row: DraftRow) -> str:
    name = row.policy if row.seed is None else f"{row.policy} (seed {row.seed})"
    return name if len(name) <= _MOST_CHARACTERS else name[: _MOST_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
