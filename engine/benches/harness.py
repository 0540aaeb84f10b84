"""What all benchmarks share: tests as a gate, interleaved rounds, quartiles, and the facts that a row is judged by.

Rounds are interleaved (A, B, C, C, B, A): what disturbs the machine disturbs all providers. Reported are medians and
quartiles. With one thread the clock is the thread's CPU time, because a busy machine takes wall time away; with more it
is wall time. Each provider has its own memory, so none finds what another has left in the cache.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.kernels import huge_pages
from flexquant_rl.kernels.native import read_bytes

READ = "read"
"""Name of the provider that only reads memory: the ceiling that the others are compared with."""

Clock = Callable[[], float]
Turn = Callable[[Clock], Iterable[float]]
"""Works for a moment and gives the seconds that each of its calls took."""

_ROOT = Path(__file__).resolve().parents[2]
_READ_CHUNK_BYTES = 16 << 20


class BenchRefusedError(Exception):
    """No number is reported, because what would be timed is wrong."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Options of every benchmark."""

    name: ClassVar[str]
    """As in `fq bench NAME`."""
    tests: ClassVar[tuple[str, ...]]
    """Test files that must pass before a number counts, relative to the checkout."""

    rounds: int = 16
    """Turns of every provider; in every second round their order is reversed."""
    json: Path | None = None
    """Also write the result to this file."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain."""
        self._check_positive("rounds")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1; give --{name.replace('_', '-')} 1 or more")


@dataclass
class Provider:
    """One way to do what is timed.

    Attributes:
        name: As in the rows.
        turn: Does it a few times.
        num_bytes: Read from memory by one call; None where that is not the point.
        facts: More about the provider, for its row.
        times_s: Seconds of the calls so far.
    """

    name: str
    turn: Turn
    num_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)


def run_tests(files: Sequence[str], progress: Callable[[str], None]) -> Literal["passed", "not run"]:
    """Runs the tests of what is about to be timed.

    Args:
        files: Relative to the checkout.
        progress: Takes one line about what happens.

    Returns:
        "not run" outside a checkout, where there are no tests, or without pytest.

    Raises:
        BenchRefusedError: If a test fails.
    """
    if not (_ROOT / "tests").is_dir():
        progress('not a checkout, so there are no tests to run first; the rows say "tests": "not run"')
        return "not run"
    if importlib.util.find_spec("pytest") is None:
        progress('pytest is not installed, so no tests are run first; the rows say "tests": "not run"')
        return "not run"
    progress(f"testing first: {' '.join(files)}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stdout.strip() or result.stderr.strip() or "no output").splitlines()[-1]
        raise BenchRefusedError(
            f"the tests of what would be timed fail ({last}); see them with: python -m pytest {' '.join(files)}"
        )
    return "passed"


def calls(ring: Iterable[Callable[[], object]], per_turn: int) -> Turn:
    """A turn that makes the next `per_turn` calls of a ring and times each."""
    cycle = itertools.cycle(ring)

    def turn(clock: Clock) -> list[float]:
        times = []
        for call in itertools.islice(cycle, per_turn):
            start = clock()
            call()
            times.append(clock() - start)
        return times

    return turn


def read_provider(ring: Iterable[Tensor], num_threads: int, per_turn: int) -> Provider:
    """Reads whole tensors of one size with a plain vector loop."""
    tensors = list(ring)
    reads = [functools.partial(read_bytes, tensor, num_threads=num_threads) for tensor in tensors]
    return Provider(READ, calls(reads, per_turn), tensors[0].nbytes)


def memory_ring(num_bytes: int) -> list[Tensor]:
    """Memory of `num_bytes` in huge pages, written once, in chunks of 16 MiB to read."""
    num_chunks = max(2, num_bytes // _READ_CHUNK_BYTES)
    return list(huge_pages.empty(num_chunks * _READ_CHUNK_BYTES).fill_(1).view(torch.int8).split(_READ_CHUNK_BYTES))


def clock_for(num_threads: int) -> tuple[str, Clock]:
    """Name and function of the clock."""
    return ("thread_cpu", time.thread_time) if num_threads == 1 else ("wall", time.perf_counter)


def interleave(
    providers: Sequence[Provider],
    rounds: int,
    clock: Clock,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Gives every provider one turn that does not count and then `rounds` turns.

    Args:
        providers: Their `times_s` are extended.
        rounds: Turns each.
        clock: Seconds.
        track: Wraps the loop over rounds.
    """
    for provider in providers:
        for _ in provider.turn(clock):
            pass
    for index in track(range(rounds)):
        for provider in providers if index % 2 == 0 else reversed(providers):
            provider.times_s.extend(provider.turn(clock))


def rows(providers: Sequence[Provider], common: dict[str, Any]) -> list[dict[str, Any]]:
    """One JSON-able row per provider: quartiles, bandwidth, and its share of the provider that only reads.

    Args:
        providers: After `interleave`.
        common: For every row.
    """
    read_gb_per_s = next((_gb_per_s(provider) for provider in providers if provider.name == READ), None)
    found = []
    for provider in providers:
        quartiles = statistics.quantiles(provider.times_s, n=4) if len(provider.times_s) > 1 else provider.times_s * 3
        row: dict[str, Any] = {"provider": provider.name, **provider.facts}
        row |= {f"p{25 * (i + 1)}_us": round(value * 1e6, 1) for i, value in enumerate(quartiles)}
        row["num_samples"] = len(provider.times_s)
        gb_per_s = _gb_per_s(provider)
        if gb_per_s is not None:
            row |= {"bytes": provider.num_bytes, "gb_per_s": round(gb_per_s, 2)}
            row["share_of_read"] = round(gb_per_s / read_gb_per_s, 3) if read_gb_per_s else None
        found.append(row | common)
    return found


def _gb_per_s(provider: Provider) -> float | None:
    if provider.num_bytes is None:
        return None
    return provider.num_bytes / statistics.median(provider.times_s) / 1e9


def add_ratios(found: Sequence[dict[str, Any]], ours: str, peers: Iterable[str]) -> None:
    """Notes in each of our rows how many times faster than each peer it is."""
    medians = {row["provider"]: row["p50_us"] for row in found}
    for row in found:
        if row["provider"] == ours:
            row["times_faster_than"] = {peer: round(medians[peer] / row["p50_us"], 2) for peer in peers}


def table(found: Sequence[dict[str, Any]]) -> str:
    """The main columns as plain text; threads only where rows differ in them."""
    columns: tuple[str, ...] = (
        "provider",
        "bit_width",
        "p25_us",
        "p50_us",
        "p75_us",
        "gb_per_s",
        "share_of_read",
        "env_steps_per_s",
    )
    if len({row.get("num_threads") for row in found}) > 1:
        columns = (columns[0], "num_threads", *columns[1:])
    kept = [column for column in columns if any(row.get(column) is not None for row in found)]
    lines = [kept, *([_cell(row.get(column)) for column in kept] for row in found)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join([line[0].strip().ljust(widths[0]), *line[1:]]).rstrip() for line in padded)


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def machine_facts() -> dict[str, Any]:
    """What a reader needs to know about the machine and the code; take it before anything else adds to the load."""
    is_checkout = (_ROOT / ".git").exists()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") if is_checkout else None,
        "dirty": bool(_git("status", "--porcelain")) if is_checkout else None,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _git(*arguments: str) -> str | None:
    """What git prints, or None where it cannot be asked."""
    try:
        result = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
