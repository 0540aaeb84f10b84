"""Tables and the report of policies of drafts: how acceptance is spread first, then what each policy made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flexquant_rl.agents.evaluation.draft_rows import DraftRow
from flexquant_rl.agents.evaluation.drafting import acceptance
from flexquant_rl.agents.evaluation.markdown import bullets, escape, table_of
from flexquant_rl.agents.evaluation.resampling import interval_method
from flexquant_rl.agents.evaluation.rows import REPORT_FILE, ROWS_FILE
from flexquant_rl.engine.control.drafting_rules import Lookups
from flexquant_rl.engine.files import replacing
from flexquant_rl.fq_env.trace_table import TraceTable

DRAFTS_PICTURE = "drafts.png"
_QUANTILES = (0.1, 0.5, 0.9)
_CONSOLE = ((">", 9, "modelled"), (">", 16, "95% CI"), (">", 8, "clock"), (">", 11, "validation"))
_NAME_COLUMNS = 46


def spread_tables(table: TraceTable, widths: Sequence[float]) -> dict[str, list[list[str]]]:
    """How often drafts agree, as tables by title, the first line of each its header: by place, by text, by prompt.

    Args:
        table: The sequences.
        widths: Width of each level.
    """
    counted = acceptance(table)
    by_place, by_sequence = counted.by_place(), counted.by_sequence()
    places = [["width", *(f"draft {place + 1}" for place in range(table.depth)), "all"]]
    for level, width in enumerate(widths):
        mean = counted.mean_by_level()[level]
        places.append([str(width), *(f"{share:.2f}" for share in by_place[level]), f"{mean:.2f}"])
    prompts = [["width", *(f"{100 * quantile:.0f}% of prompts below" for quantile in _QUANTILES)]]
    for level, width in enumerate(widths):
        values = np.quantile(by_sequence[:, level], _QUANTILES)
        prompts.append([str(width), *(f"{value:.2f}" for value in values)])
    lengths = [["width", "none agrees", f"1 to {table.depth - 1} agree", f"all {table.depth} agree"]]
    for level, width in enumerate(widths):
        agree = counted.lengths[:, level]
        shares = [np.mean(agree == 0), np.mean((agree > 0) & (agree < table.depth)), np.mean(agree == table.depth)]
        lengths.append([str(width), *("-" if not len(agree) else f"{share:.2f}" for share in shares)])
    found = {"By place in the round, of those after which all before agreed": places}
    sources = sorted(set(table.sources))
    if len(sources) > 1:
        texts = [["text", *(f"{width} bits" for width in widths)]]
        for source in sources:
            rows = [index for index, own in enumerate(table.sources) if own == source]
            kept, reached = counted.kept[rows].sum((0, 2)), counted.reached[rows].sum((0, 2))
            texts.append([source, *(f"{share:.2f}" for share in kept / np.maximum(reached, 1))])
        found["By text"] = texts
    return found | {"By prompt": prompts, "Drafts that agree, from every position": lengths}


def console_spread(table: TraceTable, widths: Sequence[float]) -> str:
    """The first of these tables in plain text."""
    title, lines = next(iter(spread_tables(table, widths).items()))
    return f"acceptance of drafts. {title}:\n" + "\n".join(" ".join(f"{cell:>8}" for cell in line) for line in lines)


def console_drafts(rows: Sequence[DraftRow]) -> str:
    """The rows in plain ASCII: speeds over plain decoding at the largest width."""
    header = f"{'policy':{_NAME_COLUMNS}}" + " ".join(f"{name:{side}{width}}" for side, width, name in _CONSOLE)
    lines = [header, "-" * len(header)]
    for row in rows:
        cells = [
            f"{row.speedup_modelled:.3f}",
            f"{row.speedup_low:.3f} .. {row.speedup_high:.3f}",
            _number(row.speedup_measured),
            _number(row.speedup_validation),
        ]
        name = _name(row)
        name = name if len(name) < _NAME_COLUMNS else name[: _NAME_COLUMNS - 4] + "..."
        columns = (f"{cell:{side}{width}}" for cell, (side, width, _) in zip(cells, _CONSOLE, strict=True))
        lines.append(f"{name:{_NAME_COLUMNS}}" + " ".join(columns))
    return "\n".join(lines) + "\n"


def write_draft_report(
    run_dir: Path,
    *,
    rows: Sequence[DraftRow],
    sentences: Sequence[str],
    facts: Mapping[str, object],
    table: TraceTable,
    widths: Sequence[float],
) -> None:
    """Writes `report.md` beside the picture and the rows.

    Args:
        run_dir: The run.
        rows: Every policy.
        sentences: Results in words.
        facts: What was run: name -> value.
        table: Test sequences, for the spread of acceptance.
        widths: Width of each level.
    """
    parts = ["# Policies of drafts: evaluation", "## How acceptance is spread"]
    parts.append(
        "What a controller can add lies in this spread: where drafts agree evenly, a fixed length is as good as any "
        "choice. Shares are of the test sequences."
    )
    for title, lines in spread_tables(table, widths).items():
        parts += [f"{title}:", _markdown(lines)]
    parts += ["## Result", _bullets(sentences)]
    if (run_dir / DRAFTS_PICTURE).is_file():
        parts.append(f"![Speed of every policy, and acceptance by place in the round]({DRAFTS_PICTURE})")
    parts += [
        "## What was run",
        _markdown([["what", "value"], *([name, _said(value)] for name, value in facts.items())]),
    ]
    parts += ["## How it was compared", _bullets(_method(rows, table))]
    parts += ["## Every policy", _markdown(_table(rows))]
    parts.append(f"One line for each policy and seed, with the time of each sequence: [{ROWS_FILE}]({ROWS_FILE}).")
    with replacing(run_dir / REPORT_FILE) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _table(rows: Sequence[DraftRow]) -> list[list[str]]:
    found = [
        [
            *("policy", "speed, cost table", "95% CI over documents", "speed, clock", "cost table, the clock's texts"),
            *("on validation sequences", "tokens of a pass", "drafts per token", "accepted"),
        ]
    ]
    for row in rows:
        accepted = "" if row.accepted_share is None else f"{100 * row.accepted_share:.0f}%"
        found.append(
            [
                _name(row),
                f"{row.speedup_modelled:.3f}",
                f"{row.speedup_low:.3f} to {row.speedup_high:.3f}",
                "not measured" if row.speedup_measured is None else f"{row.speedup_measured:.3f}",
                _number(row.speedup_modelled_clocked),
                _number(row.speedup_validation),
                f"{row.tokens_per_pass:.2f}",
                f"{row.drafts_per_token:.2f}",
                accepted,
            ]
        )
    return found


def _method(rows: Sequence[DraftRow], table: TraceTable) -> list[str]:
    """How the rows came about, in words."""
    lookups = (
        f"Where the last tokens stood in the text before, up to {table.ngram_drafts} tokens that followed them there "
        "are verified at once, under every policy but plain decoding. Policies decide all other rounds, and "
        f"`{Lookups.family}` drafts nothing there. The shares of acceptance above are those of drafts at few bits from "
        "every position; in the table what was found is counted with them."
        if table.ngram_drafts
        else "No tokens are looked up in the text so far: n-gram drafts are off."
    )
    is_measured = rows[0].cost_source == "measured"
    times = "timed on this device as they are served" if is_measured else "given as shares of a step"
    lines = [
        "Every policy plays the same recorded test sequences once; greedy text does not depend on what is drafted. A "
        "speed is the tokens of all sequences over the time of all their steps, relative to plain decoding at the "
        "largest width.",
        "Times are those of a cost table: a draft step by width, a pass by its number of tokens, "
        f"{times}. A policy pays for what it looks at: nothing for counting drafts, a little for how sure they are, "
        "more for signals and a network, signals of what was looked up too. Hindsight and the bound pay for nothing.",
        "Rules are tuned over their whole grids on training and validation sequences. The learned policy begins as a "
        "clone of the best of them that draft at few bits, learns on training sequences, and is the network that was "
        "fastest on validation sequences. What is exported was fastest on validation sequences. Test sequences choose "
        "nothing.",
        lookups,
        *interval_method(len(set(rows[0].sequence_documents)), sum(row.kind == "learned" for row in rows)),
    ]
    if any(row.speedup_measured is not None for row in rows):
        lines.append(
            "By the clock, policies continue some of the test prompts greedily, in turns with plain decoding; of each "
            "step the median over turns counts. It is never in one column with the cost table, whose speed on the same "
            "sequences stands beside it, to their ends; the clock times as many tokens of each as the shortest has."
        )
    return lines


def _name(row: DraftRow) -> str:
    return row.policy if row.seed is None else f"{row.policy} (seed {row.seed})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _said(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _bullets(lines: Sequence[str]) -> str:
    return bullets([f"{line[0].upper()}{line[1:]}".rstrip(".") + "." for line in lines])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *rest = [[escape(cell) for cell in line] for line in lines]
    return table_of(header, rest)
