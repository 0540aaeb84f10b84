"""Tables and the report of an evaluation: Markdown for people who read, plain text for a terminal.

Modelled and measured speedups never share a column, and what was not measured says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexquant_rl.agents.evaluation.comparison import (
    LogRatio,
    SeedGroup,
    families,
    ratios_to_static,
    seed_groups,
    setting_of,
)
from flexquant_rl.agents.evaluation.equal_time import Rung
from flexquant_rl.agents.evaluation.markdown import bullets, escape, facts_table, table_row
from flexquant_rl.agents.evaluation.method import method_sentences
from flexquant_rl.agents.evaluation.rows import LONG_ROWS_FILE, REPORT_FILE, ROWS_FILE, EvalRow
from flexquant_rl.engine.files import replacing

PARETO_FILE = "pareto.png"
BITS_FILE = "bits.png"
LEARNING_FILE = "learning.png"

_NOT_MEASURED = "not measured"
_COLUMNS = (
    ("family", ":--"),
    ("policy", ":--"),
    ("time budget", "--:"),
    ("dial (price of a nat)", "--:"),
    ("mean bit-width (bits)", "--:"),
    ("output KL (nats)", "--:"),
    ("95% CI over documents (nats)", ":-:"),
    ("KL p99 (nats)", "--:"),
    ("perplexity", "--:"),
    ("top-1 agreement (%)", "--:"),
    ("time share, modelled", "--:"),
    ("KL against static in this time (%, 95% CI)", "--:"),
    ("time share, measured", "--:"),
    ("KL against static in this time (%, 95% CI)", "--:"),
    ("steps unlike static in equal time (%)", "--:"),
    ("reward per token at this dial (full-width steps)", "--:"),
)
_CONSOLE_COLUMNS = (
    *(("policy", 18), ("budget", 6), ("dial", 6), ("bits", 5), ("KL/nats", 8), ("95% CI", 20), ("p99", 8)),
    *(("ppl", 7), ("top-1%", 6), ("time", 5), ("clock", 5)),
)


def markdown_table(rows: Sequence[EvalRow]) -> str:
    """The whole result as one Markdown table, grouped by family.

    Learned policies are averaged over training seeds, mean ± standard deviation. Beside every time share stands how
    the KL differs from what static reaches in that time.
    """
    lines = [table_row([column[part] for column in _COLUMNS]) for part in (0, 1)]
    for family in families(rows):
        modelled, measured = ratios_to_static(rows, family), ratios_to_static(rows, family, "measured")
        for index, group in enumerate(seed_groups(rows, family)):
            setting = setting_of(group.rows[0])
            cells = _cells(group, modelled.get(setting), measured.get(setting))
            lines.append(table_row([f"**{escape(family)}**" if index == 0 else "", *cells]))
    return "\n".join(lines) + "\n"


def console_table(rows: Sequence[EvalRow]) -> str:
    """The main columns as plain ASCII, at most 110 characters wide; learned policies averaged over seeds.

    `time` is the modelled share of full-width time, `clock` the measured one, a dash where there is none.
    """
    header = _console_row([name for name, _ in _CONSOLE_COLUMNS])
    lines = [header, "-" * len(header)]
    for family in families(rows):
        lines += [_console_row(_console_cells(group)) for group in seed_groups(rows, family)]
    return "\n".join(lines) + "\n"


def write_report(
    run_dir: Path,
    *,
    rows: Sequence[EvalRow],
    sentences: Sequence[str],
    facts: Mapping[str, object],
    rungs: Sequence[Rung] = (),
    long_rows: Sequence[EvalRow] = (),
    showcase: str = "",
    notes: Sequence[str] = (),
    title: str = "Precision controllers: evaluation",
) -> None:
    """Writes `report.md` beside the pictures and `eval.jsonl` of a run; links to those of them that exist.

    Args:
        run_dir: The run.
        rows: Everything that was evaluated.
        sentences: Results in words, e.g. of `Comparison.sentence`.
        facts: What was run, in order: name -> value (`model`, `text`, `profile source`, `training seeds`, `env steps`,
            `machine`, `threads`, ...). Underscores become spaces; reference and size of the test text are added.
        rungs: The static allocations that rows were compared with.
        showcase: What the picture of the bit-widths shows: sequence, dial, seed.
        long_rows: What was evaluated on longer continuations than the policies were trained on.
        notes: Limits beside those that every report states.
        title: The heading.
    """
    parts = [
        f"# {title}",
        "## Result",
        bullets(sentences) or "No two families could be compared at an equal time budget.",
    ]
    if (run_dir / PARETO_FILE).is_file():
        parts.append(f"![Output KL against modelled time of every policy]({PARETO_FILE})")
    if (run_dir / LEARNING_FILE).is_file():
        parts += ["## Training", f"![Validation score of every seed by env step]({LEARNING_FILE})"]
    parts += ["## What was run", facts_table({**facts, **_row_facts(rows)})]
    parts += ["## How it was compared", bullets(method_sentences(rows, rungs))]
    parts += ["## Every policy", markdown_table(rows).rstrip()]
    if (run_dir / ROWS_FILE).is_file():
        parts.append(
            f"One line for each policy, budget and seed, with the KL of each sequence: [{ROWS_FILE}]({ROWS_FILE})."
        )
    if long_rows:
        count, tokens = long_rows[0].num_sequences, long_rows[0].num_tokens // long_rows[0].num_sequences
        parts += [
            "## Longer than in training",
            f"The same on {count} sequences of {tokens} tokens ([{LONG_ROWS_FILE}]({LONG_ROWS_FILE})):",
            markdown_table(long_rows).rstrip(),
        ]
    if (run_dir / BITS_FILE).is_file():
        parts += ["## Where the policy moves most", f"![Bit-width of every token and unit]({BITS_FILE})"]
        parts += [f"{showcase[0].upper()}{showcase[1:]}."] if showcase else []
    parts += ["## Limits", bullets([*_limits(rows, facts), *notes])]
    with replacing(run_dir / REPORT_FILE) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _cells(group: SeedGroup, modelled: LogRatio | None, measured: LogRatio | None) -> list[str]:
    low, high = group.kl_interval()
    seeds = f" ({group.num_seeds} seeds)" if group.num_seeds > 1 else ""
    return [
        escape(group.policy) + seeds,
        _budget(group),
        _dial(group),
        _mean_sd(group, "mean_bit_width", ".2f"),
        _mean_sd(group, "output_kl_nats", "#.3g"),
        f"{_number(low, '#.3g')} to {_number(high, '#.3g')}",
        _mean_sd(group, "output_kl_p99_nats", "#.3g"),
        _mean_sd(group, "perplexity", "#.4g"),
        _mean_sd(group, "top1_agreement", ".2f", factor=100),
        _mean_sd(group, "time_share_modelled", ".3f", missing="not modelled"),
        _against_static(modelled),
        _mean_sd(group, "time_share_measured", ".3f", missing=_NOT_MEASURED),
        _against_static(measured),
        _mean_sd(group, "differs_from_static", ".1f", factor=100),
        _mean_sd(group, "reward_per_token", ".4f"),
    ]


def _budget(group: SeedGroup) -> str:
    return "" if group.time_budget is None else f"{group.time_budget:.3g}"


def _dial(group: SeedGroup) -> str:
    dial = group.mean("kl_weight")
    return "" if dial is None else format(dial, ".0f" if dial >= 1000 else ".3g")


def _mean_sd(group: SeedGroup, field: str, spec: str, *, factor: float = 1.0, missing: str = "") -> str:
    mean, sd = group.mean(field), group.sd(field)
    if mean is None:
        return missing
    text = _number(factor * mean, spec)
    if sd is None:
        return text
    # Of an sd two digits at most: more would pretend to know it from a handful of seeds.
    return f"{text} ± {_number(factor * sd, spec if spec.endswith('f') else '#.2g')}"


def _against_static(ratio: LogRatio | None) -> str:
    if ratio is None:
        return ""
    estimate = f"{100 * math.expm1(ratio.value):+.1f}"
    if ratio.low is None or ratio.high is None:
        return estimate
    return f"{estimate} ({100 * math.expm1(ratio.low):+.1f} to {100 * math.expm1(ratio.high):+.1f})"


def _console_cells(group: SeedGroup) -> list[str]:
    low, high = group.kl_interval()
    agreement = group.mean("top1_agreement")
    return [
        _shortened(group.policy + (f" ({group.num_seeds} seeds)" if group.num_seeds > 1 else ""), 18),
        _budget(group) or "-",
        _dial(group) or "-",
        _number(group.mean("mean_bit_width"), ".3f"),
        _number(group.mean("output_kl_nats"), "#.3g"),
        f"{_number(low, '#.3g')} .. {_number(high, '#.3g')}",
        _number(group.mean("output_kl_p99_nats"), "#.3g"),
        _number(group.mean("perplexity"), "#.4g"),
        _number(None if agreement is None else 100 * agreement, ".2f"),
        _number(group.mean("time_share_modelled"), ".3f"),
        _number(group.mean("time_share_measured"), ".3f"),
    ]


def _console_row(cells: Sequence[str]) -> str:
    widths = [width for _, width in _CONSOLE_COLUMNS]
    return " ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])


def _number(value: float | None, spec: str) -> str:
    """Formats; `#` in the spec keeps significant zeros, so that 0.012 with three digits reads 0.0120."""
    return "-" if value is None else format(value, spec).removesuffix(".")


def _shortened(text: str, width: int) -> str:
    """Keeps the end: what differs between paths stands there."""
    printable = text.encode("ascii", "replace").decode()
    return printable if len(printable) <= width else "..." + printable[3 - width :]


def _row_facts(rows: Sequence[EvalRow]) -> dict[str, object]:
    """What the rows themselves know: the reference and the size of the test text."""
    references = sorted({row.reference for row in rows})
    sizes = sorted({(row.num_sequences, row.num_tokens) for row in rows})
    test_text = "; ".join(f"{sequences:,} sequences, {tokens:,} tokens judged" for sequences, tokens in sizes)
    return {"reference of the output KL": ", ".join(references), "test text": test_text}


def _limits(rows: Sequence[EvalRow], facts: Mapping[str, object]) -> list[str]:
    source = facts.get("profile source", facts.get("profile_source"))
    named = f" (source: {source})" if source is not None else ""
    lines = [
        f"*Time share, modelled* is computed from the profile's latency table{named}, not timed; 1 is the largest "
        "width everywhere. A roofline has no entry for the time of the policy itself.",
        "Another text, or another model, may order the policies differently.",
    ]
    measured = sum(row.time_share_measured is not None for row in rows)
    timed = (
        "*Time share, measured* is wall clock of batch-1 decoding, policy included, for "
        f"{measured} of {len(rows)} rows."
    )
    lines.insert(1, timed if measured else "No policy was timed: there is no measured time here.")
    known = families(rows).values()
    if any(family.is_oracle for family in known):
        lines.append("The oracle has seen the text that it is judged on: a bound, not a policy that can be deployed.")
    lines += [
        f"`{family.name}` chooses a unit's width within the pass, by what the unit is about to read. No decoder here "
        "does: it cannot be deployed, and its choice is charged no time."
        for family in known
        if family.is_in_flight
    ]
    return lines
