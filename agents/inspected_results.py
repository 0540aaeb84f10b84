"""What rows, tables and measurements say of themselves: the part of `fq inspect` that is about results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from flexquant_rl.agents.evaluation.draft_rows import DraftRow, read_draft_rows
from flexquant_rl.agents.evaluation.rows import REPORT_FILE, ROWS_FILE, read_rows
from flexquant_rl.agents.runs.verified_preparation import read_costs
from flexquant_rl.agents.tasks.report import REPORT_FILE as TASKS_REPORT_FILE
from flexquant_rl.agents.tasks.rows import TaskRow, TaskTimeRow, read_plan
from flexquant_rl.agents.tasks.rows import read_rows as read_task_rows
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import json_lines

Facts = dict[str, Any]


def is_evaluation(path: Path) -> bool:
    """Whether a directory is what `fq evaluate --out` wrote: rows, and nothing of a run."""
    return (path / ROWS_FILE).is_file() and not any((path / part).exists() for part in ("config.json", "seeds"))


def evaluation_facts(path: Path) -> Facts:
    """The rows of a directory that `fq evaluate --out` wrote."""
    is_whole = (path / REPORT_FILE).is_file()
    return {**eval_facts(path / ROWS_FILE), "missing": None if is_whole else f"{REPORT_FILE}; run fq evaluate again"}


def rows_facts(path: Path) -> tuple[str, Facts]:
    """Kind and facts of a file of rows, by what its first row holds."""
    names = _first_names(path)
    if names == {field.name for field in fields(DraftRow)}:
        return "rows of policies of drafts", draft_facts(path)
    for kind in (TaskRow, TaskTimeRow):
        if names == {field.name for field in fields(kind)}:
            raise InputError(f"{path} is a part of what fq tasks wrote; name its directory, {path.parent}")
    if names is not None and "strategy" in names:
        raise InputError(f"{path} is a part of an analysis; name its directory, {path.parent}")
    return "evaluation rows", eval_facts(path)


def _first_names(path: Path) -> set[str] | None:
    """The keys of the first row; None where there is no readable one, which is the reader's to say."""
    try:
        first = next((json.loads(line) for _, line in json_lines(path) if line.strip()), None)
    except (OSError, ValueError, RecursionError):
        return None
    return set(first) if isinstance(first, dict) else None


def draft_facts(path: Path) -> Facts:
    """What rows of policies of drafts hold; InputError if there is none."""
    rows = read_draft_rows(path)
    if not rows:
        raise InputError(f"{path} holds no row; write it again with: python train.py --resume {path.parent}")
    return {
        "rows": len(rows),
        "policies": list(dict.fromkeys(row.family for row in rows)),
        "verify_width": rows[0].verify_width,
        "sequences": rows[0].num_sequences,
        "tokens": rows[0].num_tokens,
        "speedups_modelled": {row.policy: row.speedup_modelled for row in rows},
        "is_measured": any(row.speedup_measured is not None for row in rows),
    }


def eval_facts(path: Path) -> Facts:
    """What rows of an evaluation hold; InputError if there is none."""
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path} holds no evaluation row; write it with fq evaluate")
    kl = [row.output_kl_nats for row in rows if math.isfinite(row.output_kl_nats)]
    return {
        "rows": len(rows),
        "policies": list(dict.fromkeys(row.family for row in rows)),
        "time_budgets": sorted({row.time_budget for row in rows if row.time_budget is not None}),
        "reference": rows[0].reference,
        "sequences": rows[0].num_sequences,
        "tokens": rows[0].num_tokens,
        "mean_bit_widths": [min(row.mean_bit_width for row in rows), max(row.mean_bit_width for row in rows)],
        "median_output_kl_nats": statistics.median(kl) if kl else None,
        "is_measured": any(row.speedup_measured is not None for row in rows),
    }


def tasks_facts(path: Path) -> Facts:
    """What `fq tasks` has found so far in a directory."""
    plan, rows, times = read_plan(path), read_task_rows(path, TaskRow), read_task_rows(path, TaskTimeRow)
    is_whole = bool(rows) and (path / TASKS_REPORT_FILE).is_file()
    return {
        "model": plan.model,
        "model_fingerprint": plan.model_fingerprint,
        "tasks": list(plan.task_sha256),
        "documents": "all" if plan.documents is None else plan.documents,
        "chat_template": plan.chat,
        "rows": len(rows),
        "policies": list(dict.fromkeys(row.policy for row in rows)),
        "scores": {f"{row.policy}, {row.task}": row.score for row in rows},
        "is_measured": bool(times),
        "missing": None if is_whole else "run the same `fq tasks` command again for the rest",
    }


def costs_facts(path: Path) -> Facts:
    """What drafts and passes of verification cost, as a run of drafts has timed it."""
    kept = read_costs(path)
    costs = kept.costs
    return {
        "recording": kept.recording,
        "source": costs.source,
        "timed_by": kept.timed_by,
        "full_width_ms": costs.full_ms,
        "plain_ms": costs.plain_ms,
        "draft_ms": list(costs.draft_ms),
        "verify_ms": list(costs.verify_ms),
        "controller_ms": costs.controller_ms,
        "confidence_ms": costs.confidence_ms,
        "settled_ms": costs.settled_ms,
    }


def bench_facts(data: Mapping[str, Any], path: Path) -> Facts:
    """What a file of `fq bench --json` holds."""
    rows = data["rows"]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} has no rows of a benchmark; write it again with fq bench")
    return {
        "bench": data["bench"],
        "rows": len(rows),
        "providers": list(dict.fromkeys(str(row.get("provider")) for row in rows)),
        "machine": rows[0].get("cpu") or rows[0].get("device"),
        "commit": rows[0].get("commit"),
        "tests": rows[0].get("tests"),
    }


JSON_FILES: Mapping[str, tuple[frozenset[str], Callable[[Mapping[str, Any], Path], Facts]]] = {
    "costs of drafts": (frozenset({"version", "recording", "costs"}), lambda data, path: costs_facts(path)),
    "benchmark result": (frozenset({"bench", "rows"}), bench_facts),
}
"""Files of results by their kind: the keys that only they have, and what reads them."""
