"""Capturing what the GPU is to replay: compiled first, on the stream and in the memory pool that all graphs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UP_STEPS = 2


class Capture:
    """Captures launches as CUDA graphs.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # cuBLAS has a workspace for every stream: on another one it would be allocated from the pool, while capturing.
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, launch: Callable[[], None], *, also: Callable[[], None] | None = None) -> torch.cuda.CUDAGraph:
        """Compiles on a side stream, by launching, then captures there.

        Args:
            launch: Launches what is captured; what it does to the state happens twice.
            also: Launches what shall be compiled now too, and not captured.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_STEPS):
                launch()
            if also is not None:
                also()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            launch()
        return graph
