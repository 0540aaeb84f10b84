"""Weights of calibration tokens: the second derivative of the KL at each linear's outputs, by brute force."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.nesting import unseen
from flexquant_rl.engine.quantisation import token_weights as module
from flexquant_rl.engine.quantisation.token_weights import token_weights

VOCAB, TOKENS = 40, 6


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.5, tie_word_embeddings=False, **sizes))


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.5, **sizes))


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def hf_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = request.param().eval()
    return model


def names_of(hf_model: PreTrainedModel) -> list[str]:
    if isinstance(hf_model, GPT2LMHeadModel):
        return ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "lm_head"]
    layers = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj")
    return [*layers, "lm_head"]


@pytest.fixture
def tokens() -> Tensor:
    """`[TOKENS]`."""
    return torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))


def kl_per_squared_error(hf_model: PreTrainedModel, name: str, tokens: Tensor) -> Tensor:
    """Trace of the KL's second derivative in the linear's outputs over their number, token by token, in float64."""
    model = hf_model.double()
    model.set_attn_implementation("eager")  # torch's own attention has no second derivative
    linear = model.get_submodule(name)

    def kl(error: Tensor) -> Tensor:
        def add(_: nn.Module, args: object, output: Tensor) -> Tensor:
            return output + error

        handle = linear.register_forward_hook(add)
        changed = model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
        handle.remove()
        reference = model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1).detach()
        return (reference.exp() * (reference - changed)).sum()

    width = VOCAB if name == "lm_head" else int(linear(torch.zeros(1, num_inputs(linear)).double()).shape[-1])
    second: Tensor = torch.autograd.functional.hessian(kl, torch.zeros(TOKENS, width, dtype=torch.float64))
    return torch.einsum("tntn->t", second) / width


def num_inputs(linear: nn.Module) -> int:
    assert isinstance(linear.weight, Tensor)
    return linear.weight.shape[1 if isinstance(linear, nn.Linear) else 0]


def test_mean_over_probes_is_the_second_derivative_of_the_kl(
    hf_model: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EXPONENT", 1.0)
    monkeypatch.setattr(module, "has_bfloat16", lambda device: False)
    names = names_of(hf_model)
    found = token_weights(hf_model, names, tokens.repeat(400, 1), unseen)
    for name in names:
        expected = kl_per_squared_error(hf_model, name, tokens)
        mean = found[name].view(400, TOKENS).double().mean(0)
        torch.testing.assert_close(mean, expected / expected.mean(), rtol=0.2, atol=0.01, msg=name)


def test_weights_are_repeatable_have_mean_one_and_are_tempered(hf_model: PreTrainedModel, tokens: Tensor) -> None:
    names, windows = names_of(hf_model), torch.stack((tokens, tokens.flip(0)))
    found = token_weights(hf_model, names, windows, unseen)
    again = token_weights(hf_model, names, windows, unseen)
    for name, weights in found.items():
        assert weights.shape == (2 * TOKENS,)
        assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
        assert torch.equal(weights, again[name])
    assert set(found) == set(names)
    assert not any(parameter.requires_grad for parameter in hf_model.parameters())
    for part in hf_model.modules():
        assert not part._forward_hooks, "a hook was left behind"


def test_bfloat16_weighs_much_the_same(
    hf_model: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for half in (False, True):
        monkeypatch.setattr(module, "has_bfloat16", lambda device, half=half: half)
        found.append(token_weights(hf_model, names_of(hf_model), tokens[None], unseen))
    for name, weights in found[0].items():
        torch.testing.assert_close(found[1][name], weights, rtol=0.1, atol=0.05, msg=name)


def test_a_linear_that_nothing_reaches_has_no_weights(tokens: Tensor) -> None:
    hf_model = llama().eval()
    hf_model.model.layers[0].mlp.register_module("spare", nn.Linear(16, 8))
    assert token_weights(hf_model, ["model.layers.0.mlp.spare"], tokens[None], unseen) == {}


def test_tokens_that_do_not_matter_count_alike(tokens: Tensor) -> None:
    hf_model = llama().eval()
    hf_model.lm_head.weight.data.zero_()  # whatever the layers do, all tokens are as probable
    found = token_weights(hf_model, ["model.layers.0.mlp.gate_proj"], tokens[None], unseen)
    assert torch.equal(found["model.layers.0.mlp.gate_proj"], torch.ones(TOKENS))


def test_a_gradient_that_is_not_finite_is_named(tokens: Tensor) -> None:
    """The logits are finite, what is sent back is not."""
    hf_model = llama().eval()
    names = ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]

    def broken(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("nan"))

    handle = hf_model.get_submodule(names[2]).register_forward_hook(broken)
    with pytest.raises(
        InputError, match=rf"^{names[2]}: the gradients of {TOKENS} of {TOKENS} calibration tokens are NaN"
    ):
        token_weights(hf_model, names, tokens[None], unseen)
    handle.remove()
    assert list(token_weights(hf_model, names, tokens[None], unseen)) == names


def test_the_memory_of_a_window_goes_back_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M held 4 GB after 37 windows instead of 1.7."""
    windows = torch.zeros(3, TOKENS, dtype=torch.int64)
    happened: list[str] = []

    def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
        for item in items:
            happened.append("read")
            yield item

    monkeypatch.setattr(module, "return_freed_memory", lambda: happened.append("given back"))
    token_weights(llama().eval(), ["lm_head"], windows, progress)
    assert happened == ["read", "given back"] * 3
