"""What happens where Triton is installed but cannot compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from flexquant_rl.kernels import launching

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def fresh_answer() -> Iterator[None]:
    """The answer is kept for the process; not that of these tests."""
    launching._why_not_launched.cache_clear()
    yield
    launching._why_not_launched.cache_clear()


def test_a_missing_compiler_is_said_once(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    class Broken:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: object) -> None:
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

            return launch

    monkeypatch.setattr(launching, "_probe_kernel", Broken())
    monkeypatch.setattr(launching, "is_interpreting", lambda: False)
    monkeypatch.setattr("torch.cuda.device", nullcontext)
    make_empty = torch.empty
    monkeypatch.setattr("torch.empty", lambda *size, dtype, device: make_empty(*size, dtype=dtype))
    for _ in range(2):
        reason = launching.why_not_triton(torch.device("cuda:0"))
        assert reason == "Triton fails with RuntimeError: Failed to find C compiler."
    assert [str(warning.message) for warning in recwarn] == [
        "no Triton kernels on cuda:0, falling back to torch (slow): "
        "Triton fails with RuntimeError: Failed to find C compiler."
    ]


def test_where_there_is_nothing_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launching.why_not_triton(torch.device("cpu")) is None
    monkeypatch.setattr(launching, "triton", None)
    assert launching.why_not_triton(torch.device("cuda")) == "Triton is not installed"


@pytest.mark.gpu
def test_a_launch_works_on_a_gpu() -> None:
    assert launching.why_not_triton(torch.device("cuda")) is None
