"""The pictures of an analysis: strategies against bytes and time, parts as heatmaps, and the KL of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from flexquant_rl.agents.analysis.rows import PartRow, StrategyRow, TimeRow, times_by_row
from flexquant_rl.agents.analysis.strategies import HQQ, LLAMA_CPP, is_peer
from flexquant_rl.agents.analysis.token_loss import Origin, TokenTable, by_entropy, by_position
from flexquant_rl.agents.evaluation.drawing import STYLE, caption_below, label_log_axis, save_figure, title_above
from flexquant_rl.agents.evaluation.resampling import Array

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a8a8a")
_MARKERS = "osD^vPX*"
_MOST_NUMBERS = 12
"""Columns of a heatmap that have room for numbers in their cells."""
_MOST_LABELS = 40
_MUCH_SLOWER = 20
"""Times this far apart are drawn on a logarithmic scale."""


def plot_strategies(
    rows: Sequence[StrategyRow], times: Sequence[TimeRow], path: Path, *, title: str, caption: str
) -> None:
    """Draws KL against the bytes read for each weight, and against measured time, as a PNG; a line per strategy.

    Args:
        rows: Of all strategies; those without KL, the reference itself, are left out.
        times: Of the formats of these strategies; without any there is no panel of times. Other libraries' formats
            are hollow points with their names beside them.
        path: Path of the PNG, written atomically.
        title: One line.
        caption: The conditions, wrapped below.
    """
    drawn = [row for row in rows if row.output_kl_nats > 0]
    ms = {key: row.measured_ms for key, row in times_by_row(rows, times).items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12 if ms else 9, 5.6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        panels = figure.subplots(1, 1 + bool(ms), sharey=True, squeeze=False)[0]
        for index, name in enumerate(dict.fromkeys(row.strategy for row in rows if not is_peer(row.strategy))):
            own = [row for row in drawn if row.strategy == name]
            kl = [row.output_kl_nats for row in own]
            bars = np.array([[row.output_kl_low, row.output_kl_high] for row in own]).reshape(-1, 2).T
            style: dict[str, Any] = {
                "color": _COLOURS[index % len(_COLOURS)],
                "marker": _MARKERS[index % len(_MARKERS)],
                "markersize": 6,
                "markeredgecolor": "white",
                "linewidth": 1.4,
                "label": name,
            }
            below_above = np.clip([kl - bars[0], bars[1] - kl], 0, None)
            panels[0].errorbar([row.bytes_per_weight for row in own], kl, yerr=below_above, elinewidth=0.8, **style)
            timed = [row for row in own if (name, row.bit_width) in ms]
            if ms:
                at = [ms[name, row.bit_width] for row in timed]
                panels[1].plot(at, [row.output_kl_nats for row in timed], **style)
                panels[1].set_xlabel("ms per token, measured")
        if ms and max(ms.values()) > _MUCH_SLOWER * min(ms.values()):
            panels[1].set_xscale("log")
            panels[1].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        _draw_peers(panels, [row for row in drawn if is_peer(row.strategy)], ms)
        panels[0].set_xlabel("bytes read per weight, scales and offsets included")
        panels[0].set_ylabel("output KL (nats, log scale)")
        for axes in panels:
            _log_axis(axes, [row.output_kl_nats for row in drawn])
            axes.grid(which="major", linewidth=0.8)
        title_above(figure, title)
        caption_below(figure, caption)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        save_figure(figure, path)


def _draw_peers(panels: Sequence[Axes], peers: Sequence[StrategyRow], ms: dict[tuple[str, int], float]) -> None:
    """Other libraries' formats, which are points of their own: a library has one look."""
    # Of one library above, of the other below their points: they are often near each other.
    for library, marker, colour, above in ((LLAMA_CPP, "s", "#000000", 5), (HQQ, "D", "#8a5a00", -11)):
        own = [row for row in peers if row.strategy.startswith(library)]
        if not own:
            continue
        style: dict[str, Any] = {"marker": marker, "facecolors": "none", "edgecolors": colour, "s": 42, "zorder": 4}
        places: list[list[float | None]] = [
            [row.bytes_per_weight for row in own],
            [ms.get((row.strategy, row.bit_width)) for row in own],
        ]
        for axes, at in zip(panels, places, strict=False):
            known = [(x, row) for x, row in zip(at, own, strict=True) if x is not None]
            axes.scatter([x for x, _ in known], [row.output_kl_nats for _, row in known], label=library, **style)
            for x, row in known:
                form = row.strategy.partition(":")[2]
                text = form if library == LLAMA_CPP else f"{row.bit_width} bits {form}"
                place = (x, row.output_kl_nats)
                axes.annotate(text, place, (6, above), textcoords="offset points", fontsize=7, color=colour)


