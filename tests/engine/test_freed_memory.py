"""A served model holds its nested weights and what is not nested; what was freed is the system's again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.freed_memory import return_freed_memory
from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.quantisation.config import QuantizationConfig


def resident_bytes() -> int:
    """What the process holds of the machine's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_blocks_go_back() -> None:
    blocks = [bytearray(b"x") * 100_000 for _ in range(2000)]
    last = blocks.pop()  # keeps the end of the heap in use
    blocks.clear()
    before = resident_bytes()
    return_freed_memory()
    assert len(last) == 100_000
    assert before - resident_bytes() > 100 << 20


def test_without_reference_nothing_holds_four_bytes_per_weight(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr("flexquant_rl.engine.checkpoint.return_freed_memory", lambda: calls.append(None))
    model = load_model(str(tiny_model_dir), QuantizationConfig(), keep_reference=False)
    assert len(calls) == 1
    for linear in model.nested_linears().values():
        held = sum(buffer.nbytes for buffer in linear.buffers())
        assert held == linear.planes.nbytes + linear.scale.nbytes + linear.offset.nbytes
    nested = {id(buffer) for linear in model.nested_linears().values() for buffer in linear.buffers()}
    others = [*model.hf_model.parameters(), *model.hf_model.buffers()]
    plain = sum(tensor.numel() for tensor in others if id(tensor) not in nested)
    assert plain < 2 * model.embedding_matrix().numel()  # the embedding, norms, rotary frequencies
    assert all(isinstance(model.hf_model.get_submodule(name), NestedLinear) for name in model.nested_linears())


def test_the_reference_can_be_dropped(tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), QuantizationConfig())
    assert model.has_reference
    assert not model.drop_reference().has_reference
