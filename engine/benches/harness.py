"""What all benchmarks share: tests as a gate, interleaved rounds, quartiles, rows, one JSON result.

Rounds are interleaved (A, B, C, C, B, A): what disturbs the machine disturbs all providers. Reported are medians and
quartiles. What is particular to a device is in `clocks.py`, the plain read or copy to compare with in `ceilings.py`.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flexquant_rl.engine.benches.clocks import Call, Clock
from flexquant_rl.engine.benches.machine import ROOT, machine_facts
from flexquant_rl.engine.files import write_json

READ = "read"
"""Name of the provider that only reads memory, on the CPU."""
COPY = "copy"
"""Name of the provider that only copies memory, on the GPU."""
CEILINGS = (READ, COPY)
"""Providers whose bandwidth the others are compared with; a run has one of them at most."""

Row = dict[str, Any]
"""JSON-able: provider, what tells it apart, times, bandwidth, then what all rows of a run share."""
Turn = Callable[[], Iterable[float]]
"""Works for a moment and gives the seconds that each of its calls took."""
Track = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the loop over rounds, to show how far it is."""
GateState = Literal["passed", "not run"]

# Columns of the table, after what tells the rows apart.
_MEASURED = (
    "p25_us",
    "p50_us",
    "p75_us",
    "gb_per_s",
    *(f"share_of_{name}" for name in CEILINGS),
    "steps",
    "tokens_per_s",
    "env_steps_per_s",
)
_LEFT_OUT = {"num_samples", "bytes", "roofline_us", "env_steps_per_s_p25", "env_steps_per_s_p75"}


class BenchRefusedError(Exception):
    """No number is reported, because what would be timed is wrong."""


@dataclass
class Provider:
    """One way to do what is timed.

    Attributes:
        name: As in the rows.
        turn: Does it a few times.
        num_bytes: Read from and written to memory by one call; None where that is not the point.
        facts: What tells it apart from others of the same name, for its row.
        times_s: Seconds of the calls so far.
    """

    name: str
    turn: Turn
    num_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)


