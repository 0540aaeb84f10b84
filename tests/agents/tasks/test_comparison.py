"""Policies on the same documents: paired differences, static at equal time, and which losses are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flexquant_rl.agents.tasks.comparison import against_row, against_static, findings, same_answers, score_interval
from flexquant_rl.agents.tasks.report import console_table, write_report
from flexquant_rl.agents.tasks.rows import Kind, TaskPlan, TaskRow, TaskTimeRow, claim, read_rows, save_rows
from flexquant_rl.engine.errors import InputError

COUNT = 200


def row(policy: str, kind: Kind, scores: list[float], answers: str = "a") -> TaskRow:
    count = len(scores)
    low, high = score_interval(scores, range(count)) if count > 1 else (None, None)
    return TaskRow(
        policy,
        kind,
        "",
        None,
        None,
        8 if kind == "drafts" else None,
        "line",
        "exact_match",
        sum(scores) / count,
        low,
        high,
        document_ids=tuple(map(str, range(count))),
        document_groups=tuple(range(count)),
        document_scores=tuple(scores),
        answers=(answers,) * count,
        cpu_seconds=1.0,
    )


def time(policy: str, share: float) -> TaskTimeRow:
    return TaskTimeRow(policy, "", None, "", 10 * share, share, None, "measured", 4.0, 100)


@pytest.fixture
def drawn() -> list[list[float]]:
    generator = np.random.default_rng()
    return [(generator.random(COUNT) < share).astype(float).tolist() for share in (0.7, 0.5, 0.6, 0.9)]


def test_static_at_a_time_between_two_is_their_mean(drawn: list[list[float]]) -> None:
    slow, fast, own, _ = drawn
    rows = [row("fixed:8", "static", slow), row("fixed:4", "static", fast), row("mine", "learned", own)]
    times = [time("fixed:8", 1.0), time("fixed:4", 0.6), time("mine", 0.7)]
    found = against_static(rows[2], rows, times)
    assert found is not None
    assert found.value == pytest.approx(np.mean(own) - (0.25 * np.mean(slow) + 0.75 * np.mean(fast)))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found.against == "fixed:4 on 75% and fixed:8 on 25% of documents"


def test_static_is_the_hull_of_time_and_score() -> None:
    """What two others beat together at its time is no static allocation that anybody would take."""
    scores = {"fixed:3": 0.2, "fixed:4": 0.3, "fixed:5": 0.8, "fixed:8": 0.7}
    rows = [
        row(name, "static", [1.0] * round(10 * score) + [0.0] * (10 - round(10 * score)))
        for name, score in scores.items()
    ]
    mine = row("mine", "learned", [1.0] * 5 + [0.0] * 5)
    shares = {"fixed:3": 0.4, "fixed:4": 0.5, "fixed:5": 0.6, "fixed:8": 1.0}
    times = [time(name, share) for name, share in shares.items()]
    between = against_static(mine, rows, [*times, time("mine", 0.5)])
    assert between is not None
    assert between.value == pytest.approx(0.5 - (0.2 + 0.8) / 2), "below the line from 3 to 5 bits is 4"
    assert between.against == "fixed:3 on 50% and fixed:5 on 50% of documents"
    slower = against_static(mine, rows, [*times, time("mine", 0.9)])
    assert slower is not None
    assert (slower.against, slower.value) == ("fixed:5", pytest.approx(-0.3))


def test_one_document_gives_no_interval(tmp_path: Path) -> None:
    """All resamples of one are that one: the interval would be of no width, and said to exclude zero."""
    assert score_interval([0.0, 1.0], [3, 3]) == (None, None)
    best, mine = row("fixed:4", "static", [1.0] * 3), row("mine", "learned", [0.0] * 3)
    rows = [
        replace(one, document_groups=(0, 0, 0), score_low=None, score_high=None)
        for one in (row("full", "full", [1.0] * 3), best, mine)
    ]
    assert against_row(rows[2], rows[0]).words() == "-100.0 points (one document gives no interval)"
    times = [time("fixed:4", 0.6), time("mine", 0.7)]
    assert any("which has no interval, against fixed:4" in line for line in findings(rows, times))
    assert "100.0 (one document gives no interval)" in console_table(rows, times)
    text = write_report(tmp_path, rows, times, [], {}, {}).read_text(encoding="utf-8")
    assert "| -100.0 (one document gives no interval) |" in text
    save_rows(tmp_path, rows, TaskRow)
    assert read_rows(tmp_path, TaskRow) == rows


def test_what_is_slower_than_static_meets_the_slowest_and_what_is_faster_nothing(drawn: list[list[float]]) -> None:
    slow, fast, own, _ = drawn
    rows = [row("fixed:8", "static", slow), row("fixed:4", "static", fast), row("mine", "learned", own)]
    allocations = [time("fixed:8", 1.0), time("fixed:4", 0.6)]
    found = against_static(rows[2], rows, [*allocations, time("mine", 1.3)])
    assert found is not None
    assert (found.against, found.value) == ("fixed:8", pytest.approx(np.mean(own) - np.mean(slow)))
    assert against_static(rows[2], rows, [*allocations, time("mine", 0.5)]) is None
    assert against_static(rows[2], rows, allocations) is None


def test_losses_are_named_and_what_cannot_be_said_is_said(drawn: list[list[float]]) -> None:
    worse, better = [0.0] * COUNT, drawn[3]
    allocations = [row("fixed:8", "static", better), row("fixed:4", "static", better)]
    times = [time("fixed:8", 1.0), time("fixed:4", 0.6), time("mine", 0.8), time("draft:3", 0.9), time("quick", 0.1)]
    rows = [
        row("full", "full", better),
        *allocations,
        row("mine", "learned", worse),
        row("quick", "learned", worse),
        row("draft:3", "drafts", better),
    ]
    words = findings(rows, times)
    (named,) = (line for line in words if line.startswith("policies that lose more than static"))
    assert "mine on line: -" in named
    assert "which excludes zero" in named
    assert "draft:3" not in named
    assert any(line.endswith("timed: quick on line") for line in words)
    assert f"line: draft:3 answers as fixed:8 on {COUNT} of {COUNT} documents" in words
    assert any("against full precision" in line for line in words)
    assert "on no task does a policy lose more than static at equal measured time" in findings(
        [*allocations, rows[-1]], times
    )


def test_the_same_scores_differ_by_nothing(drawn: list[list[float]]) -> None:
    found = against_row(row("a", "learned", drawn[0]), row("b", "static", drawn[0]))
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert found.words() == "+0.0 points (95% interval +0.0 to +0.0)"
    assert same_answers(row("a", "drafts", drawn[0]), row("b", "static", drawn[0], answers="b")) == 0


def test_documents_of_one_source_are_drawn_together() -> None:
    scores = [1.0] * 20 + [0.0] * 20
    alone, together = (score_interval(scores, groups) for groups in (range(40), [0] * 20 + [1] * 20))
    assert together == (0, 1)
    low, high = alone
    assert low is not None
    assert high is not None
    assert 0 < low < high < 1


def test_other_documents_are_not_compared(drawn: list[list[float]]) -> None:
    one = row("a", "learned", drawn[0])
    with pytest.raises(InputError, match="a and b have answered different documents of line"):
        against_row(one, replace(row("b", "static", drawn[0]), document_ids=("x",) * COUNT))


def test_rows_are_read_as_they_were_written(drawn: list[list[float]], tmp_path: Path) -> None:
    rows, times = [row("a", "learned", drawn[0]), row("b", "static", drawn[1])], [time("a", 0.7)]
    save_rows(tmp_path, rows, TaskRow)
    save_rows(tmp_path, times, TaskTimeRow)
    assert read_rows(tmp_path, TaskRow) == rows
    assert read_rows(tmp_path, TaskTimeRow) == times
    (tmp_path / "rows.jsonl").write_text('{"policy": 1}\n', encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read as rows of tasks"):
        read_rows(tmp_path, TaskRow)


def test_a_directory_is_of_one_plan(tmp_path: Path) -> None:
    plan = TaskPlan("model", "f" * 8, 20, False, {"line": "1"})
    claim(tmp_path / "out", plan)
    claim(tmp_path / "out", replace(plan, task_sha256={"gsm8k": "2"}))
    claim(tmp_path / "out", plan)
    for other, what in (
        (replace(plan, documents=10), "documents differs"),
        (replace(plan, task_sha256={"gsm8k": "3"}), "the documents of gsm8k differs"),
    ):
        with pytest.raises(InputError, match=f"rows of another plan .{what}"):
            claim(tmp_path / "out", other)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        claim(tmp_path, plan)


def test_the_report_has_every_row_and_says_how(drawn: list[list[float]], tmp_path: Path) -> None:
    rows = [row("full", "full", drawn[0]), row("fixed:4", "static", drawn[1]), row("mine|x", "learned", drawn[2])]
    times = [time("fixed:4", 0.6), time("mine|x", 0.7)]
    words = findings(rows, times)
    text = write_report(tmp_path, rows, times, words, {"model": "tiny"}, {"line": "asks"}).read_text(encoding="utf-8")
    assert console_table(rows, times) in text
    assert all(f"- {line}." in text for line in words)
    assert "`mine\\|x`" in text
    assert len({line.count(" | ") for line in console_table(rows, times).splitlines()}) == 1
