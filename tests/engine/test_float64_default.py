"""A program that has made float64 torch's default gets the same model, the same tokens and the same signals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from alternating import Alternating
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from flexquant_rl.engine.checkpoint import load_model, save_checkpoint
from flexquant_rl.engine.control.artefact import load_policy, save_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import profile_model
from flexquant_rl.engine.control.request import Request
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.decoding.choice import open_session
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.serving import Engine

TOKEN_IDS = torch.arange(3, 27).view(1, 24)
CONFIG = QuantizationConfig(group_size=32)


@contextmanager
def float64_as_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def outputs(model: NestedCausalLM, decoder: Any) -> list[Tensor]:
    """What a few verbs put out."""
    session = open_session(model, decoder=decoder)
    prompt = session.prefill(TOKEN_IDS[:, :20])
    steps = session.extend(TOKEN_IDS[:, 20:22], torch.full((model.num_units,), 4))
    fork = session.fork().step(TOKEN_IDS[:, 22], torch.tensor([3, 8, 5]))
    found = [prompt.logits, steps.logits, steps.crest, fork.logits, fork.residual_update]
    return [*found, session.score(TOKEN_IDS), session.score(TOKEN_IDS, torch.tensor([3, 8, 5]), first=10)]


@pytest.mark.parametrize("decoder", ["lean", "hf"])
def test_loading_and_decoding(decoder: Any, nested_model: NestedCausalLM, tiny_model_dir: Path, tmp_path: Path) -> None:
    expected = outputs(nested_model, decoder)
    with float64_as_default():
        model = load_model(str(tiny_model_dir), CONFIG)
        save_checkpoint(model, tmp_path / "out")
        loaded = load_model(str(tmp_path / "out"))
        actual = outputs(model, decoder)
    assert model.fingerprint == loaded.fingerprint == nested_model.fingerprint
    for held in (model, loaded):
        tensors = [*held.hf_model.parameters(), *held.hf_model.buffers()]
        assert not [tensor for tensor in tensors if tensor.dtype == torch.float64]
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_another_precision_is_nested_in_float32(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
) -> None:
    model = nest(tiny_llama.to(dtype), tiny_tokenizer, CONFIG)
    session = open_session(model, decoder="hf")
    session.prefill(TOKEN_IDS[:, :-1], bit_widths=torch.zeros(model.num_units, dtype=torch.int64))
    last = session.step(TOKEN_IDS[:, -1], torch.zeros(model.num_units, dtype=torch.int64)).logits
    torch.testing.assert_close(last, session.score(TOKEN_IDS)[:, -1], rtol=1e-4, atol=1e-4)


def served(model: NestedCausalLM, policy: Policy, decoder: Any) -> list[Any]:
    """Tokens and widths of a sampled text, and the likelihood of another, under a profile made here."""
    profile = profile_model(model, TOKEN_IDS[:, :12].repeat(2, 1), roofline_cost(model))
    engine = Engine(model, policy, profile, max_length=40, decoder=decoder)
    with closing(engine):
        tokens = list(engine.generate(Request(TOKEN_IDS[0, :6], 10, kl_weight=7.0, temperature=0.8, top_p=0.9)))
        likelihoods = engine.loglikelihood([([3, 4, 5], [9, 10, 11])], kl_weight=7.0)
    return [profile.sensitivity.tolist(), [(t.token_id, t.bit_widths.tolist()) for t in tokens], likelihoods]


@pytest.mark.parametrize("decoder", ["lean", "hf"])
def test_serving_and_signals(decoder: Any, nested_model: NestedCausalLM) -> None:
    before, after = Alternating(), Alternating()
    expected = served(nested_model, before, decoder)
    with float64_as_default():
        actual = served(nested_model, after, decoder)
    assert actual == expected
    for mine, theirs in zip(after.seen, before.seen, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("decoder", ["lean", "hf"])
def test_learned_policy(decoder: Any, nested_model: NestedCausalLM, tmp_path: Path) -> None:
    schema = SignalSchema(nested_model.num_units, nested_model.bit_widths)
    card = PolicyCard(schema, nested_model.fingerprint, tuple(unit.name for unit in nested_model.units), ())
    torch.manual_seed(0)
    profile = profile_model(nested_model, TOKEN_IDS[:, :12], roofline_cost(nested_model))
    save_policy(LearnedPolicy(PrecisionNet(schema), card), profile, tmp_path / "policy")
    expected = served(nested_model, load_policy(tmp_path / "policy"), decoder)
    with float64_as_default():
        actual = served(nested_model, load_policy(tmp_path / "policy"), decoder)
    assert actual == expected