def run_tests(files: Sequence[str], progress: Callable[[str], None], root: Path = ROOT) -> GateState:
    """Runs the tests of what is about to be timed.

    Args:
        files: Relative to the checkout.
        progress: Takes one line about what happens.
        root: The checkout.

    Returns:
        "not run" outside a checkout, where there are no tests, or without pytest.

    Raises:
        BenchRefusedError: If a test fails.
    """
    if not (root / "tests").is_dir():
        progress('not a checkout, so there are no tests to run first; the rows say "tests": "not run"')
        return "not run"
    if importlib.util.find_spec("pytest") is None:
        progress('pytest is not installed, so no tests are run first; the rows say "tests": "not run"')
        return "not run"
    progress(f"testing first: {' '.join(files)}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stdout.strip() or result.stderr.strip() or "no output").splitlines()[-1]
        raise BenchRefusedError(
            f"the tests of what would be timed fail ({last}); see them with: python -m pytest {' '.join(files)}"
        )
    return "passed"


def run_bench(
    name: str,
    tests: Sequence[str],
    measure: Callable[[], list[Row]],
    *,
    path: Path | None,
    progress: Callable[[str], None],
    gate: Callable[[Sequence[str], Callable[[str], None]], GateState] = run_tests,
) -> dict[str, Any]:
    """Runs a benchmark from the gate to the file.

    Args:
        name: Name of the benchmark.
        tests: Test files that must pass, relative to the checkout.
        measure: Times everything and returns a row per provider; called after the tests.
        path: File to write the result to, as JSON; None writes none.
        progress: Takes one line about what happens.
        gate: Runs the tests.

    Returns:
        `{"bench": name, "rows": [...]}`, every row with the facts of the machine and the state of the tests.

    Raises:
        BenchRefusedError: If a test fails or `measure` finds a wrong result.
    """
    facts = machine_facts() | {"tests": gate(tests, progress)}
    result = {"bench": name, "rows": [row | facts for row in measure()]}
    if path is not None:
        write_json(path, result)
    return result


def calls(clock: Clock, ring: Iterable[Call], per_turn: int = 1) -> Turn:
    """A turn that makes the next `per_turn` calls of a ring and times each."""
    cycle = itertools.cycle(ring)
    return lambda: [clock.seconds(call) for call in itertools.islice(cycle, per_turn)]


def interleave(providers: Sequence[Provider], rounds: int, track: Track = iter) -> None:
    """Gives every provider one turn that does not count and then `rounds` turns.

    Args:
        providers: Their `times_s` are extended.
        rounds: Turns each.
        track: Wraps the loop over rounds.
    """
    for provider in providers:
        for _ in provider.turn():
            pass
    for index in track(range(rounds)):
        for provider in providers if index % 2 == 0 else reversed(providers):
            provider.times_s.extend(provider.turn())


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile; of a single value three times that value."""
    first, median, third = statistics.quantiles(values, n=4) if len(values) > 1 else (*values,) * 3
    return first, median, third


def rows(providers: Sequence[Provider], common: dict[str, Any]) -> list[Row]:
    """One row per provider: quartiles, bandwidth, and how near it is to the plain read or copy.

    `share_of_read` (on the GPU `share_of_copy`) is a provider's bandwidth over the ceiling's, `roofline_us` the time
    that the ceiling would need for the provider's bytes.

    Args:
        providers: After `interleave`.
        common: Facts of every row.
    """
    ceiling = next((provider for provider in providers if provider.name in CEILINGS), None)
    return [_row(provider, ceiling) | common for provider in providers]


def _row(provider: Provider, ceiling: Provider | None) -> Row:
    row: Row = {"provider": provider.name, **provider.facts}
    for share, value in zip((25, 50, 75), quartiles(provider.times_s), strict=True):
        row[f"p{share}_us"] = round(value * 1e6, 2)
    row["num_samples"] = len(provider.times_s)
    if provider.num_bytes is not None:
        gb_per_s = _gb_per_s(provider)
        row |= {"bytes": provider.num_bytes, "gb_per_s": round(gb_per_s, 2)}
        if ceiling is not None:
            row[f"share_of_{ceiling.name}"] = round(gb_per_s / _gb_per_s(ceiling), 3)
            row["roofline_us"] = round(provider.num_bytes / _gb_per_s(ceiling) / 1e3, 2)
    return row


def _gb_per_s(provider: Provider) -> float:
    assert provider.num_bytes is not None, "a ceiling has bytes"
    return provider.num_bytes / quartiles(provider.times_s)[1] / 1e9


def add_tokens_per_s(found: Sequence[Row]) -> None:
    """Notes in each row of a provider whose call is a token how many tokens that makes in a second."""
    for row in found:
        if row["provider"] not in CEILINGS:
            row["tokens_per_s"] = round(1e6 / row["p50_us"], 1)


def add_ratios(found: Sequence[Row], ours: str, peers: Iterable[str]) -> None:
    """Notes in each of our rows how many times faster than each peer it is."""
    medians = {row["provider"]: row["p50_us"] for row in found}
    for row in found:
        if row["provider"] == ours:
            row["times_faster_than"] = {peer: round(medians[peer] / row["p50_us"], 2) for peer in peers}


def table(found: Sequence[Row]) -> str:
    """Plain text: provider, the facts in which rows differ, and the main figures."""
    facts = dict.fromkeys(key for row in found for key in row if key not in {"provider", *_MEASURED, *_LEFT_OUT})
    differing = [key for key in facts if any(row.get(key) != found[0].get(key) for row in found)]
    scalars = [key for key in differing if not any(isinstance(row.get(key), dict | list) for row in found)]
    measured = [key for key in _MEASURED if any(row.get(key) is not None for row in found)]
    kept = ["provider", *scalars, *measured]
    lines = [kept, *([_cell(row.get(column)) for column in kept] for row in found)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join([line[0].strip().ljust(widths[0]), *line[1:]]).rstrip() for line in padded)


def _cell(value: object) -> str:
    return "" if value is None else str(value)
