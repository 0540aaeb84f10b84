"""KL of many allocations at once against one whole pass for each, over families, units and heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_windows
from random_models import tiny_causal_lm, tiny_config
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flexquant_rl.engine.control import allocation_kl
from flexquant_rl.engine.control.allocation_kl import (
    TextFacts,
    affordable_windows,
    allocation_facts,
    allocation_kl_nats,
)
from flexquant_rl.engine.control.output_kl import ReferenceDistribution, kl_nats, output_kl_nats, reference_width
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.layer_walk import LayerWalk, can_walk
from flexquant_rl.engine.linear import DenseCache, NestedLinear
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "codegen": {},
    "cohere2": {"tie_word_embeddings": True},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {},
    "gemma3_text": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {"tie_word_embeddings": False},
    "granite": {},
    "llama": {"tie_word_embeddings": False},
    "opt": {},
    "phi": {},
    "qwen3": {},
}


def slow(model: NestedCausalLM, windows: Tensor, allocations: Tensor, first: int, prompt_width: int | None) -> Tensor:
    """A whole pass for each allocation, everything in memory, KL in float64."""
    session = DecodeSession(model)
    base = torch.full((model.num_units,), reference_width(model))
    reference = session.score(windows, base, first=first).double().log_softmax(-1)
    means = []
    for widths in allocations:
        per_token = widths.expand(*windows.shape, -1).clone()
        if prompt_width is not None:
            per_token[:, :first] = prompt_width
        means.append(kl_nats(reference, session.score(windows, per_token, first=first).double().log_softmax(-1)).mean())
    return torch.stack(means)


@pytest.mark.parametrize("unit", ["layer", "half"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_whole_passes(
    family: str, unit: Any, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = torch.seed() % 1000
    generator = torch.Generator().manual_seed(seed)
    quantize_head = bool(torch.rand((), generator=generator) < 0.7)
    config = QuantizationConfig(group_size=32, unit=unit, quantize_head=quantize_head)
    name = {"gpt2": "n_layer", "codegen": "n_layer"}.get(family, "num_hidden_layers")
    depth = {} if family == "gpt_neo" else {name: 4}
    model = nest(tiny_causal_lm(tiny_config(family, **FAMILIES[family] | depth)), tiny_tokenizer, config)
    windows = torch.randint(3, 128, (5, 13), generator=generator)
    # With the reference itself among them, twice the same, and prefixes that are shared.
    choices = torch.tensor([0, 3, 4, 5, 8])
    allocations = choices[torch.randint(5, (6, model.num_units), generator=generator)]
    allocations[1, : model.num_units // 2] = allocations[2, : model.num_units // 2]
    allocations[3], allocations[4] = 0, allocations[5]
    monkeypatch.setattr(allocation_kl, "LOGITS_AT_A_TIME", 2 * 128 * 10)
    monkeypatch.setattr(allocation_kl, "_STATE_BYTES", 2 * 10 * 13 * 32 * 4 * 3)
    monkeypatch.setattr(allocation_kl, "_CALL_TOKENS", int(torch.randint(1, 200, (), generator=generator)))
    assert can_walk(model, windows, 0)
    for first, prompt_width in ((1, None), (4, 8), (4, None)):
        found = allocation_kl_nats(DecodeSession(model), windows, allocations, first=first, prompt_width=prompt_width)
        expected = slow(model, windows, allocations, first, prompt_width)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-7, msg=lambda text: f"{text}\nseed {seed}")
        assert float(expected.max()) > 1e-5
    longer = torch.cat([windows, torch.randint(3, 128, (5, 1), generator=generator)], dim=1)
    facts = allocation_facts(DecodeSession(model), longer, allocations, first=4, prompt_width=8)
    check_facts(facts, model, longer, allocations)


def check_facts(facts: list[TextFacts], model: NestedCausalLM, windows: Tensor, allocations: Tensor) -> None:
    """Against one whole pass for each allocation; prompts of 4 tokens at 8 bits."""
    session, read = DecodeSession(model), windows[:, :-1]
    reference = session.score(read, torch.full((model.num_units,), 0), first=4)
    for allocation, found in zip(allocations, facts, strict=True):
        per_token = allocation.expand(*read.shape, -1).clone()
        per_token[:, :4] = 8
        logits = session.score(read, per_token, first=4)
        torch.testing.assert_close(found.output_kl_nats, output_kl_nats(reference, logits), rtol=2e-3, atol=1e-5)
        nll = -logits.log_softmax(-1).gather(-1, windows[:, 5:, None])[..., 0]
        torch.testing.assert_close(found.token_nll_nats, nll, rtol=1e-4, atol=1e-4)
        is_sure = logits.topk(2).values.diff().abs()[..., 0] > 1e-4
        agrees = reference.argmax(-1) == logits.argmax(-1)
        assert torch.equal(found.top1_agreement[is_sure], agrees[is_sure])
        assert torch.equal(found.top1_ids[is_sure], logits.argmax(-1)[is_sure])


def test_a_large_model_keeps_the_matrices_of_one_layer(
    nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    windows = torch.randint(3, 128, (3, 13), generator=generator)
    allocations = torch.tensor([[width] * nested_model.num_units for width in (3, 4, 8)])
    asked: list[tuple[int, int]] = []
    most = 0
    get = DenseCache.get

    def counted(cache: DenseCache, linear: NestedLinear, bit_width: int) -> Tensor:
        nonlocal most
        matrix = get(cache, linear, bit_width)
        asked.append((id(linear), bit_width))
        most = max(most, len(cache._entries))
        return matrix

    def measured() -> Tensor:
        nested_model.dense_cache.clear()
        return allocation_kl_nats(DecodeSession(nested_model), windows, allocations, first=4)

    kept = measured()
    monkeypatch.setattr(DenseCache, "get", counted)
    monkeypatch.setattr(allocation_kl, "_KEPT_MATRIX_BYTES", 0)
    monkeypatch.setattr(allocation_kl, "can_walk", lambda *_: True)  # which reads all layers at one width
    assert torch.equal(measured(), kept)
    per_layer = len(nested_model.nested_linears()) // nested_model.num_layers
    assert len(set(asked)) > most == per_layer * len(allocations)


def leak(model: NestedCausalLM) -> None:
    """Makes the last layer add what the MLP of the first has put out, as layers that share values do."""
    layers = model.hf_model.model.layers
    left: list[Tensor] = []
    layers[0].mlp.register_forward_hook(lambda module, args, output: left.__setitem__(slice(None), [output]))
    layers[-1].mlp.register_forward_hook(lambda module, args, output: output + left[0])


def test_layers_that_read_from_another_take_whole_passes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = nest(tiny_causal_lm(tiny_config("llama")), tiny_tokenizer, QuantizationConfig(group_size=32))
    windows = torch.randint(3, 128, (3, 9))
    allocations = torch.tensor([3, 4, 8])[torch.randint(3, (4, model.num_units))]
    assert can_walk(model, windows, 0)
    leak(model)
    assert not can_walk(model, windows, 0)
    found = allocation_kl_nats(DecodeSession(model), windows, allocations, first=2, prompt_width=8)
    torch.testing.assert_close(found, slow(model, windows, allocations, 2, 8), rtol=2e-3, atol=1e-6)


def test_a_failing_layer_leaves_the_model_as_it_was(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = nest(tiny_causal_lm(tiny_config("llama")), tiny_tokenizer, QuantizationConfig(group_size=32))
    windows = torch.randint(3, 128, (2, 9))
    before = DecodeSession(model).score(windows)
    with pytest.raises(InputError, match="bit-width 1 is not stored"):
        allocation_kl_nats(DecodeSession(model), windows, torch.ones(1, model.num_units, dtype=torch.int64), first=2)

    def fail(module: Any, args: Any) -> None:
        if "forward" in model.hf_model.model.layers[0].__dict__:  # a part of a pass, not the whole one
            raise ZeroDivisionError

    broken = model.hf_model.model.layers[1].mlp.register_forward_pre_hook(fail)
    walk, read = LayerWalk(model), torch.full((9, model.num_units), 3)
    states = walk.layer(0, windows, walk.enter(windows), read)
    with pytest.raises(ZeroDivisionError):
        walk.layer(1, windows, states, read)
    assert not can_walk(model, windows, 0)
    broken.remove()
    assert can_walk(model, windows, 0)
    assert torch.equal(DecodeSession(model).score(windows), before)
    assert all("forward" not in layer.__dict__ for layer in model.hf_model.model.layers)


def test_any_decoder_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, windows = FakeSession(FakeModel(carry=0.5)), fake_windows(7, 12)
    allocations = torch.tensor([3, 5, 8])[torch.randint(3, (5, 4))]
    whole = allocation_kl_nats(decoder, windows, allocations, first=4, prompt_width=8)
    monkeypatch.setattr(allocation_kl, "LOGITS_AT_A_TIME", 1)
    pieces = allocation_kl_nats(decoder, windows, allocations, first=4, prompt_width=8)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-8)
    facts = allocation_facts(decoder, fake_windows(7, 13), allocations, first=4, prompt_width=8)
    assert all(bool(column.isfinite().all()) for one in facts for column in vars(one).values())


def test_nothing_to_measure(nested_model: NestedCausalLM) -> None:
    none = torch.zeros(0, nested_model.num_units, dtype=torch.int64)
    assert allocation_kl_nats(DecodeSession(nested_model), torch.randint(3, 128, (1, 9)), none, first=1).shape == (0,)


class TestReferenceDistribution:
    @pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
    def test_equals_float64(self, size: float) -> None:
        reference = torch.randn(50, 300) * 4
        other = reference + torch.randn(50, 300) * size + torch.randn(50, 1)
        found = ReferenceDistribution(reference).kl_nats(other)
        expected = output_kl_nats(reference.double(), other.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-6)
        assert (found >= 0).all()

    def test_tokens_that_are_ruled_out(self) -> None:
        reference, other = torch.randn(3, 7), torch.randn(3, 7)
        reference[0, 2] = -torch.inf
        other[1, 3] = -torch.inf
        found = ReferenceDistribution(reference).kl_nats(other)
        torch.testing.assert_close(found, output_kl_nats(reference, other))
        assert found.isfinite().tolist() == [True, False, True]

    def test_does_not_change_its_arguments(self) -> None:
        reference, other = torch.randn(3, 7), torch.randn(3, 7)
        copies = reference.clone(), other.clone()
        ReferenceDistribution(reference).kl_nats(other)
        assert torch.equal(reference, copies[0])
        assert torch.equal(other, copies[1])


def test_what_allocations_share_is_counted_once(nested_model: NestedCausalLM) -> None:
    model = nested_model
    body = [unit.num_weights for unit in model.units if unit.kind != "head"]
    allocations = torch.full((3, model.num_units), 8)
    allocations[1, len(body) - 1] = 4  # parts at the last unit before the head
    allocations[2, 0] = 4  # parts at once
    products = 2 * sum(body) + body[-1] + 3 * model.embedding_matrix().numel()
    for wanted in (4, 7):
        flop = 2.0 * products * 10 * wanted * 1.0001
        assert affordable_windows(model, allocations, 10, 9, affordable_flop=flop) == wanted
        assert affordable_windows(model, allocations, 10, 3, affordable_flop=flop) == 3
        few = affordable_windows(model, allocations, 1000, 9, affordable_flop=flop)
        assert few == 3, "never fewer, however large the model"
