"""Models of several families as units of nested linears; directories that are no good model are refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.kernels.reference import dequantize

VOCAB_SIZE, CONTEXT = 128, 64
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, eos_token_id=2),
    "opt": OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "opt-projected": OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt-neox": GPTNeoXConfig(**COMMON, intermediate_size=48),
    "phi": PhiConfig(**COMMON, intermediate_size=48),
    "qwen2": Qwen2Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
}


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose weights are large enough for attention and logits to matter."""
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return hf_model


def all_at(model: NestedCausalLM, bit_width: int) -> Tensor:
    return torch.full((model.num_units,), bit_width)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", ["layer", "half"])
def test_reference_width_is_the_original_model(family: str, unit: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    hf_model = random_model(FAMILIES[family])
    token_ids = torch.randint(3, VOCAB_SIZE, (2, 12))
    with torch.no_grad():
        expected = hf_model(token_ids).logits
    model = nest(hf_model, tiny_tokenizer, QuantizationConfig(group_size=32, unit=unit))
    session = DecodeSession(model, num_rows=2)
    torch.testing.assert_close(session.score(token_ids), expected, rtol=1e-4, atol=1e-4)
    stepped = [session.prefill(token_ids[:, :8], bit_widths=all_at(model, 0)).logits]
    stepped += [session.step(token_ids[:, position], all_at(model, 0)).logits for position in range(8, 12)]
    torch.testing.assert_close(torch.stack(stepped, dim=1), expected[:, 7:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_widths_are_the_original_model_with_decoded_weights(
    family: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    hf_model = random_model(FAMILIES[family])
    decoded = copy.deepcopy(hf_model)
    model = nest(hf_model, tiny_tokenizer, QuantizationConfig(group_size=32))
    # An untied head: the embedding that it was tied to stays as it is.
    decoded.get_output_embeddings().weight = torch.nn.Parameter(decoded.get_output_embeddings().weight.detach().clone())
    token_ids = torch.randint(3, VOCAB_SIZE, (2, 12))
    for bit_width in (3, 8):
        for name, linear in model.nested_linears().items():
            original = decoded.get_submodule(name)
            dense = dequantize(linear.weight, bit_width=bit_width)
            original.weight.data = dense if isinstance(original, torch.nn.Linear) else dense.T.contiguous()
        with torch.no_grad():
            expected = decoded(token_ids).logits
        actual = DecodeSession(model).score(token_ids, all_at(model, bit_width))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class TestUnits:
    def test_layers_and_head(self, nested_model: NestedCausalLM) -> None:
        assert [unit.name for unit in nested_model.units] == ["layer.0", "layer.1", "head"]
        assert [unit.kind for unit in nested_model.units] == ["layer", "layer", "head"]
        assert [unit.layer_idx for unit in nested_model.units] == [0, 1, 2]
        assert [len(unit.linears) for unit in nested_model.units] == [7, 7, 1]
        layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172
        assert nested_model.unit_weights.tolist() == [layer, layer, 64 * 128]

    def test_attention_and_mlp(self, half_unit_model: NestedCausalLM) -> None:
        names = [unit.name for unit in half_unit_model.units]
        assert names == ["layer.0.attention", "layer.0.mlp", "layer.1.attention", "layer.1.mlp", "head"]
        attention, mlp = half_unit_model.units[:2]
        assert {name.split(".")[-1] for name in attention.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert {name.split(".")[-1] for name in mlp.linears} == {"gate_proj", "up_proj", "down_proj"}
        assert all(name.startswith("model.layers.0.") for name in attention.linears + mlp.linears)

    def test_every_linear_belongs_to_one_unit(self, half_unit_model: NestedCausalLM) -> None:
        listed = [name for unit in half_unit_model.units for name in unit.linears]
        assert sorted(listed) == sorted(half_unit_model.nested_linears())
        for unit_idx, unit in enumerate(half_unit_model.units):
            assert {half_unit_model.nested_linears()[name].unit_idx for name in unit.linears} == {unit_idx}

    def test_dense_head(self, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        token_ids = torch.randint(3, VOCAB_SIZE, (1, 8))
        with torch.no_grad():
            expected = tiny_llama(token_ids).logits
        model = nest(tiny_llama, tiny_tokenizer, QuantizationConfig(quantize_head=False))
        assert [unit.name for unit in model.units] == ["layer.0", "layer.1"]
        assert not isinstance(model.hf_model.get_output_embeddings(), NestedLinear)
        torch.testing.assert_close(DecodeSession(model).score(token_ids), expected, rtol=1e-4, atol=1e-4)

    def test_tied_embedding_is_not_quantised_with_the_head(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        hf_model = random_model(FAMILIES["gpt2"])
        embedding = hf_model.get_input_embeddings().weight.detach().clone()
        model = nest(hf_model, tiny_tokenizer, QuantizationConfig())
        assert torch.equal(model.embedding_matrix(), embedding)
        assert model.units[-1].linears == ("lm_head",)

    def test_widths_weigh_by_parameters(self, nested_model: NestedCausalLM) -> None:
        layer, _, head = nested_model.unit_weights.tolist()
        mean = nested_model.mean_bit_width(torch.tensor([[3, 3, 8], [8, 8, 8]]))
        expected = (3 * 2 * layer + 8 * head) / (2 * layer + head)
        torch.testing.assert_close(mean, torch.tensor([expected, 8.0]))

    def test_unit_bytes_are_the_sum_of_its_linears(self, half_unit_model: NestedCausalLM) -> None:
        linears = half_unit_model.nested_linears()
        for unit_idx, unit in enumerate(half_unit_model.units):
            for bit_width in half_unit_model.bit_widths:
                expected = sum(linears[name].weight.bytes_read(bit_width) for name in unit.linears)
                assert half_unit_model.weight_bytes(unit_idx, bit_width) == expected

    def test_statistics_are_those_of_the_units_layer(self, half_unit_model: NestedCausalLM) -> None:
        hidden = []
        handle = half_unit_model.hf_model.model.layers[1].register_forward_hook(
            lambda module, args, output: hidden.append((args[0], output))
        )
        try:
            output = DecodeSession(half_unit_model).prefill(torch.arange(3, 9)[None])
        finally:
            handle.remove()
        before, after = (tensor[0, -1].double() for tensor in hidden[0])
        update = float((after - before).norm() / before.norm())
        crest = float(before.abs().max() / before.square().mean().sqrt())
        assert output.residual_update[0, 2:].tolist() == pytest.approx([update, update, 0], rel=1e-5)
        assert output.crest[0, 2:].tolist() == pytest.approx([crest, crest, 0], rel=1e-5)


def test_fingerprint_names_weights_widths_and_units(tiny_llama: LlamaForCausalLM, tiny_model_dir: Path) -> None:
    def fingerprint(hf_model: PreTrainedModel, **options: Any) -> str:
        _, tokenizer = load_causal_lm(str(tiny_model_dir))
        return nest(copy.deepcopy(hf_model), tokenizer, QuantizationConfig(**options)).fingerprint

    base = fingerprint(tiny_llama)
    assert fingerprint(tiny_llama) == base
    assert fingerprint(tiny_llama, bit_widths=(3, 4, 8)) != base
    assert fingerprint(tiny_llama, unit="half") != base
    assert fingerprint(tiny_llama, quantize_head=False) != base
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert fingerprint(tiny_llama) != base


def test_reference_weights_can_be_left_out(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = nest(tiny_llama, tiny_tokenizer, QuantizationConfig(), keep_reference=False)
    assert not model.has_reference
    with pytest.raises(InputError, match="unquantised weights were asked for"):
        DecodeSession(model).score(torch.tensor([[3, 4]]))


def test_progress_sees_every_linear(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[str] = []

    def progress(items: Any, label: str) -> Any:
        assert label == "quantising"
        for item in items:
            seen.append(item[0])
            yield item

    model = nest(tiny_llama, tiny_tokenizer, QuantizationConfig(), progress=progress)
    assert sorted(seen) == sorted(model.nested_linears())


@pytest.mark.parametrize(("window", "expected"), [(16, 16), (None, CONTEXT), (1000, CONTEXT)])
def test_sliding_window_limits_the_context(
    window: int | None, expected: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    hf_model = random_model(MistralConfig(**GROUPED, sliding_window=window))
    model = nest(hf_model, tiny_tokenizer, QuantizationConfig(group_size=32))
    assert model.max_context == expected
    with pytest.raises(InputError, match=f"context holds {expected}"):
        DecodeSession(model, max_length=expected + 1)
    # Up to the limit the window hides nothing: decoding equals the original model.
    token_ids = torch.randint(3, VOCAB_SIZE, (1, expected))
    session = DecodeSession(model)
    session.prefill(token_ids[:, :-1], bit_widths=all_at(model, 0))
    last = session.step(token_ids[:, -1], all_at(model, 0)).logits
    torch.testing.assert_close(last, session.score(token_ids)[:, -1], rtol=1e-4, atol=1e-4)


class TestRefusals:
    @pytest.fixture
    def model_dir(self, tiny_model_dir: Path, tmp_path: Path) -> Path:
        """A plain Hugging Face directory to spoil."""
        return shutil.copytree(tiny_model_dir, tmp_path / "model")

    def assert_refused(self, path: Path, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            load_causal_lm(str(path))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    def test_weight_that_is_not_finite_is_named(
        self, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, name: str, value: float
    ) -> None:
        tiny_llama.get_parameter(name).data.view(-1)[5] = value
        with pytest.raises(InputError, match=f"{name} holds 1 NaN or infinite values"):
            nest(tiny_llama, tiny_tokenizer, QuantizationConfig())

    def test_encoder(self, tmp_path: Path) -> None:
        BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        ).save_pretrained(tmp_path)
        self.assert_refused(tmp_path, "is a BertModel, not a causal language model")

    def test_missing_tensor(self, model_dir: Path) -> None:
        tensors = load_file(model_dir / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
        self.assert_refused(model_dir, r"1 tensors are missing or misshapen, e.g. model.layers.0.mlp.up_proj")

    def test_misshapen_tensor(self, model_dir: Path) -> None:
        tensors = load_file(model_dir / "model.safetensors")
        tensors["model.norm.weight"] = torch.ones(63)
        save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
        self.assert_refused(model_dir, "cannot be loaded|missing or misshapen")

    def test_truncated_weights(self, model_dir: Path) -> None:
        file = model_dir / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self.assert_refused(model_dir, "cannot be loaded as a causal LM")

    def test_pickled_weights_are_not_loaded(self, model_dir: Path) -> None:
        (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
        self.assert_refused(model_dir, "a pickle, which is never loaded; safetensors is needed")

    @pytest.mark.parametrize(
        ("text", "match"), [("{", "is not valid JSON"), ("[]", "holds no JSON object"), ("\xff", "is not valid JSON")]
    )
    def test_damaged_config(self, model_dir: Path, text: str, match: str) -> None:
        (model_dir / "config.json").write_bytes(text.encode("latin-1"))
        self.assert_refused(model_dir, match)

    def test_unknown_architecture(self, model_dir: Path) -> None:
        config = json.loads((model_dir / "config.json").read_text())
        (model_dir / "config.json").write_text(json.dumps({**config, "model_type": "llama-of-tomorrow"}))
        self.assert_refused(model_dir, "cannot be loaded as a causal LM")

    def test_what_is_no_model_directory(self, tmp_path: Path) -> None:
        self.assert_refused(tmp_path, r"has no config\.json")
        self.assert_refused(tmp_path / "absent", "is not a directory")
        (tmp_path / "file").touch()
        self.assert_refused(tmp_path / "file", "is not a directory")

    def test_positions_that_cannot_be_given(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        hf_model = random_model(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4))
        with pytest.raises(InputError, match="BloomForCausalLM takes no position_ids"):
            nest(hf_model, tiny_tokenizer, QuantizationConfig())

    def test_fused_experts(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        hf_model = random_model(MixtralConfig(**GROUPED, num_local_experts=2))
        with pytest.raises(InputError, match="fuses the weights of 2 experts"):
            nest(hf_model, tiny_tokenizer, QuantizationConfig())


@pytest.mark.parametrize(("configured", "expected"), [(None, (2,)), (2, (2,)), ([9, 2, 7], (2, 7, 9)), (9, (2, 9))])
def test_every_configured_token_ends_a_text(
    nested_model: NestedCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    configured: int | list[int] | None,
    expected: tuple[int, ...],
) -> None:
    assert nested_model.tokenizer.eos_token_id == 2
    monkeypatch.setattr(nested_model.hf_model.generation_config, "eos_token_id", configured)
    assert nested_model.eos_token_ids == expected