def plot_sensitivity(rows: Sequence[PartRow], path: Path, *, title: str, caption: str) -> None:
    """Draws heatmaps of units by width, kinds of matrices by width, and single matrices by layer and kind, as a PNG.

    Args:
        rows: Of one strategy.
        path: Path of the PNG, written atomically.
        title: One line.
        caption: The conditions, wrapped below.
    """
    units, kinds, single = ([row for row in rows if row.kind == kind] for kind in ("unit", "matrices", "matrix"))
    bodies = [row for row in single if row.part.startswith("layer.")]
    layers = list(dict.fromkeys(f"layer.{row.part.split('.')[1]}" for row in bodies))
    names = list(dict.fromkeys(row.part.split(".", 2)[2] for row in bodies))
    grid = np.full((len(layers), len(names)), np.nan)
    for row in bodies:
        _, layer, name = row.part.split(".", 2)
        grid[layers.index(f"layer.{layer}"), names.index(name)] = row.output_kl_nats
    height = float(np.clip(0.22 * len(layers) + 2.2, 4.5, 12))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
        _heatmap(panels[0], *_by_width(units), "every unit by width")
        _heatmap(panels[1], *_by_width(kinds), "every kind of matrix by width")
        width = single[0].bit_width if single else 0
        _heatmap(panels[2], grid, layers, names, f"every matrix at {width} bits")
        title_above(figure, title)
        caption_below(figure, caption)
        save_figure(figure, path)


