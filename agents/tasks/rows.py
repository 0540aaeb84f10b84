"""What tasks found of each policy, as JSON lines: a finished row is never measured again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from flexquant_rl.agents.evaluation.rows import write_rows
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import check_new_directory, json_lines, read_json, write_json

Kind = Literal["full", "static", "learned", "drafts"]
PLAN_FILE = "tasks.json"
PLAN_VERSION = 2
ROWS_FILE, TIMES_FILE = "rows.jsonl", "times.jsonl"


@dataclass(frozen=True)
class TaskPlan:
    """What rows depend on; rows of two plans are never in one directory.

    Attributes:
        model: Name of the model.
        model_fingerprint: Its fingerprint.
        documents: Documents of a task at most; None: all.
        chat: Whether prompts go through the model's chat template.
        task_sha256: Digest of each local task's documents, by its name; "" for a task that the harness brings.
    """

    model: str
    model_fingerprint: str
    documents: int | None
    chat: bool
    task_sha256: dict[str, str]


@dataclass(frozen=True)
class TaskRow:
    """One policy on one task.

    Attributes:
        policy: Name or directory.
        kind: What it is: unquantised weights, one allocation, a learned policy, drafts that are verified.
        policy_sha256: Digest of what it is (`policy_sha256`), of full precision that of the unquantised model.
        kl_weight: The dial; None without one.
        threads: Threads of a step; None: the decoder's choice.
        verify_width: Of drafts: the width whose answers theirs equal; else None.
        task: The task.
        metric: What the scores are, e.g. `acc_norm`.
        score: Mean over documents.
        score_low: Lower end of its bootstrap 95% interval over documents; None where one document gives none.
        score_high: Upper end.
        document_ids: Digest of each document.
        document_groups: What each is a part of, the unit of all intervals; most often each is its own.
        document_scores: Score of each.
        answers: Digest of what was answered to each: a text, or the likelihoods of all choices.
        cpu_seconds: Processor time for all of them.
    """

    policy: str
    kind: Kind
    policy_sha256: str
    kl_weight: float | None
    threads: int | None
    verify_width: int | None
    task: str
    metric: str
    score: float
    score_low: float | None
    score_high: float | None
    document_ids: tuple[str, ...]
    document_groups: tuple[int, ...]
    document_scores: tuple[float, ...]
    answers: tuple[str, ...]
    cpu_seconds: float

    def public(self) -> dict[str, Any]:
        """What the JSON of the command says of it."""
        private = ("document_ids", "document_groups", "document_scores", "answers", "policy_sha256")
        shown = {name: value for name, value in asdict(self).items() if name not in private}
        return {**shown, "num_documents": len(self.document_ids)}


@dataclass(frozen=True)
class TaskTimeRow:
    """The time of a policy's tokens, by the clock and by the latency table. All policies took turns.

    Attributes:
        policy: Name or directory.
        policy_sha256: As in `TaskRow`.
        kl_weight: As in `TaskRow`.
        timing_sha256: Digest of what else times depend on (`timing_sha256`).
        ms_per_token: Wall clock, the prompt left out; median over rounds.
        time_share_measured: That over plain decoding at the largest width in the same rounds.
        time_share_modelled: By the latency table, for the widths of the same tokens; None of drafts.
        latency_source: Of that table: `measured` or `roofline`.
        mean_bit_width: Parameter-weighted mean, bits; of drafts that of the verify width.
        num_tokens: Tokens timed in a round.
    """

    policy: str
    policy_sha256: str
    kl_weight: float | None
    timing_sha256: str
    ms_per_token: float
    time_share_measured: float
    time_share_modelled: float | None
    latency_source: str
    mean_bit_width: float
    num_tokens: int


_Row = TypeVar("_Row", TaskRow, TaskTimeRow)
_FILES: dict[type[Any], str] = {TaskRow: ROWS_FILE, TaskTimeRow: TIMES_FILE}


def save_rows(directory: Path, rows: Sequence[_Row], kind: type[_Row]) -> None:
    """Writes all rows of a kind, atomically."""
    write_rows(directory / _FILES[kind], rows)


def read_rows(directory: Path, kind: type[_Row]) -> list[_Row]:
    """All rows of a kind, none where there is no file yet.

    Raises:
        InputError: If the file is damaged.
    """
    path = directory / _FILES[kind]
    names = {field.name for field in fields(kind)}
    rows = []
    try:
        for _, line in json_lines(path) if path.exists() else ():
            data = json.loads(line)
            if not isinstance(data, dict) or data.keys() != names:
                raise ValueError(f"a row has {', '.join(sorted(names))}")
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
            }
            rows.append(kind(**values))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as rows of tasks ({error}); remove it and run fq tasks again"
        ) from error
    return rows


def read_plan(directory: Path) -> TaskPlan:
    """What the rows of a directory depend on.

    Raises:
        InputError: If it cannot be read, or is of another version.
    """
    path = directory / PLAN_FILE
    fix = "remove the directory and run fq tasks again"
    try:
        data = dict(read_json(path))
        version, digests = data.pop("version"), data["task_sha256"]
        if not isinstance(digests, dict):
            raise ValueError("task_sha256 is no object")
        plan = TaskPlan(**data)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a plan of tasks ({error}); {fix}") from error
    if version != PLAN_VERSION:
        raise InputError(f"{path} has version {version!r}, this is {PLAN_VERSION}; {fix}")
    return plan


def claim(directory: Path, plan: TaskPlan) -> None:
    """Makes a directory one of this plan, or finds that it is one. The caller keeps other processes from it.

    Raises:
        InputError: If it holds something else, or rows of another plan.
    """
    path = directory / PLAN_FILE
    wanted = {"version": PLAN_VERSION, **asdict(plan)}
    if not path.is_file():
        check_new_directory(directory)
        write_json(path, wanted)
        return
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); choose another --out") from error
    # Another command may ask for more tasks: those of before stay as they are.
    tasks = found.get("task_sha256", {}) if isinstance(found, dict) else {}
    merged = {**wanted, "task_sha256": {**tasks, **plan.task_sha256}}
    changed = [name for name in plan.task_sha256 if name in tasks and tasks[name] != plan.task_sha256[name]]
    others = [name for name in wanted if name != "task_sha256" and found.get(name) != wanted[name]]
    if others or changed:
        what = (others or [f"the documents of {changed[0]}"])[0]
        raise InputError(f"{directory} has rows of another plan ({what} differs); choose another --out, or remove it")
    write_json(path, merged)
