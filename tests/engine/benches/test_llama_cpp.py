"""llama.cpp's files: what it computes from one is what Hugging Face computes from the model that was written.

`FQ_REAL_MODELS=FOLDER pytest tests/engine/benches/test_llama_cpp.py -s` compares the real models of a folder too.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from flexquant_rl.engine.benches import llama_cpp
from flexquant_rl.engine.benches.llama_cpp import GgufType, LlamaCppSession, has_llama_cpp, write_gguf
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.loading import load_causal_lm

needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python and gguf are not installed")
VOCAB_SIZE = 90
_TEXT = (
    "def quantize(weights, bits):\n    scale = weights.abs().max() / (2 ** (bits - 1) - 1)\n    return",
    "Once upon a time there was a little girl who lived near the forest. One day she",
)


def tiny(kind: str, **changes: Any) -> PreTrainedModel:
    """A random model with sharp attention and biases that are not zero: what is in the wrong place shows."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = config_class(**(sizes | heads | {"initializer_range": 0.1} | changes))
    model = random_model(model_class, config, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(2)
    return model


def errors(model: PreTrainedModel, path: Path, gguf_type: GgufType, token_ids: torch.Tensor) -> list[float]:
    """Of the logits after each token but the first half, against Hugging Face: relative, in one batch and in steps."""
    with torch.inference_mode():
        expected = model(token_ids[None]).logits[0].float().numpy()
    write_gguf(model, path, gguf_type)
    session = LlamaCppSession(path, max_length=64, num_threads=1)
    half = len(token_ids) // 2
    session.prefill(token_ids[:half].tolist())
    batch = session.extend(token_ids[half:].tolist()).copy()
    session.truncate(half)
    steps = np.stack([session.step(token_id).copy() for token_id in token_ids[half:].tolist()])
    session.close()
    scale = np.linalg.norm(expected[half:], axis=1)
    return [float((np.linalg.norm(found - expected[half:], axis=1) / scale).max()) for found in (batch, steps)]


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("llama", {"head_dim": 32, "mlp_bias": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_logits_as_hugging_face(tmp_path: Path, kind: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    stored: Any = tiny(kind, **changes).to(dtype)
    model = copy.deepcopy(stored).float()
    types: tuple[GgufType, ...] = ("F32", "F16", "Q8_0", "Q4_0")
    found = {name: errors(model, tmp_path / name, name, torch.arange(3, 23)) for name in types}
    assert max(found["F32"]) < 5e-3, "llama.cpp rounds within attention even so"
    assert max(found["F16"]) < 1e-2
    assert max(found["Q8_0"]) < 0.2
    assert max(found["Q8_0"]) < max(found["Q4_0"])
    write_gguf(stored, tmp_path / "stored", "F32")
    assert (tmp_path / "stored").read_bytes() == (tmp_path / "F32").read_bytes()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_order_of_rows_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(llama_cpp._INTERLEAVED, kind, not llama_cpp._INTERLEAVED[kind])
    assert max(errors(tiny(kind), tmp_path / "model", "F32", torch.arange(3, 23))) > 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "without a window"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = tiny("qwen2")
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(InputError, match=message):
        llama_cpp.check_writable(model, "F16")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_whole_blocks() -> None:
    model = tiny("qwen2", intermediate_size=100)
    llama_cpp.check_writable(model, "F16")
    for gguf_type in llama_cpp.GGUF_BITS:
        with pytest.raises(InputError, match=f"ffn_down.weight has rows of 100, which {gguf_type} cannot hold"):
            llama_cpp.check_writable(model, gguf_type)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FQ_REAL_MODELS"), reason="FQ_REAL_MODELS names no folder of real models")
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_same_logits_of_a_real_model(tmp_path: Path, name: str) -> None:
    model, tokenizer = load_causal_lm(str(Path(os.environ["FQ_REAL_MODELS"]) / name))
    for text in _TEXT:
        token_ids = torch.tensor(tokenizer(text).input_ids)
        types: tuple[GgufType, ...] = ("F32", "F16", "Q8_0")
        found = {kind: errors(model, tmp_path / kind, kind, token_ids) for kind in types}
        print(name, found)
        assert max(found["F32"]) < 5e-3
        assert max(found["F16"]) < 1e-2
        assert max(found["Q8_0"]) < 0.15
