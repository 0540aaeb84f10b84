"""Policies compared document by document: against full precision, and against static at equal measured time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexquant_rl.agents.evaluation.budgets import Outcome, lower_hull
from flexquant_rl.agents.evaluation.resampling import Array, document_weights, percentile_interval
from flexquant_rl.agents.tasks.rows import TaskRow, TaskTimeRow
from flexquant_rl.engine.errors import InputError

NO_INTERVAL = "one document gives no interval"
_SAME_SHARE = 1e-9


@dataclass(frozen=True)
class Difference:
    """What a policy scores more than something else on the same documents.

    Attributes:
        value: Mean difference, in parts of 1.
        low: Lower end of its 95% interval, paired over documents; None where one document gives none.
        high: Upper end.
        against: What else.
    """

    value: float
    low: float | None
    high: float | None
    against: str

    def words(self) -> str:
        """E.g. `-2.0 points (95% interval -6.0 to +2.0)`."""
        points = f"{100 * self.value:+.1f} points"
        if self.low is None or self.high is None:
            return f"{points} ({NO_INTERVAL})"
        return f"{points} (95% interval {100 * self.low:+.1f} to {100 * self.high:+.1f})"

    @property
    def zero(self) -> str:
        """What the interval says of no difference."""
        if self.low is None or self.high is None:
            return "has no interval"
        return "includes zero" if self.low <= 0 <= self.high else "excludes zero"


def score_interval(scores: Sequence[float], groups: Sequence[int]) -> tuple[float, float] | tuple[None, None]:
    """The bootstrap 95% interval of a mean over documents, resampled in groups; one group gives none."""
    if len(set(groups)) < 2:
        return None, None
    return percentile_interval((document_weights(groups) @ np.array(scores, dtype=np.float64))[1:])


def against_row(row: TaskRow, other: TaskRow) -> Difference:
    """A policy against another one.

    Raises:
        InputError: If they have answered different documents.
    """
    return _difference(row, _scores(row, other), other.policy)


def against_static(row: TaskRow, rows: Sequence[TaskRow], times: Sequence[TaskTimeRow]) -> Difference | None:
    """A policy against static allocations that take, together, the time that it took by the clock.

    Static at a time between two allocations answers a share of the documents with each: its score is the mean of
    theirs, weighted so that the time is the same. The two are neighbours on the convex hull of time and score, so an
    allocation that two others beat together is left out. A policy that is slower than all on the hull is compared with
    the last, whose score is the best.

    Args:
        row: The policy on a task.
        rows: All rows.
        times: The time of every policy.

    Returns:
        None where its time is not known, or is less than that of every static allocation.
    """
    shares = {time.policy: time.time_share_measured for time in times}
    own = shares.get(row.policy)
    static = [
        (shares[other.policy], other.policy, _scores(row, other))
        for other in rows
        if other.kind == "static" and other.task == row.task and other.policy in shares
    ]
    # A score is to be large where KL is to be small.
    line = [
        static[index] for index in lower_hull([Outcome(share, -float(np.mean(scores))) for share, _, scores in static])
    ]
    if own is None or not line or own < line[0][0]:
        return None
    slower = next((place for place, entry in enumerate(line) if entry[0] > own), None)
    if slower is None:
        return _difference(row, line[-1][2], line[-1][1])
    (low_share, low_name, low), (high_share, high_name, high) = line[slower - 1], line[slower]
    part = (own - low_share) / (high_share - low_share)
    if part < _SAME_SHARE:
        return _difference(row, low, low_name)
    mixed = (1 - part) * np.array(low) + part * np.array(high)
    return _difference(row, mixed.tolist(), f"{low_name} on {1 - part:.0%} and {high_name} on {part:.0%} of documents")


def same_answers(row: TaskRow, other: TaskRow) -> int:
    """On how many documents two policies have answered the very same."""
    _scores(row, other)
    return sum(mine == theirs for mine, theirs in zip(row.answers, other.answers, strict=True))


def _scores(row: TaskRow, other: TaskRow) -> list[float]:
    """The other's scores, of the same documents."""
    if row.document_ids != other.document_ids:
        raise InputError(
            f"{row.policy} and {other.policy} have answered different documents of {row.task}; remove the rows of one "
            "and run fq tasks again"
        )
    return list(other.document_scores)


def _difference(row: TaskRow, others: Sequence[float], against: str) -> Difference:
    apart: Array = np.array(row.document_scores, dtype=np.float64) - np.array(others, dtype=np.float64)
    low, high = score_interval(apart.tolist(), row.document_groups)
    return Difference(float(apart.mean()), low, high, against)


def findings(rows: Sequence[TaskRow], times: Sequence[TaskTimeRow]) -> list[str]:
    """The results in words, without full stops; every task on which a policy loses more than static is named."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    found, losing, unknown, compared = [], [], [], 0
    for task in tasks:
        of_task = [row for row in rows if row.task == task]
        full = next((row for row in of_task if row.kind == "full"), None)
        for row in of_task:
            if row.kind in ("full", "static"):
                continue
            if full is not None:
                found.append(f"{task}: {row.policy} against full precision {against_row(row, full).words()}")
            static = against_static(row, of_task, times)
            if static is None:
                unknown.append(f"{row.policy} on {task}")
                continue
            compared += 1
            found.append(f"{task}: {row.policy} against static in equal measured time {static.words()}")
            if static.value < 0:
                losing.append(
                    f"{row.policy} on {task}: {static.words()}, which {static.zero}, against {static.against}"
                )
        found += _identical(of_task)
    if losing:
        found.append("policies that lose more than static at equal measured time: " + "; ".join(losing))
    elif compared:
        found.append("on no task does a policy lose more than static at equal measured time")
    if unknown:
        found.append(
            "not comparable with static at equal time, as they are faster than every static allocation here or not "
            "timed: " + ", ".join(unknown)
        )
    return found


def _identical(of_task: Sequence[TaskRow]) -> list[str]:
    """On how many documents drafts answer what their verify width answers, where that was asked too."""
    found = []
    for row in of_task:
        plain = next((other for other in of_task if other.policy == f"fixed:{row.verify_width}"), None)
        if plain is not None:
            same = f"{same_answers(row, plain)} of {len(row.answers)} documents"
            found.append(f"{row.task}: {row.policy} answers as {plain.policy} on {same}")
    return found
