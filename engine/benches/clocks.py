"""How long a call takes: the one part of a benchmark that depends on the device.

On the CPU a clock is read before and after the call. On the GPU two CUDA events surround it, so that the time of a
launch on the host is not in the figure, and a buffer larger than the L2 cache is overwritten first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
"""Does once what is timed; its result is thrown away."""

_WARM_UP_CALLS = 3


class Clock(Protocol):
    """Times calls."""

    @property
    def name(self) -> str:
        """As in the rows."""

    def seconds(self, call: Call) -> float:
        """Makes a call and returns the seconds that it took."""


@dataclass(frozen=True)
class HostClock:
    """Times what runs on the CPU.

    Attributes:
        name: As in the rows.
        now: Seconds at this moment, for a peer that reports moments instead of being called.
    """

    name: str
    now: Callable[[], float]

    def seconds(self, call: Call) -> float:
        """See `Clock.seconds`. Nothing but the call is between the two readings."""
        now = self.now
        began = now()
        call()
        return now() - began


WALL = HostClock("wall", time.perf_counter)
"""The time that passes for the user."""
THREAD_CPU = HostClock("thread_cpu", time.thread_time)
"""The time that this thread has had a core. Other threads are not in it."""


def host_clock(num_threads: int) -> HostClock:
    """The clock of a run: CPU time with one thread, because a busy machine takes wall time away, else wall time."""
    return THREAD_CPU if num_threads == 1 else WALL


class CudaClock:
    """Times what a call starts on the GPU, between two events, after L2 has been overwritten.

    Args:
        device: The CUDA device.
    """

    name = "cuda_events"

    def __init__(self, device: torch.device) -> None:
        num_bytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def seconds(self, call: Call) -> float:
        """See `Clock.seconds`. While the device overwrites L2, the host launches the call."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3


class CudaGraphClock(CudaClock):
    """Captures each call once and times its replays: the decoder too runs under a graph.

    The first time that a call is seen it is compiled, warmed up and captured. That happens in a provider's first turn,
    which does not count.
    """

    name = "cuda_graph"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._graphs: dict[Call, torch.cuda.CUDAGraph] = {}

    def seconds(self, call: Call) -> float:
        """See `Clock.seconds`. The call writes to buffers that exist already, and waits for nothing."""
        if call not in self._graphs:
            self._graphs[call] = capture(call)
        return super().seconds(self._graphs[call].replay)


def capture(call: Call) -> torch.cuda.CUDAGraph:
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
