"""A model whose weights were gathered is the same model, with its weights in one piece of memory."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flexquant_rl.engine.checkpoint import load_checkpoint, save_checkpoint
from flexquant_rl.engine.decoding.graph_weights import fuse_weights
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.decoding.weight_block import gather_weights, place, placed_bytes
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels import huge_pages
from flexquant_rl.kernels.bitplane import NestedWeight
from flexquant_rl.kernels.native import supported_isas

Build = Callable[..., NestedCausalLM]
LINE_WORDS = 16


def random_weight(num_outputs: int, num_inputs: int) -> NestedWeight:
    planes = torch.randint(-(2**31), 2**31 - 1, (8, num_outputs, num_inputs // 32), dtype=torch.int32)
    pair_shape = (2, num_outputs, num_inputs // 64)
    return NestedWeight(planes, torch.rand(pair_shape).half(), torch.rand(pair_shape).half(), (4, 8), 64, num_inputs)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 128), (7, 384), (64, 2048)])
def test_placed_weights_are_equal_and_do_not_overlap(num_outputs: int, num_inputs: int) -> None:
    sources = [random_weight(num_outputs, num_inputs) for _ in range(3)]
    size = placed_bytes(sources[0])
    block = huge_pages.empty(3 * size)
    copies = [place(source, block, index * size) for index, source in enumerate(sources)]
    for source, copy in zip(sources, copies, strict=True):
        assert placed_bytes(copy) == size
        for part in ("planes", "scale", "offset"):
            assert torch.equal(getattr(copy, part), getattr(source, part))
            assert getattr(copy, part).data_ptr() % huge_pages.ALIGNMENT == 0


def test_planes_do_not_begin_in_the_same_cache_set() -> None:
    """4,096 x 4,096: planes of 2 MiB, which would all begin at a multiple of 4 KiB."""
    weight = random_weight(256, 4096)
    copy = place(weight, huge_pages.empty(placed_bytes(weight)), 0)
    sets = [copy.planes[plane].data_ptr() // 64 % 64 for plane in range(8)]
    distances = {min((a - b) % 64, (b - a) % 64) for a in sets for b in sets if a != b}
    assert len(set(sets)) == 8
    assert min(distances) >= 5  # the line being read and four fetched ahead
    assert copy.planes.stride(0) % LINE_WORDS == 0


def test_a_gathered_model_is_the_same_model(build: Build, tmp_path: Path) -> None:
    model, twin = (build("llama", device="cpu", vocab_size=131) for _ in range(2))
    gather_weights(model)
    storages = {
        tensor.untyped_storage().data_ptr()
        for linear in model.nested_linears().values()
        for tensor in (linear.planes, linear.scale, linear.offset)
    }
    assert len(storages) == 1
    prompt = torch.tensor([[7, 30, 5, 61]])
    assert torch.equal(DecodeSession(model).prefill(prompt).logits, DecodeSession(twin).prefill(prompt).logits)
    assert save_checkpoint(model, tmp_path / "gathered") == save_checkpoint(twin, tmp_path / "plain")
    assert load_checkpoint(tmp_path / "gathered").fingerprint == twin.fingerprint
    before = [linear.planes.data_ptr() for linear in model.nested_linears().values()]
    gather_weights(model)
    assert [linear.planes.data_ptr() for linear in model.nested_linears().values()] == before


def test_threads_gather_a_model_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []

    def empty(num_bytes: int) -> torch.Tensor:
        blocks.append(huge_pages.zeros(torch.Size((num_bytes,)), torch.uint8))
        return blocks[-1]

    model = build("llama", device="cpu")
    monkeypatch.setattr("flexquant_rl.engine.decoding.weight_block.huge_pages.empty", empty)
    interval, barrier = sys.getswitchinterval(), threading.Barrier(4)

    def run() -> None:
        barrier.wait()
        gather_weights(model)

    threads = [threading.Thread(target=run) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    (block,) = blocks
    storages = {linear.planes.untyped_storage().data_ptr() for linear in model.nested_linears().values()}
    assert storages == {block.untyped_storage().data_ptr()}


@pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")
def test_a_session_outlives_moves_of_the_weights(build: Build) -> None:
    """A decoder holds addresses of the weights: they stay good when the model's tensors go elsewhere."""
    model = build("llama", device="cpu")
    prompt, token = torch.tensor([[7, 30, 5, 61]]), torch.tensor([9])
    widths = torch.full((model.num_units,), 8)
    session = LeanSession(LeanDecoder(model))
    session.prefill(prompt)
    expected = session.fork().step(token, widths).logits
    fuse_weights(model)
    gc.collect()
    assert torch.equal(session.fork().step(token, widths).logits, expected)
    other = LeanSession(LeanDecoder(model))  # gathers again
    gc.collect()
    other.prefill(prompt)
    assert torch.equal(other.step(token, widths).logits, expected)
    assert torch.equal(session.step(token, widths).logits, expected)
