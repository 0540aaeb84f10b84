"""Shared fixtures: a random two-layer Llama, a character tokenizer, the real models' folder, poisoned `torch.empty`."""

from __future__ import annotations

import os
import signal

# A shell's background job starts with Ctrl-C ignored, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported: spinning OpenMP threads cost milliseconds per operation on a busy machine with few cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated, its own included: before transformers imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
TINY_VOCAB_SIZE = 128

torch.set_num_threads(1)
# No test is timed: a busy machine would decide it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real models and texts beside the checkout; skips where it is missing."""
    path = ROOT.parent / "shared"
    if not (path / "models").is_dir():
        pytest.skip("no folder `shared` with real models beside this checkout")
    return path


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels run on: CUDA where there is one, else the CPU (Triton kernels interpreted)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_tiny_llama() -> LlamaForCausalLM:
    """Builds a random Llama, always the same: 2 layers, hidden 64, ffn 172 (odd on purpose), 4 heads / 2 kv."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=TINY_VOCAB_SIZE,
        max_position_embeddings=128,
        initializer_range=0.1,  # the default 0.02 gives almost uniform next-token distributions: nothing to tell apart
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20250612)
        model = LlamaForCausalLM(config)
    return model.to(torch.float32).eval()


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a character tokenizer for ASCII: a token's id is its code point; 0, 1, 2 are `<pad>`, `<s>`, `</s>`."""
    specials = ["<pad>", "<s>", "</s>"]
    vocab = {token: token_id for token_id, token in enumerate(specials)}
    vocab |= {chr(code_point): code_point for code_point in range(len(specials), TINY_VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))  # no merges: one token a character
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A fresh random two-layer Llama in float32, in eval mode; the same weights every time, so a test may change it."""
    return build_tiny_llama()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer that covers ASCII; matches `tiny_llama`'s vocabulary of 128."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with `tiny_llama` and `tiny_tokenizer`. Shared by the session: read it only."""
    path = tmp_path_factory.mktemp("tiny-llama")
    build_tiny_llama().save_pretrained(path)
    build_tiny_tokenizer().save_pretrained(path)
    return path


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_and_fill


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends a text: random weights choose an end soon."""
    from flexquant_rl.engine.model import NestedCausalLM  # here, not above: it takes seconds, and few tests need it

    monkeypatch.setattr(NestedCausalLM, "eos_token_ids", ())


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills uninitialised tensors with NaN (integers: their maximum), so that an element nobody writes is seen.

    Use it for a whole module with `pytestmark = pytest.mark.usefixtures("poison_empty")`.
    """
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
