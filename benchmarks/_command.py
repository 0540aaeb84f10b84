"""The command line of the benchmark files here: each times something on the GPU, with the harness of `fq bench`.

The tests of what is timed run first. A table and, as the last line, the result as JSON go to standard output; the
result also goes to `--json`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from flexquant_rl.agents.commands.process import FAILURE, command, print_result
from flexquant_rl.agents.progress import say, track
from flexquant_rl.engine.benches.ceilings import copy_provider
from flexquant_rl.engine.benches.clocks import Clock, CudaGraphClock
from flexquant_rl.engine.benches.harness import (
    BenchRefusedError,
    Provider,
    Row,
    Track,
    interleave,
    rows,
    run_bench,
    table,
)
from flexquant_rl.engine.benches.options import BenchOptions
from flexquant_rl.engine.errors import InputError

_RESULTS = Path(__file__).resolve().parent / "results"
_SEED = 0

Options = TypeVar("Options", bound=BenchOptions)
Measure = Callable[[Options, torch.device, Track], list[Row]]
"""Times everything on a device and returns a row per provider."""


@dataclass(frozen=True, kw_only=True)
class KernelBench(BenchOptions):
    """Times a kernel on the GPU beside torch's operations and a plain copy."""

    rounds: int = 50
    """Timed replays of every provider; in every second round their order is reversed."""


def main(op: str, providers: Callable[..., list[Provider]], sizes: Sequence[tuple[Any, ...]]) -> None:
    """Runs the benchmark of a kernel and exits.

    Args:
        op: Name of the kernel, as in tests/kernels/test_OP.py.
        providers: Takes a device, a clock and one of the sizes, and makes what is timed at that size.
        sizes: All of them are timed in one run.
    """

    def measure(options: KernelBench, device: torch.device, tracked: Track) -> list[Row]:
        clock = CudaGraphClock(device)
        found = [copy_provider(clock, device), *at_sizes(device, clock, providers, sizes)]
        interleave(found, options.rounds, tracked)
        return rows(found, {"op": op, "clock": clock.name, "seed": _SEED})

    run(op, (f"tests/kernels/test_{op}.py",), KernelBench, measure)


def at_sizes(
    device: torch.device,
    clock: Clock,
    providers: Callable[..., list[Provider]],
    sizes: Sequence[tuple[Any, ...]],
) -> list[Provider]:
    """What is timed at all sizes, always of the same random numbers."""
    torch.manual_seed(_SEED)
    return [provider for size in sizes for provider in providers(device, clock, *size)]


def run(name: str, tests: tuple[str, ...], options_type: type[Options], measure: Measure[Options]) -> None:
    """Runs a benchmark with the options of the command line and exits.

    Args:
        name: The file is bench_NAME.py; its results go to results/gpu-NAME.json unless `--json` says otherwise.
        tests: Test files that must pass, relative to the checkout.
        options_type: What the command line may say.
        measure: Times everything.
    """
    sys.exit(command(lambda: _run(name, tests, options_type, measure)))


def _run(name: str, tests: tuple[str, ...], options_type: type[Options], measure: Measure[Options]) -> None:
    options = tyro.cli(options_type, prog=f"bench_{name}.py")
    options.validate()
    if not torch.cuda.is_available():
        raise InputError(
            f"bench_{name} needs a CUDA device and this machine has none; run it on a machine with an NVIDIA GPU"
        )

    def tracked(items: Iterable[int]) -> Iterable[int]:
        return track(items, f"timing {name}")

    path = options.json or _RESULTS / f"gpu-{name}.json"
    try:
        result = run_bench(
            name, tests, lambda: measure(options, torch.device("cuda"), tracked), path=path, progress=say
        )
    except BenchRefusedError as error:
        say(f"error: {error}")
        sys.exit(FAILURE)
    print(table(result["rows"]))
    print_result(result)
