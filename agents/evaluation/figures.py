"""The pictures of an evaluation: quality against time at the budgets, and the bit-widths of one sequence by token."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from flexquant_rl.agents.evaluation.comparison import (
    Clock,
    SeedGroup,
    drawable_rows,
    families,
    has_time,
    ratios_to_static,
    seed_groups,
    setting_of,
)
from flexquant_rl.agents.evaluation.drawing import (
    GREY,
    STYLE,
    caption_below,
    decimal_label,
    label_log_axis,
    save_figure,
    title_above,
)
from flexquant_rl.agents.evaluation.resampling import ENOUGH_SEEDS, Array
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.policies.drafts import Drafts
from flexquant_rl.agents.policies.families import STATIC
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.unbound import Family

_TOKEN_FONT = "DejaVu Sans Mono"
_MAX_TOKEN_LABELS = 64
_MAX_UNIT_LABELS = 26
_MAX_TOKEN_CHARACTERS = 10
_KL_DECADES = 5
_MAX_RATIO_PERCENT = 60.0
_PAIRED = f"; in the lower panels paired with static, from {ENOUGH_SEEDS} training seeds on over the seeds too."
_LOWEST_ZORDER = 3  # above the grid and the line at zero; each family is drawn above those before it
_SPEEDS = ((0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8), tuple(tenth / 10 for tenth in range(5, 31)))
"""Ticks, and finer ones where hardly any of them is in sight."""
_ENOUGH_SPEEDS = 3
_LABEL_SHARE = 0.07  # of the axis, that a label of a speed takes
_STATIC_FRONT: dict[str, Any] = {"color": STATIC.colour, "linewidth": 1.2, "linestyle": (0, (4, 2))}


def plot_pareto(rows: Sequence[EvalRow], path: Path, *, title: str, caption: str, source: str = "roofline") -> None:
    """Draws output KL against the share of full-width time, modelled on the left and measured on the right, as a PNG.

    One colour and marker for each family, its points at the time that it took on the text of the rows, bars for the
    95% intervals over documents. Fixed widths and drafts have their bits beside them, those of drafts are their
    verify width. Where static has no rows, the front is drawn that the others are compared with. Where there are
    several training seeds, each has a thin line and their mean a bold one; oracles are points. Lines that span
    decades hide the differences that matter, so panels below show each family's KL relative to what static reaches
    in the same time. What was not timed has no panel on the right. A policy whose KL is not positive (the reference
    itself) has no place on a logarithmic axis: the caption names it.

    Args:
        rows: Rows of any families; those without a time are left out. Drafts have no modelled one.
        path: Path of the PNG, written atomically.
        title: One line.
        caption: The conditions (model, text, machine, seeds), wrapped below the axes; what the bars are is added.
        source: Source of the latency table, for the label of the x-axis.
    """
    drawable = drawable_rows(rows)
    hidden = sorted({row.policy for row in rows if has_time(row)} - {row.policy for row in drawable})
    if hidden:
        caption = f"{caption.rstrip(' .')}. Not drawn, as the KL is 0: {', '.join(hidden)}."
    modelled = [row for row in drawable if row.time_share_modelled is not None]
    timed = [row for row in drawable if row.time_share_measured is not None]
    columns: dict[Clock, list[EvalRow]] = {"modelled": modelled} if modelled or not timed else {}
    columns |= {"measured": timed} if timed else {}
    drawn = families(drawable)
    if any(_is_of_drafts(name) for name in drawn):
        caption = f"{caption.rstrip(' .')}. Drafts, at the bits that verify, are timed by the clock alone."
    has_ratios = any(len(_ratio_points(drawable, name, "modelled")) for name in drawn)
    caption = (
        f"{caption.rstrip(' .')}. Bars: 95% bootstrap intervals over test documents{_PAIRED if has_ratios else '.'}"
    )
    labels: dict[Clock, str] = {
        "modelled": f"share of full-width time, modelled ({source})",
        "measured": "share of full-width time, by the clock",
    }
    with matplotlib.rc_context(STYLE):
        size = (8 if len(columns) == 1 else 13, 7.0 if has_ratios else 5.6)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        panels = figure.subplots(
            1 + has_ratios,
            len(columns),
            sharex="col",
            sharey="row",
            squeeze=False,
            height_ratios=(3, 1.35) if has_ratios else None,
        )
        for column, (clock, shown) in enumerate(columns.items()):
            _draw_static_front(panels[0, column], shown, clock)
            for zorder, family in enumerate(families(shown).values(), start=_LOWEST_ZORDER):
                _draw_family(panels[0, column], shown, family, clock, zorder)
                _label_widths(panels[0, column], shown, family, clock)
            _dress_fronts(panels[0, column], shown)
            panels[-1, column].set_xlabel(labels[clock])
        panels[0, 0].set_ylabel("output KL from the reference (nats, log scale)")
        if has_ratios:
            ranges = [_draw_ratios(axes, *one, drawn) for axes, one in zip(panels[1], columns.items(), strict=True)]
            _dress_ratios(panels[1, 0], ranges)
        title_above(figure, title)
        caption_below(figure, caption)
        figure.align_ylabels()
        handles = [_legend_handle(drawable, family) for family in drawn.values()]
        if any(len(_static_front(shown, clock)) for clock, shown in columns.items()):
            handles.insert(0, Line2D([], [], label="static (best in\nequal time)", **_STATIC_FRONT))
        figure.legend(handles=handles, loc="outside right upper", labelspacing=0.8, handlelength=2.6)
        save_figure(figure, path)


def plot_bits(
    widths: ArrayLike,
    tokens: Sequence[str],
    unit_names: Sequence[str],
    path: Path,
    *,
    title: str,
    subtitle: str = "",
    output_kl_nats: ArrayLike,
    bit_widths: Sequence[int] | None = None,
) -> None:
    """Draws the bit-width of every token and unit of one sequence, and the output KL of each token below.

    A PNG 1650 pixels wide, higher for more units. White space in tokens is made visible; above 64 tokens only every
    n-th is labelled.

    Args:
        widths: `[T, U]` integers.
        tokens: T decoded tokens.
        unit_names: U names, first layer first; the last (the head) is drawn on top.
        path: Path of the PNG, written atomically.
        title: One line.
        subtitle: One line below it, which sequence it is and under what.
        output_kl_nats: `[T]`, nats; values that are not positive are on the axis, NaN leaves a gap.
        bit_widths: The stored widths, for the colours; default: those that occur.

    Raises:
        ValueError: If the shapes disagree, or if a width is not among `bit_widths`.
    """
    chosen = np.asarray(widths, dtype=np.int64)
    kl = np.asarray(output_kl_nats, dtype=np.float64)
    if chosen.shape != (len(tokens), len(unit_names)) or kl.shape != (len(tokens),) or not chosen.size:
        raise ValueError(
            f"widths {chosen.shape} and output_kl_nats {kl.shape} must be [T, U] and [T] for {len(tokens)} tokens and "
            f"{len(unit_names)} units, at least one each"
        )
    stored = np.unique(chosen if bit_widths is None else np.array(bit_widths, dtype=np.int64))
    if not np.isin(chosen, stored).all():
        raise ValueError(f"widths {np.setdiff1d(chosen, stored).tolist()} are not stored; stored are {stored.tolist()}")
    heat_height = float(np.clip(0.3 * len(unit_names), 1.2, 6.5))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, heat_height + 2.9), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(60, 1), height_ratios=(heat_height, 1.05))
        heat = figure.add_subplot(grid[0, 0])
        below = figure.add_subplot(grid[1, 0], sharex=heat)
        _draw_widths(heat, figure.add_subplot(grid[0, 1]), chosen, stored)
        _label_units(heat, unit_names)
        _draw_token_kl(below, kl)
        _label_tokens(below, tokens)
        title_above(figure, title)
        heat.set_title(subtitle, loc="left", fontsize=9.5, color=GREY, pad=7)
        save_figure(figure, path)


def _seeds(rows: Sequence[EvalRow], family: str) -> list[int]:
    return sorted({row.seed for row in rows if row.family == family and row.seed is not None})


def _front_line(rows: Sequence[EvalRow], family: Family) -> dict[str, Any]:
    """Line style of a family: bold for a mean over seeds, none where points stand alone."""
    return {
        "color": family.colour,
        "linewidth": 2.4 if len(_seeds(rows, family.name)) > 1 else 1.4,
        "linestyle": "-" if family.draws == "curve" else "none",
    }


def _marker(family: Family) -> dict[str, Any]:
    is_cross = family.marker == "x"
    return {
        "marker": family.marker,
        "markersize": {"*": 13, "P": 9}.get(family.marker, 6.5),
        "markeredgecolor": family.colour if is_cross else "white",
        "markeredgewidth": 1.6 if is_cross else 0.8,
    }


def _legend_handle(rows: Sequence[EvalRow], family: Family) -> Line2D:
    num_seeds = len(_seeds(rows, family.name))
    label = f"{family.label}\nmean of {num_seeds} seeds" if num_seeds > 1 else family.label
    return Line2D([], [], label=label, **_front_line(rows, family), **_marker(family))


def _draw_family(axes: Axes, rows: Sequence[EvalRow], family: Family, clock: Clock, zorder: float) -> None:
    seeds = _seeds(rows, family.name)
    for seed in seeds if len(seeds) > 1 else ():
        own = seed_groups([row for row in rows if row.seed == seed], family.name)
        axes.plot(*_points(own, clock), color=family.colour, linewidth=0.8, alpha=0.45, zorder=zorder - 0.5)
    groups = seed_groups(rows, family.name)
    axes.plot(*_points(groups, clock), zorder=zorder, **_front_line(rows, family))
    found = [(_time_share(group, clock), group.mean("output_kl_nats"), *group.kl_interval()) for group in groups]
    x, kl, low, high = np.array(found, dtype=np.float64).T
    _draw_points(axes, family, x, kl, np.maximum([kl - low, high - kl], 0), zorder)


def _is_of_drafts(family: str) -> bool:
    return family.partition(":")[0] == Drafts.family.name


def _label_widths(axes: Axes, rows: Sequence[EvalRow], family: Family, clock: Clock) -> None:
    """Writes the bits beside what runs at one width, or verifies at one; of several at one width beside the fastest."""
    fastest: dict[float, tuple[float, float]] = {}
    for row in rows:
        is_at_one = _is_of_drafts(family.name) or (family.name == Fixed.family.name and row.time_budget is None)
        share = row.time_share_modelled if clock == "modelled" else row.time_share_measured
        if row.family == family.name and is_at_one and share is not None:
            fastest[row.mean_bit_width] = min(
                fastest.get(row.mean_bit_width, (math.inf, 0)), (share, row.output_kl_nats)
            )
    for width, point in fastest.items():
        axes.annotate(
            f"{width:g}",
            point,
            xytext=(-7, -10) if _is_of_drafts(family.name) else (6, 4),  # the sides that fronts leave free
            textcoords="offset points",
            ha="right" if _is_of_drafts(family.name) else "left",
            fontsize=9,
            fontweight="bold",
            color=family.colour,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=20,
        )


def _static_front(rows: Sequence[EvalRow], clock: Clock) -> Array:
    """`[P, 2]` time share and KL of static where rows were compared with it; none where it has rows of its own."""
    found: dict[float, float] = {}  # by KL: more time than its best allocation takes changes nothing
    for row in rows:
        share, side = (
            (row.time_share_modelled, row.static_kl_nats)
            if clock == "modelled"
            else (row.time_share_measured, row.static_kl_nats_measured)
        )
        kl = 0.0 if side is None else float(np.mean(side))
        if share is not None and kl > 0:
            found[kl] = min(found.get(kl, math.inf), share)
    is_drawn = len(found) > 1 and all(row.family != STATIC.name for row in rows)
    front = sorted((share, kl) for kl, share in found.items())
    return np.array(front if is_drawn else [], dtype=np.float64).reshape(-1, 2)


def _draw_static_front(axes: Axes, rows: Sequence[EvalRow], clock: Clock) -> None:
    axes.plot(*_static_front(rows, clock).T, zorder=_LOWEST_ZORDER - 0.5, **_STATIC_FRONT)


def _draw_points(axes: Axes, family: Family, x: Array, y: Array, bars: Array, zorder: float) -> None:
    axes.errorbar(
        x,
        y,
        yerr=bars,
        color=family.colour,
        linestyle="none",
        elinewidth=1.1,
        capsize=2.5,
        zorder=zorder + 0.2,
        **_marker(family),
    )


def _ratio_points(rows: Sequence[EvalRow], family: str, clock: Clock) -> Array:
    """`[P, 4]`: time share, percent by which the KL differs from that of static, and its 95% interval."""
    ratios = ratios_to_static(rows, family, clock)
    points = []
    for group in seed_groups(rows, family):
        ratio = ratios.get(setting_of(group.rows[0]))
        if ratio is not None:
            ends = [ratio.value if end is None else end for end in (ratio.low, ratio.high)]  # one document: no bars
            points.append((_time_share(group, clock), *(100 * math.expm1(value) for value in (ratio.value, *ends))))
    return np.array(points, dtype=np.float64).reshape(-1, 4)


def _draw_ratios(axes: Axes, clock: Clock, rows: Sequence[EvalRow], drawn: Mapping[str, Family]) -> tuple[float, float]:
    """Draws KL relative to static and returns the percents that are to be in sight."""
    axes.axhline(0, color=STATIC.colour, linewidth=1.6, zorder=2)
    lowest, highest, above = -5.0, 5.0, []
    for zorder, (name, family) in enumerate(drawn.items(), start=_LOWEST_ZORDER):
        points = _ratio_points(rows, name, clock)
        if not len(points):
            continue
        points = points[points[:, 0].argsort()]
        x, percent, low, high = points.T
        if percent.min() > _MAX_RATIO_PERCENT:
            above.append(family.label)
            continue
        seeds = _seeds(rows, name)
        for seed in seeds if len(seeds) > 1 else ():
            own = _ratio_points([row for row in rows if row.family == name and row.seed == seed], name, clock)
            axes.plot(own[:, 0], own[:, 1], color=family.colour, linewidth=0.8, alpha=0.45)
        axes.plot(x, percent, zorder=zorder, **_front_line(rows, family))
        _draw_points(axes, family, x, percent, np.maximum([percent - low, high - percent], 0), zorder)
        lowest, highest = min(lowest, low.min()), max(highest, high.max())
    axes.grid(which="major", linewidth=0.8)
    if above:
        axes.set_title(f"above this range: {', '.join(above)}", loc="right", fontsize=8.5, color=GREY)
    return lowest, min(highest, _MAX_RATIO_PERCENT)


def _dress_ratios(axes: Axes, ranges: Sequence[tuple[float, float]]) -> None:
    """Labels the percents of panels that share them, and shows what each of them needs."""
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    margin = 0.08 * (highest - lowest)
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_ylabel("KL against static\nin equal time")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0f}%" if value else "0"))


def _time_share(group: SeedGroup, clock: Clock) -> float:
    mean = group.mean(f"time_share_{clock}")
    return math.nan if mean is None else mean


def _points(groups: Sequence[SeedGroup], clock: Clock) -> tuple[Array, Array]:
    """Time shares and KL of some groups along their front, the fastest of those whose KL is the same."""
    fastest: dict[float, float] = {}
    for group in groups:
        kl = group.mean("output_kl_nats")
        assert kl is not None, "every row has one"
        fastest[kl] = min(fastest.get(kl, math.inf), _time_share(group, clock))
    along = sorted(fastest)
    return np.array([fastest[kl] for kl in along], dtype=np.float64), np.array(along, dtype=np.float64)


def _apart(speeds: Sequence[float], span: float) -> list[float]:
    """Speeds from the slowest on whose time shares are far enough apart for their labels, on an axis of such a span."""
    kept: list[float] = []
    for speed in sorted(speeds):
        if not kept or 1 / kept[-1] - 1 / speed >= _LABEL_SHARE * span:
            kept.append(speed)
    return kept


def _dress_fronts(axes: Axes, rows: Sequence[EvalRow]) -> None:
    axes.set_yscale("log")
    axes.margins(x=0.04, y=0.06)
    label_log_axis(axes, [row.output_kl_nats for row in rows])
    axes.grid(which="major", linewidth=0.8)
    speed = axes.secondary_xaxis("top", functions=(_inverse, _inverse))
    left, right = axes.get_xlim()
    coarse, fine = ([one for one in ticks if left < 1 / one < right] for ticks in _SPEEDS)
    speed.set_xticks(_apart(coarse if len(coarse) >= _ENOUGH_SPEEDS else fine, right - left))
    speed.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}\N{MULTIPLICATION SIGN}"))
    speed.xaxis.set_minor_locator(NullLocator())
    speed.tick_params(length=3, labelsize=9, colors=GREY)
    speed.set_xlabel("speed over the largest width", fontsize=9, color=GREY)
    speed.spines[:].set_visible(False)
    axes.text(
        0.015, 0.03, "better \N{SOUTH WEST ARROW}", transform=axes.transAxes, ha="left", fontsize=10, color="#8a8a8a"
    )


def _inverse(values: Any) -> Any:
    """Speed of a share of the time, and the other way round."""
    return 1 / np.maximum(np.asarray(values, dtype=np.float64), 1e-9)


def _draw_widths(axes: Axes, bar_axes: Axes, widths: NDArray[np.int64], stored: NDArray[np.int64]) -> None:
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.02, 0.98, max(len(stored), 2)))[: len(stored)]
    num_tokens, num_units = widths.shape
    mesh = axes.pcolormesh(
        np.arange(num_tokens + 1) - 0.5,
        np.arange(num_units + 1) - 0.5,
        np.searchsorted(stored, widths).T,
        cmap=ListedColormap(list(map(tuple, shades))),
        norm=BoundaryNorm(np.arange(len(stored) + 1) - 0.5, len(stored)),
        edgecolors="white" if num_tokens <= 2 * _MAX_TOKEN_LABELS else "face",
        linewidth=0.5 if num_tokens <= 2 * _MAX_TOKEN_LABELS else 0,
    )
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(mesh, cax=bar_axes, ticks=np.arange(len(stored)).tolist(), drawedges=True)
    bar.ax.set_yticklabels([str(width) for width in stored])
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.dividers.set(color="white", linewidth=1.2)
    bar.set_label("bit-width", labelpad=6)


def _label_units(axes: Axes, unit_names: Sequence[str]) -> None:
    """Every name, or every n-th and the last where there are too many."""
    last = len(unit_names) - 1
    step = math.ceil(len(unit_names) / _MAX_UNIT_LABELS)
    shown = [index for index in range(0, last + 1, step) if index == last or last - index >= step] + [last]
    shown = sorted(set(shown))
    axes.set_yticks(shown, [unit_names[index] for index in shown], fontsize=9)


def _draw_token_kl(axes: Axes, kl: Array) -> None:
    finite = kl[np.isfinite(kl) & (kl > 0)]
    top = float(finite.max()) if finite.size else 1.0
    floor = max(float(finite.min()) / 2 if finite.size else 0.1, top / 10**_KL_DECADES)
    heights = np.where(np.isnan(kl), np.nan, np.clip(kl, floor, top))
    edges = np.arange(len(kl) + 1) - 0.5
    for begin, end in _runs(~np.isnan(heights)):
        axes.stairs(heights[begin:end], edges[begin : end + 1], baseline=floor, fill=True, color="#D55E00", alpha=0.25)
        axes.stairs(heights[begin:end], edges[begin : end + 1], baseline=None, color="#D55E00", linewidth=1.3)
    axes.set_yscale("log")
    axes.set_ylim(floor, top * 1.6)
    axes.set_ylabel("output KL\n(nats, log)", fontsize=9.5)
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(FuncFormatter(decimal_label))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(axis="y", linewidth=0.8)


def _runs(present: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive True."""
    steps = np.flatnonzero(np.diff(np.concatenate([[False], present, [False]]).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in steps.reshape(-1, 2)]


def _label_tokens(axes: Axes, tokens: Sequence[str]) -> None:
    step = math.ceil(len(tokens) / _MAX_TOKEN_LABELS)
    shown = range(0, len(tokens), step)
    size = 9 if len(shown) > 40 else 9.5
    labels = [visible_token(tokens[index]) for index in shown]
    axes.set_xticks(list(shown), labels, rotation=90, fontsize=size, family=_TOKEN_FONT)
    axes.tick_params(axis="x", length=2.5, pad=2)
    axes.set_xlim(-0.5, len(tokens) - 0.5)
    every = f", every {step} tokens labelled" if step > 1 else ""
    dot, times, line = "\N{MIDDLE DOT}", "\N{MULTIPLICATION SIGN}", "\N{RETURN SYMBOL}"
    axes.set_xlabel(f"token ({dot} space, {dot}{times}4 four spaces, {line} new line{every})", fontsize=9.5)


def visible_token(token: str) -> str:
    """A token as a tick label: white space visible, at most 10 characters, no glyph that the font lacks."""
    has_glyph = font_manager.get_font(font_manager.findfont(_TOKEN_FONT)).get_char_index
    text = token.replace("\r\n", "\n").replace("\t", "\N{RIGHTWARDS ARROW TO BAR}").replace("\n", "\N{RETURN SYMBOL}")
    text = re.sub(" {4,}", lambda run: f"\N{MIDDLE DOT}\N{MULTIPLICATION SIGN}{len(run[0])}", text)
    text = text.replace(" ", "\N{MIDDLE DOT}")
    text = "".join(c if c.isprintable() and has_glyph(ord(c)) else "\N{WHITE SQUARE}" for c in text)
    if len(text) > _MAX_TOKEN_CHARACTERS:
        text = text[: _MAX_TOKEN_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return text or "\N{EMPTY SET}"
