"""Rows of tasks as one table, and as a report in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flexquant_rl.agents.evaluation.markdown import bullets, escape, facts_table, table_of
from flexquant_rl.agents.tasks.comparison import NO_INTERVAL, Difference, against_row, against_static
from flexquant_rl.agents.tasks.rows import TaskRow, TaskTimeRow
from flexquant_rl.engine.files import replacing

REPORT_FILE = "report.md"
_METHOD = (
    "All policies answer the same documents, one after the other; what is compared is the difference on each document.",
    "Intervals are percentiles of 1,000 resamples of the documents, the same ones for both sides; pieces of one module "
    "of the standard library are drawn together. They hold what "
    "another choice of documents would change, and nothing of another training or another model.",
    "Prompts are read at the largest width, or unquantised by full precision. Widths switch at every token that is "
    "generated; continuations are scored token by token at the policy's widths.",
    "Times are those of greedy continuations of some of the prompts, policies in turns, medians of three rounds, "
    "signals and policy included; shares are of plain decoding at the largest width in the same rounds.",
    "Static at a time between two allocations answers a share of the documents with each, so that the time is equal; "
    "the two are neighbours on the convex hull of time and score. These documents choose the hull, which favours "
    "static. A policy slower than all allocations on the hull is compared with the last one, whose score is the best.",
    "KL near zero certifies no score: what is not in the tables was not asked.",
)


def console_table(rows: Sequence[TaskRow], times: Sequence[TaskTimeRow]) -> str:
    """One line a policy: its time, its width, its scores with intervals."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    timed = {time.policy: time for time in times}
    by_place = {(row.policy, row.task): row for row in rows}
    header = ["policy", "time share, measured", "time share, modelled", "mean bit-width"]
    header += [f"{task} ({next(row.metric for row in rows if row.task == task)}, %)" for task in tasks]
    lines = []
    for policy in dict.fromkeys(row.policy for row in rows):
        time = timed.get(policy)
        cells = [f"`{escape(policy)}`", *_time_cells(time)]
        cells += [_score_cell(by_place.get((policy, task))) for task in tasks]
        lines.append(cells)
    return table_of(header, lines)


def _time_cells(time: TaskTimeRow | None) -> list[str]:
    if time is None:
        return ["", "", ""]
    modelled = "" if time.time_share_modelled is None else f"{time.time_share_modelled:.2f}"
    return [f"{time.time_share_measured:.2f}", modelled, f"{time.mean_bit_width:.2f}"]


def _score_cell(row: TaskRow | None) -> str:
    if row is None:
        return ""
    if row.score_low is None or row.score_high is None:
        return f"{100 * row.score:.1f} ({NO_INTERVAL})"
    return f"{100 * row.score:.1f} ({100 * row.score_low:.1f} to {100 * row.score_high:.1f})"


def write_report(
    directory: Path,
    rows: Sequence[TaskRow],
    times: Sequence[TaskTimeRow],
    found: Sequence[str],
    facts: Mapping[str, object],
    asked: Mapping[str, str],
) -> Path:
    """Writes the report.

    Args:
        directory: Where it goes.
        rows: The rows.
        times: The policies' times.
        found: The results in words.
        facts: What was run.
        asked: What each task asks, by its name.
    """
    sections = [
        "# Tasks",
        console_table(rows, times),
        "## In words",
        bullets([f"{finding}." for finding in found]) or "Nothing to compare: one policy, or none but static ones.",
        "## Differences, document by document",
        _differences(rows, times),
        "## What was asked",
        bullets([f"`{name}`: {says}." for name, says in asked.items()]),
        "## What was run",
        facts_table({**facts, **_costs(rows)}),
        "## How it is compared",
        bullets(_METHOD),
    ]
    path = directory / REPORT_FILE
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _differences(rows: Sequence[TaskRow], times: Sequence[TaskTimeRow]) -> str:
    lines = []
    for row in rows:
        of_task = [other for other in rows if other.task == row.task]
        full = next((other for other in of_task if other.kind == "full"), None)
        if row.kind == "full":
            continue
        static = None if row.kind == "static" else against_static(row, of_task, times)
        cells = [None if full is None else against_row(row, full), static]
        lines.append(
            [row.task, f"`{escape(row.policy)}`", *map(_cell, cells), "" if static is None else static.against]
        )
    header = ["task", "policy", "points against full precision", "points against static in equal measured time"]
    return table_of([*header, "which is"], lines)


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.low is None or difference.high is None:
        return f"{100 * difference.value:+.1f} ({NO_INTERVAL})"
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def _costs(rows: Sequence[TaskRow]) -> dict[str, object]:
    """Processor time for a document, by task."""
    costs: dict[str, object] = {}
    for task in dict.fromkeys(row.task for row in rows):
        each = [f"{row.policy} {row.cpu_seconds / len(row.answers):.2f}" for row in rows if row.task == task]
        costs[f"CPU seconds for a document of {task}"] = ", ".join(each)
    return costs
