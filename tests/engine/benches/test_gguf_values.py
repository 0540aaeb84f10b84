"""llama.cpp's quantiser: the values that are read back are those that it computes with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from random_models import random_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from flexquant_rl.engine.benches.gguf_types import QuantiserType
from flexquant_rl.engine.benches.gguf_values import quantise_gguf, read_values
from flexquant_rl.engine.benches.llama_cpp import LlamaCppSession, has_llama_cpp, write_gguf

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python and gguf are not installed")
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 90},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1},
}


def models() -> list[PreTrainedModel]:
    return [
        random_model(LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True), seed=3),
        random_model(Qwen2ForCausalLM, Qwen2Config(**SIZES), seed=4),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["tied llama", "qwen2"])
def test_values_of_an_exact_file_are_the_model(tmp_path: Path, which: int) -> None:
    model = models()[which]
    write_gguf(model, tmp_path / "model", "F32")
    other: Any = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7)
    num_bytes = read_values(tmp_path / "model", other)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(num_bytes[name] == 4 * linear.weight.numel() for name, linear in linears.items())


@pytest.mark.parametrize("which", [0, 1], ids=["tied llama", "qwen2"])
@pytest.mark.parametrize("quantiser_type", get_args(QuantiserType))
def test_values_are_those_that_llama_cpp_computes_with(
    tmp_path: Path, which: int, quantiser_type: QuantiserType
) -> None:
    """Its logits are near those of Hugging Face with these values, much nearer than with the weights of before."""
    model = models()[which]
    write_gguf(model, tmp_path / "f16", "F16")
    quantise_gguf(tmp_path / "f16", tmp_path / "small", quantiser_type)
    quantised = copy.deepcopy(model)
    num_bytes = read_values(tmp_path / "small", quantised)
    token_ids = torch.arange(3, 23)
    with torch.inference_mode():
        before, after = (one(token_ids[None]).logits[0].numpy() for one in (model, quantised))
    session = LlamaCppSession(tmp_path / "small", max_length=32, num_threads=1)
    found = session.extend(token_ids.tolist()).copy()
    session.close()
    near, far = (float(np.linalg.norm(found - other)) for other in (after, before))
    # It rounds activations to 8 bits besides, which is as much as its weights lose at Q8_0.
    assert near < (0.8 if quantiser_type == "Q8_0" else 0.5) * far
    total = sum(num_bytes[name] for name, one in model.named_modules() if isinstance(one, torch.nn.Linear))
    weights = sum(one.weight.numel() for one in model.modules() if isinstance(one, torch.nn.Linear))
    least = {"Q8_0": 8.5, "Q5_0": 5.5}.get(quantiser_type, 4.5)
    assert least <= 8 * total / weights < 8.6
