"""Fixtures of the engine's tests: nested tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from defined_product import defined_product
from random_models import random_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.profile import Profile, profile_model
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig

FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 90, "num_attention_heads": 3}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 20}),
}


@pytest.fixture(scope="session")
def nested_model(tiny_model_dir: Path) -> NestedCausalLM:
    """The tiny Llama, nested, with its unquantised reference; units: two layers and the head. Read it only."""
    return load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))


@pytest.fixture(scope="session")
def profile(nested_model: NestedCausalLM) -> Profile:
    """Its profile, measured on random letters."""
    windows = torch.randint(97, 123, (2, 12), generator=torch.Generator().manual_seed(0))
    return profile_model(nested_model, windows, roofline_cost(nested_model))


@pytest.fixture(scope="session")
def half_unit_model(tiny_model_dir: Path) -> NestedCausalLM:
    """The same model with attention and MLP as units of their own: five units. Read it only."""
    return load_model(str(tiny_model_dir), QuantizationConfig(group_size=32, unit="half"))


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Replaces the product of the GPU's passes by its definition where kernels are interpreted."""
    if device.type == "cpu":
        monkeypatch.setattr("flexquant_rl.engine.decoding.graph_pass.gemv", defined_product)


@pytest.fixture
def build(tiny_tokenizer: Any, device: torch.device) -> Callable[..., NestedCausalLM]:
    """Makes a random two-layer model with norms and biases that are not trivial, where kernels run."""

    def make(
        family: str,
        *,
        quantize_head: bool = True,
        unit: str = "half",
        device: torch.device | str = device,
        **sizes: int,
    ) -> NestedCausalLM:
        config_class, model_class, options = FAMILIES[family]
        shape = {
            "vocab_size": 83,
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 96,
            "initializer_range": 0.15,
            "eos_token_id": None,
        }
        model = random_model(model_class, config_class(**(shape | options | sizes)), seed=6)
        config = QuantizationConfig(group_size=32, unit=unit, quantize_head=quantize_head)  # type: ignore[arg-type]
        return nest(model, tiny_tokenizer, config).to(device)

    return make
