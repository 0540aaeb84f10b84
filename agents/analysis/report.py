"""The report of an analysis: from the rows of a directory to Markdown and pictures, whatever of them is there."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from flexquant_rl.agents.analysis.figures import plot_sensitivity, plot_strategies, plot_tokens
from flexquant_rl.agents.analysis.peer_report import line_at, ms_text, peer_findings, peer_method, peer_sections
from flexquant_rl.agents.analysis.rows import (
    PartRow,
    PastRow,
    Plan,
    RowStore,
    StrategyRow,
    TimeRow,
    TokensRow,
    WindowRow,
    times_by_row,
)
from flexquant_rl.agents.analysis.strategies import is_peer, recipe_text
from flexquant_rl.agents.analysis.token_loss import Origin, TokenTable, origins, share_of_top
from flexquant_rl.agents.analysis.token_report import TOKENS_PICTURE, focus_width, kl_text, token_sections
from flexquant_rl.agents.evaluation.markdown import bullets, escape, facts_table, table_of, table_row
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import replacing

REPORT_FILE = "report.md"
STRATEGIES_PICTURE, SENSITIVITY_PICTURE = "strategies.png", "sensitivity.png"


def write_analysis(store: RowStore, examined: str | None = None) -> Path:
    """Makes report and pictures from the rows of a directory.

    Args:
        store: The rows.
        examined: The strategy whose parts are shown; default: that which was looked into last.

    Returns:
        The path of the report.

    Raises:
        InputError: If there is no analysis, none of its strategies is finished, or a file is damaged.
    """
    plan = store.read_plan()
    every = store.read(StrategyRow)
    rows = [row for row in every if not is_peer(row.strategy)]
    if not rows:
        raise InputError(f"{store.directory}: no strategy is finished yet; run fq analyse until it ends")
    windows, parts, past = store.read(WindowRow), store.read(PartRow), store.read(PastRow)
    times = store.read(TimeRow)
    names = list(dict.fromkeys(row.strategy for row in rows))
    examined = examined or (parts[-1].strategy if parts else names[-1])
    tokens = store.read(TokensRow)
    table = TokenTable.of(examined, windows, tokens)
    origin = origins(table, [row for row in past if row.strategy == examined])
    own_parts = [row for row in parts if row.strategy == examined]
    _draw(store.directory, plan, every, times, own_parts, table, origin, examined)
    sections = [
        f"# Quantisation of {_model(plan)}",
        "## In short",
        bullets([*_findings(plan, rows, own_parts, table, origin, examined), *peer_findings(every, times)]),
        *_strategy_sections(plan, rows, times),
        *peer_sections(every, times),
        *_source_section(plan, windows, tokens),
        *_part_sections(own_parts, examined),
        *token_sections(plan, table, origin, examined),
        "## What was run",
        facts_table(_facts(plan, rows, times, windows)),
        "## How it was measured",
        bullets([*_method(plan, own_parts, len({row.document for row in windows})), *peer_method(every, times)]),
    ]
    path = store.directory / REPORT_FILE
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _draw(
    directory: Path,
    plan: Plan,
    rows: Sequence[StrategyRow],
    times: Sequence[TimeRow],
    parts: Sequence[PartRow],
    table: TokenTable,
    origin: dict[int, Origin],
    examined: str,
) -> None:
    text = ", ".join(plan.text) or "held-out standard library"
    conditions = f"{_model(plan)}, {rows[0].num_tokens:,} tokens of {text}; KL against the {plan.reference} model."
    clock = f" Times: lean decoder, {times[0].num_threads} thread(s), {times[0].cpu}." if times else ""
    plot_strategies(
        rows,
        times,
        directory / STRATEGIES_PICTURE,
        title=f"{_model(plan)}: what each strategy loses, and what it reads",
        caption=f"{conditions} Points of a line: {_listed(plan.bit_widths)} bits. Bars: 95% bootstrap intervals over "
        f"documents.{clock}",
    )
    if parts:
        plot_sensitivity(
            parts,
            directory / SENSITIVITY_PICTURE,
            title=f"{_model(plan)}, {examined}: sensitivity of its parts",
            caption=f"Mean output KL when only this part is at the width and everything else at the reference "
            f"({plan.reference}); numbers in cells are thousandths of a nat. Text: {_sizes(parts)}.",
        )
    if table.lossy_widths():
        plot_tokens(
            table,
            origin,
            directory / TOKENS_PICTURE,
            title=f"{_model(plan)}, {examined}: which tokens lose",
            caption=conditions,
        )


def _findings(
    plan: Plan,
    rows: Sequence[StrategyRow],
    parts: Sequence[PartRow],
    table: TokenTable,
    origin: dict[int, Origin],
    examined: str,
) -> list[str]:
    """The result in sentences, each from the numbers below it."""
    found = []
    names = list(dict.fromkeys(row.strategy for row in rows))
    if len(names) > 1:
        best = [
            min((row for row in rows if row.bit_width == width), key=lambda row: row.output_kl_nats)
            for width in plan.bit_widths
        ]
        least = ", ".join(f"{row.bit_width} bits `{row.strategy}` ({kl_text(row.output_kl_nats)})" for row in best)
        found.append(f"Least output KL by width, in nats: {least}. Smaller groups read more bytes.")
        found += _equal_bytes(rows, names)
    found += [
        f"Of `{low.strategy}` {high.bit_width} bits lose more than {low.bit_width}: {kl_text(high.output_kl_nats)} "
        f"against {kl_text(low.output_kl_nats)} nats. The weights may have been made for this format."
        for name in names
        for low, high in _neighbours([row for row in rows if row.strategy == name])
        if high.output_kl_nats > low.output_kl_nats
    ]
    falls = [
        (low.output_kl_nats / high.output_kl_nats) ** (1 / (high.bit_width - low.bit_width))
        for low, high in _neighbours([row for row in rows if row.strategy == examined])
        if high.output_kl_nats > 0
    ]
    if falls:
        found.append(f"With every bit the KL of `{examined}` falls {statistics.geometric_mean(falls):.1f} times.")
    found += _part_findings(parts, plan.part_width)
    focus = focus_width(plan, table)
    if focus is not None:
        kl = table.kl[focus]
        found.append(
            f"At {focus} bits the hardest tenth of the tokens holds {share_of_top(kl, 0.1):.0%} of the KL, the easier "
            f"half {1 - share_of_top(kl, 0.5):.0%}."
        )
        if focus in origin:
            one = origin[focus]
            found.append(
                f"At {focus} bits a clean past leaves {one.own_step / one.both:.0%} of the KL, a clean step behind a "
                f"past of {focus} bits {one.past / one.both:.0%}."
            )
    return found


def _equal_bytes(rows: Sequence[StrategyRow], names: Sequence[str]) -> list[str]:
    """KL of each strategy over that of the first one at equal bytes, between the widths of both."""
    lines = {
        name: sorted((row.bytes_per_weight, math.log(row.output_kl_nats)) for row in rows if row.strategy == name)
        for name in names
        if all(row.output_kl_nats > 0 for row in rows if row.strategy == name)
    }
    if len(lines) < 2:
        return []
    base, *others = lines
    compared = []
    for name in others:
        gaps = [log_kl - between for at, log_kl in lines[name] if (between := line_at(lines[base], at)) is not None]
        if gaps:
            ratio = math.exp(statistics.mean(gaps))
            compared.append(f"`{name}` {100 * (ratio - 1):+.0f}%")
    return [f"KL against `{base}` at equal bytes per weight: {', '.join(compared)}."] if compared else []


def _part_findings(parts: Sequence[PartRow], width: int) -> list[str]:
    found = []
    for kind, words in (("matrices", "kind of matrix"), ("unit", "unit")):
        own = sorted((row for row in parts if row.kind == kind and row.bit_width == width), key=_per_weight)
        if len(own) > 1:
            most, least = own[-1], own[0]
            found.append(
                f"The most sensitive {words} at {width} bits, for its weights, is `{most.part}` "
                f"({kl_text(most.output_kl_nats)} nats with {most.num_weights / 1e6:.2g} M weights), the least "
                f"`{least.part}` ({kl_text(least.output_kl_nats)} with {least.num_weights / 1e6:.2g} M)."
            )
    return found


def _strategy_sections(plan: Plan, rows: Sequence[StrategyRow], times: Sequence[TimeRow]) -> list[str]:
    header = (
        "strategy",
        "bits",
        "output KL (nats)",
        "95% interval",
        "KL p99 (nats)",
        "perplexity",
        "top-1 agreement (%)",
        "bytes per weight",
        "ms per token, measured",
    )
    lines = [table_row(header), table_row([":--", *["--:"] * (len(header) - 1)])]
    clock = times_by_row(rows, times)
    for row in rows:
        timed = clock.get((row.strategy, row.bit_width))
        first = row.bit_width == plan.bit_widths[0]
        lines.append(
            table_row(
                [
                    f"`{row.strategy}`" if first else "",
                    str(row.bit_width),
                    kl_text(row.output_kl_nats),
                    f"{kl_text(row.output_kl_low)} to {kl_text(row.output_kl_high)}",
                    kl_text(row.output_kl_p99_nats),
                    f"{row.perplexity:#.4g}",
                    f"{100 * row.top1_agreement:.1f}",
                    f"{row.bytes_per_weight:.3f}",
                    ms_text(timed),
                ]
            )
        )
    names = list(dict.fromkeys(row.strategy for row in rows))
    seconds = {row.strategy: row.quantising_seconds for row in rows}
    took = {name: "not known" if math.isnan(seconds[name]) else f"{seconds[name]:.0f} s" for name in names}
    return [
        "## Strategies",
        f"![Output KL of every strategy by bytes and by time]({STRATEGIES_PICTURE})",
        f"Perplexity of the reference: {rows[0].reference_perplexity:#.4g}.",
        "\n".join(lines),
        bullets([f"`{name}`: {recipe_text(name)}; quantising took {took[name]}." for name in names]),
        "A step takes the same time in every strategy of one group size: they have one format, which is timed once.",
    ]


def _part_sections(parts: Sequence[PartRow], examined: str) -> list[str]:
    if not parts:
        return []
    kinds = [row for row in parts if row.kind == "matrices"]
    widths = sorted({row.bit_width for row in kinds})
    total = sum(row.num_weights for row in kinds if row.bit_width == widths[0])
    header = ["kind", "share of weights (%)", *(f"KL at {width} bits (nats)" for width in widths)]
    lines = [table_row(header), table_row([":--", *["--:"] * (len(header) - 1)])]
    for part in dict.fromkeys(row.part for row in kinds):
        own = {row.bit_width: row for row in kinds if row.part == part}
        share = f"{100 * own[widths[0]].num_weights / total:.1f}"
        lines.append(table_row([f"`{part}`", share, *(kl_text(own[width].output_kl_nats) for width in widths)]))
    return [
        f"## Sensitive parts of `{examined}`",
        f"![Output KL of units, kinds of matrices and single matrices]({SENSITIVITY_PICTURE})",
        "Only the matrices of one kind are at the width, in all layers; everything else is at the reference.",
        "\n".join(lines),
    ]


def _source_section(plan: Plan, windows: Sequence[WindowRow], tokens: Sequence[TokensRow]) -> list[str]:
    """KL by file, where there are several."""
    sources = {row.window: row.source for row in windows}
    names = list(dict.fromkeys(sources.values()))
    if len(names) < 2:
        return []
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in tokens:
        by_source = found.setdefault((row.strategy, row.bit_width), {})
        by_source.setdefault(sources[row.window], []).extend(row.output_kl_nats)
    return [
        "### By file",
        table_of(
            ("strategy", "bits", *(f"{escape(name)}: KL (nats)" for name in names)),
            [
                (f"`{strategy}`", str(width), *(kl_text(statistics.fmean(by_source[name])) for name in names))
                for (strategy, width), by_source in found.items()
                if width in (plan.bit_widths[0], plan.part_width) or is_peer(strategy)
            ],
        ),
    ]


def _model(plan: Plan) -> str:
    """The name without the folder, which is another one on every machine."""
    return Path(plan.model).name


def _facts(
    plan: Plan, rows: Sequence[StrategyRow], times: Sequence[TimeRow], windows: Sequence[WindowRow]
) -> dict[str, object]:
    sources: dict[str, int] = {}
    for row in windows:
        sources[row.source] = sources.get(row.source, 0) + 1
    fitted = plan.calibration or ("the held-out standard library",)
    facts: dict[str, object] = {
        "model": _model(plan),
        "nested weights": plan.num_weights,
        "reference": plan.reference,
        "analysed text (test split)": ", ".join(f"{name}: {count} windows" for name, count in sources.items()),
        "tokens of a window": plan.window_tokens,
        "tokens judged": rows[0].num_tokens,
        "documents": len({row.document for row in windows}),
        "timed decoder": f"lean, {times[0].num_threads} thread(s), {times[0].cpu}" if times else "none",
        "weights (sha256)": plan.model_sha256[:12],
    }
    if not plan.nested:
        weights = f", in shares {_listed(plan.calibration_weights)}" if plan.calibration_weights else ""
        facts["strategies are fitted to (training split)"] = ", ".join(fitted) + weights
        facts["steps of tuning"] = plan.tune_steps
    return facts


def _method(plan: Plan, parts: Sequence[PartRow], num_documents: int) -> list[str]:
    lines = [
        f"Every unit is at the same width, keys and values of the past included. KL is KL(reference || quantised) of "
        f"the next-token distribution after each token but the first of a window, in nats; the reference is "
        f"{plan.reference}.",
        f"Intervals resample the {num_documents} documents of the text, with replacement."
        + (" They are few, so the intervals are rough." if num_documents < 20 else ""),
        "Bytes per weight count the planes of the width, its scales and its offsets, over all nested weights.",
        "Times are wall clock of whole decode steps of the lean decoder halfway through a window, medians over rounds "
        "(quartiles in brackets) in which all group sizes and widths take turns; nothing in them is modelled. Where "
        "the lean decoder cannot run a model, nothing is timed.",
        "Equal bytes: where a strategy stands, the logarithm of the other's KL is taken from a straight line between "
        "its own widths; the mean is over widths.",
        "`past` and `own step` read each token again: at the width behind keys and values of the reference, and by the "
        "reference behind keys and values of the width.",
        "Entropy and probability of the token's own output are known too late to choose its width; those of the output "
        "before it are known in time.",
    ]
    if not plan.nested:
        lines.append("Strategies are fitted to training text, and judged on test text that they have not seen.")
    if parts:
        lines.append(f"Sensitivities are measured on the first tokens of the same windows: {_sizes(parts)}.")
    return lines


def _sizes(parts: Sequence[PartRow]) -> str:
    words = {"unit": "units", "matrices": "kinds of matrices", "matrix": "single matrices"}
    sizes = {row.kind: (row.num_windows, row.num_tokens) for row in parts}
    return ", ".join(
        f"{words[kind]} on {tokens} tokens of {windows} window{'s' if windows > 1 else ''}"
        for kind, (windows, tokens) in sizes.items()
    )


def _neighbours(rows: Sequence[StrategyRow]) -> list[tuple[StrategyRow, StrategyRow]]:
    ordered = sorted(rows, key=lambda row: row.bit_width)
    return list(itertools.pairwise(ordered))


def _per_weight(row: PartRow) -> float:
    return row.output_kl_nats / row.num_weights


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
