"""The learning curve of a run: the validation score of every seed's networks by env step, start and static marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flexquant_rl.agents.evaluation.drawing import GREY, STYLE, caption_below, save_figure, title_above
from flexquant_rl.agents.policies.families import PPO, STATIC

Curve = Sequence[tuple[int, float]]
"""`(env steps, score)` of each network that was validated, in order, the first one before any update."""

_MIN_SPAN = 1e-6


def plot_learning_curve(curves: Mapping[int, Curve], path: Path, *, title: str, caption: str) -> None:
    """Draws the validation score of every seed and their mean by env step, as a PNG.

    Static is the line at zero, as a score is reward over static; the level of the start, the mean over seeds of the
    clones' scores, is dashed. A ring is the network of a seed that validation chose, the one that is exported and
    judged.

    Args:
        curves: The curve of each training seed.
        path: Path of the PNG, written atomically.
        title: One line.
        caption: The conditions (model, text, seeds), wrapped below the axes.

    Raises:
        ValueError: If there is no curve, or an empty one.
    """
    if not curves or not all(curves.values()):
        raise ValueError(f"a learning curve needs at least one network of every seed, not {dict(curves)}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.9), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        axes = figure.subplots()
        axes.grid(axis="y", linewidth=0.8)
        axes.axhline(0, color=STATIC.colour, linewidth=1.6, zorder=2)
        start = float(np.mean([curve[0][1] for curve in curves.values()]))
        axes.axhline(start, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        for curve in curves.values():
            _draw_seed(axes, curve, is_alone=len(curves) == 1)
        if len(curves) > 1:
            axes.plot(*_mean(curves), color=PPO.colour, linewidth=2.6, marker="o", markersize=5, zorder=5)
        _dress(axes, curves)
        title_above(figure, title)
        caption_below(figure, caption)
        figure.legend(handles=_handles(len(curves)), loc="outside right upper", labelspacing=0.9, handlelength=2.4)
        save_figure(figure, path)


def _draw_seed(axes: Axes, curve: Curve, *, is_alone: bool) -> None:
    steps, scores = zip(*curve, strict=True)
    shape = {"linewidth": 2.6, "markersize": 5} if is_alone else {"linewidth": 1.0, "markersize": 3, "alpha": 0.55}
    axes.plot(steps, scores, color=PPO.colour, marker="o", zorder=4, **shape)  # type: ignore[arg-type]
    axes.plot(*max(curve, key=lambda point: point[1]), **_ring(), zorder=6)  # type: ignore[arg-type]


def _ring() -> dict[str, object]:
    return {
        "marker": "o",
        "markersize": 10,
        "markerfacecolor": "none",
        "markeredgecolor": "#222222",
        "markeredgewidth": 1.3,
        "linestyle": "none",
    }


def _mean(curves: Mapping[int, Curve]) -> tuple[list[int], list[float]]:
    """Env steps at which every seed was validated, and the mean score there."""
    by_step = [dict(curve) for curve in curves.values()]
    common = sorted(set.intersection(*(set(scores) for scores in by_step)))
    return common, [float(np.mean([scores[step] for scores in by_step])) for step in common]


def _dress(axes: Axes, curves: Mapping[int, Curve]) -> None:
    scores = [score for curve in curves.values() for _, score in curve if math.isfinite(score)] + [0.0]
    low, high = min(scores), max(scores)
    margin = 0.12 * max(high - low, _MIN_SPAN)
    axes.set_ylim(low - margin, high + margin)
    axes.margins(x=0.03)
    axes.set_xlabel("env steps of a seed (tokens decoded in training)")
    axes.set_ylabel("validation reward over static\n(full-width steps per token)")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(_signed))
    better = axes.text(
        0.985, 0.03, "better \N{UPWARDS ARROW}", transform=axes.transAxes, ha="right", fontsize=10, color="#8a8a8a"
    )
    better.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _signed(value: float, _: object) -> str:
    return "0" if abs(value) < _MIN_SPAN / 10 else f"{value:+.6f}".rstrip("0").rstrip(".")


def _handles(num_seeds: int) -> list[Line2D]:
    bold = {"color": PPO.colour, "linewidth": 2.6, "marker": "o", "markersize": 5}
    learned = [Line2D([], [], label=PPO.label, **bold)]  # type: ignore[arg-type]
    if num_seeds > 1:
        thin = {"color": PPO.colour, "linewidth": 1.0, "marker": "o", "markersize": 3, "alpha": 0.55}
        learned = [
            Line2D([], [], label=f"{PPO.label}\nmean of {num_seeds} seeds", **bold),  # type: ignore[arg-type]
            Line2D([], [], label="each seed", **thin),  # type: ignore[arg-type]
        ]
    return [
        *learned,
        Line2D([], [], label="network that\nvalidation chose", **_ring()),  # type: ignore[arg-type]
        Line2D([], [], label="start (clone)", color=GREY, linewidth=1.2, linestyle=(0, (4, 3))),
        Line2D([], [], label="static allocation", color=STATIC.colour, linewidth=1.6),
    ]
