"""q, k, v and gate, up become one matrix each, and the model's own tensors are its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flexquant_rl.engine.checkpoint import load_checkpoint, save_checkpoint
from flexquant_rl.engine.decoding.graph_weights import step_weights
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels.native import supported_isas

Build = Callable[..., NestedCausalLM]


def parts(model: NestedCausalLM) -> list[Tensor]:
    linears = model.nested_linears().values()
    return [tensor for linear in linears for tensor in (linear.planes, linear.scale, linear.offset)]


def storages(model: NestedCausalLM) -> dict[int, int]:
    """Bytes of every storage that nested weights lie in."""
    tensors = [part.untyped_storage() for part in parts(model)]
    return {storage.data_ptr(): storage.nbytes() for storage in tensors}


def test_weights_exist_once(build: Build) -> None:
    model, twin = build("qwen2"), build("qwen2")
    fused = step_weights(model, 20)
    assert sum(storages(model).values()) == sum(storages(twin).values())
    assert len(storages(twin)) - len(storages(model)) == 3 * 3 * model.num_layers
    for own, other in zip(parts(model), parts(twin), strict=True):
        assert torch.equal(own, other)
    for layer in fused.layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            assert linear.weight is not None
            assert linear.weight.planes.untyped_storage().data_ptr() in storages(model)
    before = storages(model)
    step_weights(model, 30)
    assert storages(model) == before


def test_a_fused_model_is_the_same_model(build: Build, tmp_path: Path) -> None:
    """To Hugging Face's modules, to checkpoints, of which none gets a whole matrix, and to the CPU's decoder."""
    model, twin = build("llama", vocab_size=131), build("llama", device="cpu", vocab_size=131)
    prompt = torch.tensor([[7, 30, 5, 61]])
    expected = DecodeSession(twin).prefill(prompt).logits
    step_weights(model, 20)
    torch.testing.assert_close(DecodeSession(model).prefill(prompt).logits.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert save_checkpoint(model, tmp_path / "fused") == save_checkpoint(twin, tmp_path / "plain")
    assert load_checkpoint(tmp_path / "fused").fingerprint == twin.fingerprint
    if supported_isas():
        sessions = [LeanSession(LeanDecoder(one)) for one in (model.to("cpu"), twin)]
        assert torch.equal(*(session.prefill(prompt).logits for session in sessions))
