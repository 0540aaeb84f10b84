"""Only plain weights pass: whatever a quantiser left, whatever does not fit, is refused in one line."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from flexquant_rl.engine.checkpoint import load_model, save_checkpoint
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.loading import load_causal_lm, load_for_serving
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig

UP = "model.layers.0.mlp.up_proj.weight"
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 269060552\n"
)


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A plain Hugging Face directory to spoil."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    """Replaces, adds or (None) removes stored tensors; `__` stands for a dot."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def assert_refused(path: Path | str, *matches: str) -> None:
    for load in (load_causal_lm, load_for_serving, load_model):
        with pytest.raises(InputError) as caught:
            load(str(path))
        message = str(caught.value)
        assert "\n" not in message
        assert "install" not in message, "another quantiser is no advice"
        for match in matches:
            assert match in message


class TestQuantisedFiles:
    @pytest.mark.parametrize(
        ("quantization", "name"),
        [
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
            ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
            ({"quant_method": "gptq", "bits": 4}, "gptq"),
            ({"quant_method": "awq"}, "awq"),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
            ({"quant_method": "quantiser-of-tomorrow"}, "quantiser-of-tomorrow"),
            ({"bits": 4}, "an unnamed method"),
        ],
    )
    def test_by_its_config(self, model_dir: Path, quantization: dict[str, Any], name: str) -> None:
        edit_config(model_dir, quantization_config=quantization)
        assert_refused(model_dir, f"already quantised by {name}; give the original model")

    def test_by_the_config_of_its_text_model(self, model_dir: Path) -> None:
        edit_config(model_dir, text_config={"quantization_config": {"quant_method": "hqq"}})
        assert_refused(model_dir, "already quantised by hqq; give the original model")

    def test_no_quantisation_said_in_so_many_words(self, model_dir: Path) -> None:
        edit_config(model_dir, quantization_config=None)
        load_causal_lm(str(model_dir))

    def test_float8_with_a_scale(self, model_dir: Path) -> None:
        weight = load_file(model_dir / "model.safetensors")[UP]
        edit_tensors(model_dir, **{UP: weight.to(torch.float8_e4m3fn), f"{UP}_scale_inv": torch.ones(2, 1)})
        assert_refused(model_dir, "already quantised by fp8", f"{UP}_scale_inv", "give the original model")

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
    def test_codes_without_anything_else(self, model_dir: Path, dtype: torch.dtype) -> None:
        weight = load_file(model_dir / "model.safetensors")[UP]
        edit_tensors(model_dir, **{UP: (weight * 10).to(dtype)})
        assert_refused(model_dir, f"already quantised ({UP} is stored as ", "give the original model")

    @pytest.mark.parametrize(
        ("name", "quantiser"),
        [("SCB", "bitsandbytes (8 bits)"), ("qweight", "gptq or awq"), ("weight_packed", "compressed-tensors")],
    )
    def test_by_what_is_stored(self, model_dir: Path, name: str, quantiser: str) -> None:
        edit_tensors(model_dir, **{f"model.layers.0.mlp.up_proj.{name}": torch.ones(4)})
        assert_refused(model_dir, f"already quantised by {quantiser}", "give the original model")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_plain_precisions_are_fine(self, model_dir: Path, dtype: torch.dtype) -> None:
        tensors = load_file(model_dir / "model.safetensors")
        edit_tensors(model_dir, **{name: tensor.to(dtype) for name, tensor in tensors.items()})
        hf_model, _ = load_causal_lm(str(model_dir))
        assert {parameter.dtype for parameter in hf_model.parameters()} == {torch.float32}


