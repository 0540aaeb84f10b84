"""Times GPU operations: captured in a CUDA graph, L2 flushed, providers interleaved, one JSON row for each.

A benchmark file makes `Case`s and calls `main`. A call is captured once and replayed between two CUDA events, so the
host's launch overhead is not in the figure: the decoder runs under a graph too. Before every timed replay a buffer
larger than L2 is overwritten. Rounds go A, B, C, C, B, A, so that a drift of the clocks meets all alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_WARM_UP_CALLS = 3


@dataclass
class Case:
    """One thing to time.

    Attributes:
        provider: Who computes it, e.g. "triton" or "torch".
        call: Computes it into buffers that exist already; no synchronisation.
        num_bytes: Bytes that it must read and write, for the bandwidth.
        facts: Shape, width and whatever else tells the rows apart.
    """

    provider: str
    call: Callable[[], object]
    num_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)


def require_gpu(name: str) -> torch.device:
    """Returns the device; exits with one line where there is none."""
    if not torch.cuda.is_available():
        sys.exit(f"error: {name} needs a CUDA device and this machine has none; run it on a machine with an NVIDIA GPU")
    return torch.device("cuda")


def main(name: str, make_cases: Callable[[torch.device], list[Case]]) -> None:
    """Runs a benchmark file: rows to standard output and to `--json`, default benchmarks/results/gpu-NAME.json."""
    parser = argparse.ArgumentParser(description=f"Times {name} on the GPU.")
    parser.add_argument("--rounds", type=int, default=50, help="timed replays of every provider (default 50)")
    parser.add_argument("--json", type=Path, default=RESULTS / f"gpu-{name}.json", help="where the rows are written")
    args = parser.parse_args()
    device = require_gpu(f"bench_{name}")
    rows = measure(make_cases(device), args.rounds)
    report = {"benchmark": name, "environment": environment(), "rows": rows}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(json.dumps(row))


def measure(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Times every case `rounds` times and returns its row, with the bandwidth of a plain copy beside it."""
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    cases = [*cases, Case("copy", lambda: target.copy_(source), 2 * source.numel(), {"op": "ceiling"})]
    graphs = [capture(case.call) for case in cases]
    times_us: list[list[float]] = [[] for _ in cases]
    order = list(range(len(cases)))
    for _ in range(rounds):
        for index in order:
            flush.zero_()
            times_us[index].append(replay_us(graphs[index]))
        order.reverse()
    copy_gb_s = cases[-1].num_bytes / quantile(times_us[-1], 0.5) / 1e3
    return [row(case, times, copy_gb_s) for case, times in zip(cases, times_us, strict=True)]


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Compiles and warms up on a side stream, then captures one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end) * 1e3)


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of the values lie below."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row(case: Case, times_us: list[float], copy_gb_s: float) -> dict[str, Any]:
    """One line of the results."""
    median = quantile(times_us, 0.5)
    gb_s = case.num_bytes / median / 1e3
    return {
        "provider": case.provider,
        **case.facts,
        "p20_us": round(quantile(times_us, 0.2), 2),
        "p50_us": round(median, 2),
        "p80_us": round(quantile(times_us, 0.8), 2),
        "bytes": case.num_bytes,
        "gb_per_s": round(gb_s, 1),
        "share_of_copy": round(gb_s / copy_gb_s, 3),
        "roofline_us": round(case.num_bytes / copy_gb_s / 1e3, 2),
    }


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    query = "name,driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    return {
        "device": torch.cuda.get_device_name(),
        "nvidia_smi": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "has_local_changes": bool(output_of("git", "-C", str(ROOT), "status", "--porcelain")),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def output_of(*command: str) -> str | None:
    """What a program prints; None if there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def random_weight(num_outputs: int, num_inputs: int, device: torch.device) -> Any:
    """A weight of random planes, groups of 128, widths 3, 4, 5, 6 and 8."""
    from flexquant_rl.kernels.bitplane import NestedWeight

    planes = torch.randint(-(2**31), 2**31 - 1, (8, num_outputs, num_inputs // 32), dtype=torch.int32, device=device)
    scale = torch.rand(5, num_outputs, num_inputs // 128, device=device).mul_(0.01).half()
    return NestedWeight(planes, scale, (scale.float() * -3.5).half(), (3, 4, 5, 6, 8), 128, num_inputs)
