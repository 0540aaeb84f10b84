"""Matrices as units: their names, that nothing stays changed, and KL against a model changed by hand."""

from __future__ import annotations

import pytest
import torch
from random_models import tiny_causal_lm, tiny_config
from transformers import PreTrainedTokenizerFast

from flexquant_rl.engine.control.allocation_kl import allocation_kl_nats
from flexquant_rl.engine.control.output_kl import output_kl_nats
from flexquant_rl.engine.control.sensitivity import part_allocations, sensitivity, single_units
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.matrix_units import kinds_of, matrix_units
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig

KINDS = {
    "llama": ["q", "k", "v", "o", "gate", "up", "down", "head"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "head"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "head"],
    "opt": ["k", "v", "q", "out", "fc1", "fc2", "head"],
}


@pytest.fixture(params=["layer", "half"])
def config(request: pytest.FixtureRequest) -> QuantizationConfig:
    return QuantizationConfig(group_size=32, unit=request.param)


@pytest.mark.parametrize("family", KINDS)
def test_kinds_of_families(family: str, config: QuantizationConfig, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = nest(tiny_causal_lm(tiny_config(family)), tiny_tokenizer, config)
    units = matrix_units(model)
    assert list(kinds_of(units)) == KINDS[family]
    assert [len(members) for members in kinds_of(units).values()] == [model.num_layers] * (len(KINDS[family]) - 1) + [1]
    assert sorted(name for unit in units for name in unit.linears) == sorted(model.nested_linears())
    assert sum(unit.num_weights for unit in units) == int(model.unit_weights.sum())


def test_without_a_head(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = QuantizationConfig(group_size=32, quantize_head=False)
    model = nest(tiny_causal_lm(tiny_config("llama")), tiny_tokenizer, config)
    assert list(kinds_of(matrix_units(model))) == KINDS["llama"][:-1]


def test_what_is_cut_is_whole_again(nested_model: NestedCausalLM) -> None:
    model = nested_model
    before = (model.units, model.fingerprint, {name: one.unit_idx for name, one in model.nested_linears().items()})
    tokens, widths = torch.randint(3, 128, (2, 9)), torch.tensor([3, 5, 8])
    logits = DecodeSession(model).score(tokens, widths)

    def fail() -> None:
        with model.cut_into(matrix_units(model)):
            assert model.num_units == 2 * 7 + 1
            cut = torch.tensor([3] * 7 + [5] * 7 + [8])
            torch.testing.assert_close(DecodeSession(model).score(tokens, cut), logits)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    after = (model.units, model.fingerprint, {name: one.unit_idx for name, one in model.nested_linears().items()})
    assert after == before
    assert torch.equal(DecodeSession(model).score(tokens, widths), logits)


def test_sensitivity_of_a_kind(nested_model: NestedCausalLM) -> None:
    model, windows = nested_model, torch.randint(3, 128, (3, 11))
    units = matrix_units(model)
    kinds = kinds_of(units)
    with model.cut_into(units):
        found = sensitivity(model, windows, list(kinds.values()), (3, 8))
        alone = sensitivity(model, windows, [kinds["down"][1:]], (3,))
    assert found.shape == (8, 2)
    session, reference = DecodeSession(model), torch.zeros(3, dtype=torch.int64)
    plain = session.score(windows, reference, first=1).double()
    for kind, column, width in (("v", 0, 3), ("down", 0, 3), ("gate", 1, 8), ("head", 0, 3)):
        # The same with the unquantised weights of these matrices replaced by hand.
        changed = [model.nested_linears()[name] for index in kinds[kind] for name in units[index].linears]
        kept = [linear.reference_weight for linear in changed]
        for linear in changed:
            linear.reference_weight = linear.dense(width)
        expected = output_kl_nats(plain, session.score(windows, reference, first=1).double()).mean()
        for linear, weight in zip(changed, kept, strict=True):
            linear.reference_weight = weight
        torch.testing.assert_close(found[list(kinds).index(kind), column].double(), expected, rtol=2e-3, atol=1e-8)
    assert 0 < float(alone) < float(found[list(kinds).index("down"), 0])


def test_nothing_beside_the_reference(nested_model: NestedCausalLM) -> None:
    allocations, parts, columns = part_allocations(nested_model, single_units(nested_model), (0,))
    assert (len(allocations), len(parts), len(columns)) == (0, 0, 0)
    assert allocation_kl_nats(DecodeSession(nested_model), torch.randint(3, 9, (1, 5)), allocations, first=1).sum() == 0