class TestTensorsThatDoNotFit:
    def test_layers_beyond_the_configured_number(self, model_dir: Path) -> None:
        edit_config(model_dir, num_hidden_layers=1, layer_types=None)
        assert_refused(model_dir, "9 stored tensors have no place", "of 1 layers, e.g. model.layers.1.", "give the")

    def test_more_layers_than_are_stored(self, model_dir: Path) -> None:
        edit_config(model_dir, num_hidden_layers=3, layer_types=None)
        assert_refused(model_dir, "9 tensors are missing or misshapen, e.g. model.layers.2.")

    def test_another_shape(self, model_dir: Path) -> None:
        edit_tensors(model_dir, model__norm__weight=torch.ones(63))
        assert_refused(model_dir, "1 tensors are missing or misshapen, e.g. model.norm.weight [63], not [64]")

    def test_what_transformers_ignores_is_fine(self, model_dir: Path) -> None:
        # Old checkpoints store the rotary frequencies of every layer.
        edit_tensors(model_dir, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
        load_causal_lm(str(model_dir))

    def test_a_tied_head_may_be_stored(self, model_dir: Path) -> None:
        edit_config(model_dir, tie_word_embeddings=True)
        embedding = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"]
        edit_tensors(model_dir, lm_head__weight=embedding.clone())
        hf_model, _ = load_causal_lm(str(model_dir))
        assert torch.equal(hf_model.get_output_embeddings().weight, embedding)
        edit_tensors(model_dir, lm_head__weight=None)
        load_causal_lm(str(model_dir))


class Linear8bit(nn.Linear):
    """Stands for bitsandbytes' layer: codes in place of weights, behind the same interface."""


Linear8bit.__module__ = "bitsandbytes.nn.modules"


class TestModelsInMemory:
    def refuse(self, hf_model: Any, tokenizer: Any, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            nest(hf_model, tokenizer, QuantizationConfig())
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "lm_head"])
    def test_subclass_of_linear(
        self, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, name: str
    ) -> None:
        old = tiny_llama.get_submodule(name)
        tiny_llama.set_submodule(name, Linear8bit(old.in_features, old.out_features, bias=False))
        match = f"{name} is a Linear8bit, .* already quantised by bitsandbytes; give the original model"
        self.refuse(tiny_llama, tiny_tokenizer, match)

    def test_codes_in_a_plain_linear(
        self, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        linear = tiny_llama.model.layers[0].mlp.up_proj
        linear.weight = nn.Parameter((linear.weight * 100).to(torch.int8), requires_grad=False)
        self.refuse(tiny_llama, tiny_tokenizer, f"{UP} is a .* of int8: already quantised; give the original model")

    def test_parameters_of_a_class_of_their_own(
        self, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        class Params4bit(nn.Parameter):
            """Stands for bitsandbytes' parameter."""

        linear = tiny_llama.model.layers[0].mlp.up_proj
        linear.weight = Params4bit(linear.weight.detach())
        self.refuse(tiny_llama, tiny_tokenizer, f"{UP} is a Params4bit of float32: already quantised")

    def test_config_that_says_so(self, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        tiny_llama.config.quantization_config = {"quant_method": "hqq"}
        self.refuse(tiny_llama, tiny_tokenizer, "already quantised by hqq; give the original model")


class TestFiles:
    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_git_lfs_pointer(self, model_dir: Path, name: str) -> None:
        (model_dir / name).write_bytes(LFS_POINTER)
        assert_refused(
            model_dir, f"{name} is a git-lfs pointer, not the file itself; run `git lfs pull` in {model_dir}"
        )

    def test_git_lfs_pointer_in_a_nested_checkpoint(self, nested_model: NestedCausalLM, tmp_path: Path) -> None:
        save_checkpoint(nested_model, tmp_path / "nested")
        (tmp_path / "nested" / "model.safetensors").write_bytes(LFS_POINTER)
        with pytest.raises(InputError, match=r"model\.safetensors is a git-lfs pointer, .* run `git lfs pull` in"):
            load_model(str(tmp_path / "nested"))

    def test_tokenizer_with_code_of_its_own(self, model_dir: Path) -> None:
        (model_dir / "tokenizer.json").unlink()
        config = {"tokenizer_class": "HouseTokenizer", "auto_map": {"AutoTokenizer": ["tok.HouseTokenizer", None]}}
        (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
        assert_refused(model_dir, f"{model_dir}: its tokenizer ")

    def test_no_tokenizer(self, model_dir: Path) -> None:
        for file in model_dir.glob("*token*"):
            file.unlink()
        assert_refused(model_dir, "has no tokenizer", "copy the tokenizer files of the original model")

    def test_half_a_tokenizer(self, model_dir: Path) -> None:
        (model_dir / "tokenizer.json").unlink()
        assert_refused(model_dir, f"{model_dir}: its tokenizer cannot be loaded (")

    def test_pickles(self, model_dir: Path) -> None:
        (model_dir / "model.safetensors").rename(model_dir / "pytorch_model-00001-of-00001.bin")
        assert_refused(model_dir, "a pickle, which is never loaded; safetensors is needed")

    def test_no_weights(self, model_dir: Path) -> None:
        (model_dir / "model.safetensors").unlink()
        assert_refused(model_dir, "has no weights (model.safetensors); download the model again")

    def test_missing_shard(self, model_dir: Path) -> None:
        (model_dir / "model.safetensors").unlink()
        index = {
            "weight_map": {UP: "model-00001-of-00002.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
        }
        (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
        assert_refused(model_dir, "lacks 2 of 2 weight files, e.g. model-00001-of-00002.safetensors")

    def test_shards(self, model_dir: Path) -> None:
        tensors = load_file(model_dir / "model.safetensors")
        (model_dir / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
        for file, held in shards.items():
            save_file({name: tensors[name] for name in held}, model_dir / file, {"format": "pt"})
        weight_map = {name: file for file, held in shards.items() for name in held}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
        load_causal_lm(str(model_dir))

    def test_custom_code(self, model_dir: Path) -> None:
        edit_config(model_dir, model_type="house-llama", auto_map={"AutoModelForCausalLM": "modeling_house.HouseLM"})
        assert_refused(model_dir, "needs code of its own (model_type='house-llama'", "never run")

    def test_custom_code_that_is_not_needed(self, model_dir: Path) -> None:
        edit_config(model_dir, auto_map={"AutoModelForCausalLM": "modeling_house.HouseLM"})
        load_causal_lm(str(model_dir))

    def test_state_space_model_before_its_weights(self, model_dir: Path) -> None:
        edit_config(model_dir, model_type="mamba", architectures=["MambaForCausalLM"])
        assert_refused(model_dir, "model_type='mamba' is a state-space, recurrent or hybrid model")


class TestVocabulary:
    def test_larger_than_the_embedding(self, model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        tiny_tokenizer.add_tokens(["<one>", "<more>"])
        tiny_tokenizer.save_pretrained(model_dir)
        assert_refused(model_dir, "the tokenizer's ids go up to 129, but the model's embedding ends at 127")

    def test_of_a_nested_checkpoint_too(
        self,
        nested_model: NestedCausalLM,
        tiny_tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tiny_tokenizer.add_tokens(["<more>"])
        monkeypatch.setattr(nested_model, "_token_text", tiny_tokenizer)
        save_checkpoint(nested_model, tmp_path / "nested")
        with pytest.raises(InputError, match="ids go up to 128, but the model's embedding ends at 127"):
            load_model(str(tmp_path / "nested"))

    def test_placeholder_of_a_sibling_that_sees_images(
        self, model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        tiny_tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
        tiny_tokenizer.save_pretrained(model_dir)
        config = json.loads((model_dir / "tokenizer_config.json").read_text())
        (model_dir / "tokenizer_config.json").write_text(json.dumps({**config, "image_token": "<image_soft_token>"}))
        load_causal_lm(str(model_dir))


def test_a_checked_model_takes_no_longer(model_dir: Path) -> None:
    began = time.perf_counter()
    load_causal_lm(str(model_dir))
    assert time.perf_counter() - began < 10
