"""A rotated model is the same function, and stays it through nesting, saving, loading and an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import tiny_causal_lm, tiny_config
from transformers import PreTrainedModel

from flexquant_rl.engine.checkpoint import load_checkpoint, save_checkpoint
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import REFERENCE_WIDTH
from flexquant_rl.engine.loading import load_for_serving
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.quantisation.rotation import ROTATED_MODEL_TYPES, orthogonal_matrix, rotate
from flexquant_rl.engine.quantisation.unfinished import nested_start

MODELS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in ROTATED_MODEL_TYPES),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"hidden_size": 48, "head_dim": 24}),
]
TOKENS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(5))


def model_of(model_type: str, **changes: Any) -> PreTrainedModel:
    return tiny_causal_lm(tiny_config(model_type, **changes))


@pytest.mark.parametrize("size", [1, 2, 24, 64, 96, 7])
def test_the_matrix_is_orthogonal_and_mixes_every_column(size: int) -> None:
    matrix = orthogonal_matrix(size, torch.Generator().manual_seed(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (matrix != 0).all()


@pytest.mark.parametrize(("model_type", "changes"), MODELS)
def test_the_unquantised_model_is_the_same_function(model_type: str, changes: dict[str, Any]) -> None:
    model = model_of(model_type, **changes)
    with torch.no_grad():
        before = model(TOKENS).logits.double()
        stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rotate(model, embedding_dtype=torch.float32)
        after = model(TOKENS).logits.double()
        rounded = model_of(model_type, **changes)
        rotate(rounded)
        in_16_bits = rounded(TOKENS).logits.double()
    size = before.abs().max()
    assert float((after - before).abs().max() / size) < 1e-4
    assert float((in_16_bits - before).abs().max() / size) < 1e-2
    changed = model.state_dict()
    assert all(not torch.equal(changed[name], stored[name]) for name in stored if name.endswith("proj.weight"))
    assert all((changed[name] == 1).all() for name in stored if name.endswith("layernorm.weight"))


def test_another_seed_is_another_rotation_of_the_same_function() -> None:
    first, second = model_of("llama"), model_of("llama")
    rotate(first, seed=1)
    rotate(second, seed=2)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(first.get_submodule(name).weight, second.get_submodule(name).weight)
    with torch.no_grad():
        torch.testing.assert_close(first(TOKENS).logits, second(TOKENS).logits, rtol=0, atol=0.05)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma", "phi", "opt"])
def test_other_norms_are_refused_and_nothing_has_changed(model_type: str) -> None:
    model = model_of(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=f"norms of model type '{model_type}', only .* leave the rotation out"):
        nest(model, None, QuantizationConfig(rotate=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_head_that_stays_tied_is_refused() -> None:
    config = QuantizationConfig(rotate=True, quantize_head=False)
    with pytest.raises(InputError, match="rotate=True gives the head weights of its own"):
        nest(model_of("llama", tie_word_embeddings=True), None, config)
    nest(model_of("llama", tie_word_embeddings=False), None, config)


def scores(model: NestedCausalLM, width: int) -> torch.Tensor:
    return DecodeSession(model).score(TOKENS, torch.full((model.num_units,), width))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_checkpoint_holds_it(is_tied: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_for_serving(str(tiny_model_dir))[1]
    plain = model_of("llama", tie_word_embeddings=is_tied)
    with torch.no_grad():
        expected = plain(TOKENS).logits
    model = nest(plain, tokenizer, QuantizationConfig(rotate=True))
    torch.testing.assert_close(
        scores(model, REFERENCE_WIDTH), expected, rtol=0, atol=1e-2 * float(expected.abs().max())
    )
    save_checkpoint(model, tmp_path / "nested")
    loaded = load_checkpoint(tmp_path / "nested")
    assert loaded.config.rotate
    for width in (3, 8):
        torch.testing.assert_close(scores(loaded, width), scores(model, width), rtol=0, atol=0)


def test_what_an_interruption_left_has_the_rotated_reference(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_for_serving(str(tiny_model_dir))[1]
    config = QuantizationConfig(rotate=True)
    first, again = (nested_start(tmp_path, model_of("llama"), tokenizer, config, None) for _ in range(2))
    torch.testing.assert_close(scores(again, REFERENCE_WIDTH), scores(first, REFERENCE_WIDTH), rtol=0, atol=0)
