"""Architectures: those that are accepted decode as they score, the others are refused as what they are."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import tiny_causal_lm, tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from flexquant_rl.engine.decoding.kv_cache import RowCache
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import NestedCausalLM, make_units
from flexquant_rl.engine.nesting import check_units, nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig

CONFIG = QuantizationConfig(group_size=32)
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
ACCEPTED: dict[str, dict[str, Any]] = {
    "apertus": {},
    "biogpt": {},
    "codegen": {},
    "cohere2": {},
    "ctrl": {},
    "diffllama": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm4": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": {},
    "granite": {},
    "helium": {},
    "llama": {"rope_parameters": DYNAMIC},
    "modernbert-decoder": {},
    "nemotron": {},
    "olmo2": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    "qwen3": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {},
}
STATE = "is a state-space, recurrent or hybrid model"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({}, "it is an encoder, whose earlier tokens see the later ones"),
    "roberta": ({}, "it is an encoder, whose earlier tokens see the later ones"),
    "deepseek_v3": ({"first_k_dense_replace": 2}, "multi-head latent attention"),
    "minicpm3": ({}, "multi-head latent attention"),
    "doge": ({}, "reads [0-9]+ vectors where there are [0-9]+ tokens"),
    "falcon": ({"alibi": True}, r"positions from the mask \(ALiBi\)"),
    "bloom": ({}, "takes no position_ids"),
    "openai-gpt": ({}, "takes no past_key_values"),
    "mamba": ({}, STATE),
    "jamba": ({}, STATE),
    "rwkv": ({}, STATE),
    "recurrent_gemma": ({}, STATE),
    "qwen3_next": ({}, STATE),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, STATE),
    "mixtral": ({}, "fuses the weights of 4 experts"),
    "xlnet": ({}, "is no matrix"),
}


def all_at(model: NestedCausalLM, bit_width: int) -> Tensor:
    return torch.full((model.num_units,), bit_width)


@pytest.mark.parametrize("family", ACCEPTED)
def test_what_is_accepted_decodes_as_it_scores(family: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = nest(tiny_causal_lm(tiny_config(family, **ACCEPTED[family])), tiny_tokenizer, CONFIG)
    steps = 6
    lengths = [min(model.max_context, limit) - steps for limit in (9, 24)]  # past any switch that the probe knows
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(3, 128, (2, max(lengths) + steps), generator=generator)
    widths = torch.tensor([3, 5, 8])[torch.randint(3, (*token_ids.shape, model.num_units), generator=generator)]
    for row, length in enumerate(lengths):
        widths[row, :length] = 8
    session = DecodeSession(model, num_rows=2)
    for row, length in enumerate(lengths):
        session.prefill(token_ids[row : row + 1, :length], rows=torch.tensor([row]))
    scores = [session.score(token_ids[row : row + 1], widths[row : row + 1])[0] for row in range(2)]
    for step in range(steps):
        at = [length + step for length in lengths]
        logits = session.step(
            torch.stack([token_ids[row, position] for row, position in enumerate(at)]),
            torch.stack([widths[row, position] for row, position in enumerate(at)]),
        ).logits
        for row, position in enumerate(at):
            expected = scores[row][position]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_refused_is_told_why(family: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    changes, reason = REFUSED[family]
    with pytest.raises(InputError, match=reason) as caught:
        nest(tiny_causal_lm(tiny_config(family, **changes)), tiny_tokenizer, CONFIG)
    assert "\n" not in str(caught.value)
    assert "; use a" in str(caught.value)


@pytest.mark.skipif(not os.environ.get("FQ_REAL_MODELS"), reason="FQ_REAL_MODELS names no folder of real models")
def test_a_real_model_is_probed_in_no_time() -> None:
    hf_model, _ = load_causal_lm(str(Path(os.environ["FQ_REAL_MODELS"]) / "smollm2-135m"))
    units = make_units(hf_model, CONFIG)
    check_units(hf_model, units)
    began = time.process_time()
    check_units(hf_model, units)
    assert time.process_time() - began < 0.5  # 0.25 s alone


class TestRopeSwitch:
    def config(self, **changes: Any) -> PreTrainedConfig:
        return tiny_config("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16, **changes)

    def test_longrope_ends_where_its_factors_change(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        model = nest(tiny_causal_lm(self.config()), tiny_tokenizer, CONFIG)
        assert model.max_context == 16
        with pytest.raises(InputError, match=r"context holds 16 \(where longrope changes the rotary factors"):
            DecodeSession(model, max_length=17)

    def test_a_switch_that_nobody_declared_is_found(
        self, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flexquant_rl.engine.context_length.rotary_limit", lambda config: None)
        with pytest.raises(InputError, match="changes when position 63 is reached, as rotary factors"):
            nest(tiny_causal_lm(self.config()), tiny_tokenizer, CONFIG)


class TestTheProbeItself:
    def test_leaves_nothing_behind(
        self, tiny_llama: LlamaForCausalLM, nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for hf_model in (tiny_llama, nested_model.hf_model):
            modules = {name: id(module) for name, module in hf_model.named_modules()}
            tensors = {
                name: (id(tensor), tensor.clone()) for name, tensor in hf_model.state_dict(keep_vars=True).items()
            }
            hooks = [len(module._forward_hooks) for module in hf_model.modules()]
            random = torch.get_rng_state()
            held = len(nested_model.dense_cache._entries)
            check_units(hf_model, make_units(hf_model, CONFIG))
            assert {name: id(module) for name, module in hf_model.named_modules()} == modules
            for name, tensor in hf_model.state_dict(keep_vars=True).items():
                assert id(tensor) == tensors[name][0]
                assert torch.equal(tensor, tensors[name][1])
            assert [len(module._forward_hooks) for module in hf_model.modules()] == hooks
            assert torch.equal(torch.get_rng_state(), random)
            assert len(nested_model.dense_cache._entries) == held
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing) is RowCache and thing.max_length == 5]

    def test_comes_before_quantisation(
        self, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quantised: list[str] = []
        monkeypatch.setattr("flexquant_rl.engine.nesting._quantize", lambda *a: quantised.append(a[-1]))
        with pytest.raises(InputError, match="encoder"):
            nest(tiny_causal_lm(tiny_config("bert")), tiny_tokenizer, CONFIG)
        assert not quantised

    def test_linears_are_back_after_a_failure(self) -> None:
        hf_model = tiny_causal_lm(tiny_config("minicpm3"))
        before = dict(hf_model.named_modules())
        with pytest.raises(InputError):
            check_units(hf_model, make_units(hf_model, CONFIG))
        assert dict(hf_model.named_modules()) == before

    def test_linears_that_read_the_weight_of_another_are_found(
        self, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attention = type(tiny_llama.model.layers[0].self_attn)
        forward = attention.forward

        def peeking(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(self, hidden_states.to(self.q_proj.weight.dtype), *args, **kwargs)

        monkeypatch.setattr(attention, "forward", peeking)
        with pytest.raises(InputError, match="cannot be decoded token by token: AttributeError.*weight"):
            nest(tiny_llama, tiny_tokenizer, CONFIG)
        assert not [module for module in tiny_llama.modules() if isinstance(module, NestedLinear)]

    def test_tokens_in_another_order_are_found(
        self, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mlp = type(tiny_llama.model.layers[0].mlp)
        forward = mlp.forward

        def columns_first(self: Any, x: Tensor) -> Any:
            return forward(self, x.transpose(0, 1)).transpose(0, 1)

        monkeypatch.setattr(mlp, "forward", columns_first)
        with pytest.raises(InputError, match="its logits differ by"):
            nest(tiny_llama, tiny_tokenizer, CONFIG)