def plot_tokens(table: TokenTable, origin: dict[int, Origin], path: Path, *, title: str, caption: str) -> None:
    """Draws how KL is spread over tokens, over positions, by origin and by entropy, a line per width, as a PNG.

    Args:
        table: The tokens of one strategy.
        origin: Where the KL of each width comes from; none leaves the panel empty.
        path: Path of the PNG, written atomically.
        title: One line.
        caption: The conditions, wrapped below.
    """
    widths = table.lossy_widths()
    shades = dict(zip(widths, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(widths))), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 8.6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        spread, position, past, entropy = figure.subplots(2, 2).ravel()
        for width in widths:
            style = {"color": shades[width], "linewidth": 1.6, "label": f"{width} bits"}
            ordered = np.sort(table.kl[width].ravel())[::-1]
            share = np.concatenate([[0.0], np.cumsum(ordered) / ordered.sum()])
            spread.plot(np.linspace(0, 1, len(share)), share, **style)
            places = [((low + high) / 2, kl) for low, high, kl in by_position(table.kl[width])]
            position.plot(*zip(*places, strict=True), marker="o", markersize=4, **style)
            entropy.plot(*zip(*by_entropy(table, width), strict=True), marker="o", markersize=4, **style)
        spread.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle=(0, (4, 3)))
        spread.set_title("spread over tokens", loc="left")
        spread.set_xlabel("share of the tokens, hardest first")
        spread.set_ylabel("share of the KL that they hold")
        for axis in (spread.xaxis, spread.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        _dress_log(position, "over positions", "judged token of the window", [kl.mean() for kl in table.kl.values()])
        _dress_log(
            entropy,
            "by the reference's entropy",
            "entropy of the token's own output (nats)",
            [kl for width in widths for _, kl in by_entropy(table, width)],
        )
        _draw_origins(past, origin)
        spread.grid(linewidth=0.8)
        title_above(figure, title)
        caption_below(figure, caption)
        figure.legend(*spread.get_legend_handles_labels(), loc="outside right upper")
        save_figure(figure, path)


def _draw_origins(axes: Axes, origin: dict[int, Origin]) -> None:
    axes.set_title("where it comes from", loc="left")
    if not origin:
        axes.set_axis_off()
        return
    places = np.arange(len(origin))
    for index, (name, label, colour) in enumerate(
        (
            ("own_step", "own step only, clean past", "#56B4E9"),
            ("past", "past only, clean step", "#E69F00"),
            ("both", "both: what decoding gives", "#5b5b5b"),
        )
    ):
        heights = [getattr(one, name) for one in origin.values()]
        axes.bar(places + 0.26 * (index - 1), heights, 0.24, color=colour, label=label)
    axes.set_xticks(places, [f"{width} bits" for width in origin])
    axes.set_ylabel("mean output KL (nats, log scale)")
    axes.legend(fontsize=9)
    _log_axis(axes, [value for one in origin.values() for value in (one.own_step, one.past, one.both) if value > 0])
    axes.grid(axis="y", linewidth=0.8)


def _dress_log(axes: Axes, title: str, label: str, values: Sequence[float]) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(label)
    axes.set_ylabel("mean output KL (nats, log scale)")
    _log_axis(axes, [value for value in values if value > 0])
    axes.grid(linewidth=0.8)


def _by_width(rows: Sequence[PartRow]) -> tuple[Array, list[str], list[str]]:
    parts = list(dict.fromkeys(row.part for row in rows))
    widths = sorted({row.bit_width for row in rows})
    grid = np.full((len(parts), len(widths)), np.nan)
    for row in rows:
        grid[parts.index(row.part), widths.index(row.bit_width)] = row.output_kl_nats
    return grid, parts, [str(width) for width in widths]


def _heatmap(axes: Axes, grid: Array, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Colours on a log scale; numbers in the cells where they fit. What is 0, the reference itself, stays white."""
    axes.set_title(title, loc="left", fontsize=10.5)
    shown = np.where(grid > 0, grid, np.nan)
    if not np.isfinite(shown).any():
        axes.set_axis_off()
        return
    low = float(np.nanmin(shown))
    high = max(float(np.nanmax(shown)), 1.001 * low)
    norm = LogNorm(low, high)
    mesh = axes.imshow(shown, aspect="auto", cmap="YlOrRd", norm=norm, interpolation="nearest")
    step = -(-len(rows) // _MOST_LABELS)
    axes.set_yticks(range(0, len(rows), step), list(rows[::step]), fontsize=8.5)
    axes.set_xticks(range(len(columns)), list(columns), rotation=0 if max(map(len, columns)) < 6 else 60, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(columns) <= _MOST_NUMBERS and len(rows) <= _MOST_LABELS:
        for (row, column), value in np.ndenumerate(shown):
            if np.isfinite(value):
                colour = "white" if norm(value) > 0.7 else "#333333"
                axes.text(column, row, _short(value), ha="center", va="center", fontsize=7, color=colour)
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
    label_log_axis(bar.ax, [low, high])
    bar.ax.tick_params(labelsize=8)
    bar.set_label("mean output KL (nats)", fontsize=8.5)
    bar.outline.set_visible(False)


def _short(value: float) -> str:
    """Thousandths of a nat with two digits, as wide as a narrow cell."""
    thousandths = 1e3 * value
    return f"{thousandths:.0f}" if thousandths >= 9.95 else f"{thousandths:#.2g}".removeprefix("0").rstrip(".")


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.set_yscale("log")
    label_log_axis(axes, values)
