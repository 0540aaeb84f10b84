"""Models that are served without Hugging Face's modules: the same numbers, and only where that is certain."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from flexquant_rl.engine import loading
from flexquant_rl.engine.checkpoint import load_model, save_checkpoint
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.embedded import embedded_model_path
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.llama_tree import LlamaTree, read_shape
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.token_text import TokenText, read_text
from flexquant_rl.kernels.native import load_library
from tests.random_models import tiny_causal_lm, tiny_config

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 50_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1, "vocab_size": 130}),  # its tokenizer adds a token
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}
BY_HALVES = QuantizationConfig(group_size=32, unit="half", quantize_head=False)


@pytest.fixture(params=[(name, tied) for name in SHAPES for tied in (True, False)], ids=lambda p: f"{p[0]}-{p[1]}")
def plain_dir(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model of each family, its head tied to the embedding or not."""
    name, is_tied = request.param
    kind, changes = SHAPES[name]
    model = tiny_causal_lm(tiny_config(kind, tie_word_embeddings=is_tied, eos_token_id=[2, 5], **changes))
    model.save_pretrained(tmp_path / "plain")
    tiny_tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def served(path: Path, config: QuantizationConfig | None = None) -> NestedCausalLM:
    model = load_model(str(path), config, keep_reference=False)
    assert isinstance(model.tree, LlamaTree)
    return model


def by_transformers(path: Path, config: QuantizationConfig | None = None) -> NestedCausalLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "read_shape", lambda entries: None)
        patch.setattr(loading, "read_text", lambda directory, model_type: None)
        model = load_model(str(path), config, keep_reference=False)
    assert not isinstance(model.tree, LlamaTree)
    return model


def lean_logits(model: NestedCausalLM) -> Tensor:
    """Logits of a prompt and of steps at each width."""
    session = LeanSession(LeanDecoder(model, mode="float32"))
    outputs = [session.prefill(torch.arange(3, 30)[None]).logits]
    for width in model.bit_widths:
        outputs.append(session.step(torch.tensor([40 + width]), torch.full((model.num_units,), width)).logits)
    return torch.cat(outputs)


def assert_same(model: NestedCausalLM, other: NestedCausalLM) -> None:
    if load_library() is not None:
        assert torch.equal(lean_logits(model), lean_logits(other))
    for name in ("fingerprint", "units", "eos_token_ids", "max_context", "vocab_size", "num_layers", "calibration"):
        assert getattr(model, name) == getattr(other, name), name
    assert model.token_text.encode("def f(x):") == other.tokenizer.encode("def f(x):")
    assert isinstance(model.tree, LlamaTree), "nothing of this runs a module"


@pytest.mark.parametrize("config", [None, BY_HALVES], ids=["whole", "by-halves"])
def test_a_plain_model_gives_the_same_numbers(plain_dir: Path, config: QuantizationConfig | None) -> None:
    assert_same(served(plain_dir, config), by_transformers(plain_dir, config))


def test_a_nested_checkpoint_gives_the_same_numbers(plain_dir: Path, tmp_path: Path) -> None:
    save_checkpoint(by_transformers(plain_dir, BY_HALVES), tmp_path / "nested")
    assert_same(served(tmp_path / "nested"), by_transformers(tmp_path / "nested"))


@pytest.mark.parametrize("ends", [{}, {"eos_token_id": 7}, {"eos_token_id": [7, 9]}, None], ids=str)
def test_the_tokens_that_end_a_text(tiny_model_dir: Path, tmp_path: Path, ends: dict[str, Any] | None) -> None:
    path = shutil.copytree(tiny_model_dir, tmp_path / "plain")
    (path / "generation_config.json").unlink()
    if ends is not None:
        (path / "generation_config.json").write_text(json.dumps(ends))
    models = [served(path), by_transformers(path)]
    found = [model.eos_token_ids for model in models]
    assert found[0] == found[1] == models[0].eos_token_ids
    assert isinstance(models[0].hf_model.generation_config, GenerationConfig)
    assert models[0].eos_token_ids == found[0], "also after Hugging Face's model is made"


def test_hugging_faces_model_is_there_when_it_is_asked_for(plain_dir: Path, tmp_path: Path) -> None:
    model, other = served(plain_dir, BY_HALVES), by_transformers(plain_dir, BY_HALVES)
    held = {id(tensor) for tensor in model.tree.state_dict(keep_vars=True).values()}
    token_ids, widths = torch.arange(3, 30)[None], torch.full((1, 27, model.num_units), 4)
    logits = [each.forward(token_ids, widths, keep=27).logits for each in (model, other)]
    assert torch.equal(*logits)
    assert type(model.hf_model) is type(other.hf_model)
    assert model.tree is model.hf_model
    assert {id(tensor) for tensor in model.hf_model.state_dict(keep_vars=True).values()} == held, "no weight is copied"
    assert model.hf_model.config.to_dict() == other.hf_model.config.to_dict() | {
        "_name_or_path": model.hf_model.config.to_dict().get("_name_or_path")
    }
    for number, each in enumerate((model, other)):
        save_checkpoint(each, tmp_path / str(number))
    for file in (tmp_path / "0").iterdir():
        if file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "1" / file.name).read_bytes(), file.name


def test_layers_are_observed_in_a_model_made_later(plain_dir: Path) -> None:
    model = served(plain_dir)
    if load_library() is None:
        pytest.skip("the native kernels could not be built")
    from flexquant_rl.engine.decoding.session import DecodeSession

    prompt = torch.arange(3, 30)[None]
    lean = LeanSession(LeanDecoder(model, mode="float32")).prefill(prompt)
    reference = DecodeSession(model).prefill(prompt)
    torch.testing.assert_close(lean.residual_update, reference.residual_update, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lean.logits, reference.logits, rtol=1e-3, atol=1e-3)


def test_threads_that_ask_for_hugging_faces_model_at_once(plain_dir: Path) -> None:
    model, register = served(plain_dir), torch.nn.Module.register_parameter
    token_ids, widths = torch.arange(3, 30)[None], torch.full((1, 27, model.num_units), 4)
    with ThreadPoolExecutor(4) as pool:
        logits = [*pool.map(lambda _: model.forward(token_ids, widths, keep=27).logits, range(4))]
    assert all(torch.equal(each, logits[0]) for each in logits)
    assert torch.nn.Module.register_parameter is register


def llama_entries(**changes: Any) -> dict[str, Any]:
    entries = json.loads((embedded_model_path() / "config.json").read_text())
    return {name: value for name, value in (entries | changes).items() if value != "leave out"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"hidden_act": "gelu"},
        {"head_dim": None},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": "leave out"},
        {"hidden_size": 256.0},
        {"hidden_size": 250},
        {"rms_norm_eps": None},
        {"pad_token_id": 4096},
        {"eos_token_id": "</s>"},
        {"tie_word_embeddings": 1},
        {"sliding_window": 64},
        {"layer_types": ["full_attention"] * 8},
        {"embedding_multiplier": 2.0},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": "leave out", "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "mistral", "architectures": None},
        {"model_type": "mistral", "architectures": None, "sliding_window": 64},
        {"model_type": "qwen2", "architectures": None, "use_sliding_window": True},
        {"model_type": "qwen3", "architectures": None, "head_dim": "leave out"},
    ],
    ids=str,
)
def test_transformers_reads_what_is_unusual(changes: dict[str, Any]) -> None:
    assert read_shape(llama_entries()) is not None
    assert read_shape(llama_entries(**changes)) is None


def test_older_configurations_are_read_too() -> None:
    shape = read_shape(
        llama_entries(rope_parameters="leave out", rope_theta=5e5, rope_scaling=None, head_dim="leave out")
    )
    assert shape is not None
    assert shape.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert shape.head_dim == 32


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite(plain_dir: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(plain_dir / "model.safetensors")
    if name not in tensors:
        pytest.skip("tied")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, plain_dir / "model.safetensors", {"format": "pt"})
    messages = []
    for load in (served, by_transformers):
        with pytest.raises(InputError) as caught:
            load(plain_dir)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{name} holds 1 NaN")


@pytest.mark.parametrize("spoil", ["[]", "{", '{"eos_token_id": "x"}'])
def test_a_generation_configuration_that_says_something_else(plain_dir: Path, spoil: str) -> None:
    (plain_dir / "generation_config.json").write_text(spoil)
    entries = json.loads((plain_dir / "config.json").read_text())
    assert read_shape(entries) is not None
    assert loading.empty_tree(plain_dir, entries) is None


def json_or_text(file: Path) -> Any:
    text = file.read_text()
    if file.suffix != ".json":
        return text
    # How it was loaded, which transformers saves too.
    return {name: value for name, value in json.loads(text).items() if name not in ("is_local", "local_files_only")}


class TestTokenText:
    TEXTS = ("", "def f(x):\n    return x", "<|bos|>é 漢字 \t<|eos|>!", "a  b\n\n c")

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        AutoTokenizer.from_pretrained(embedded_model_path()).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(llama_entries()))
        return tmp_path

    @pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"])
    def test_is_transformers_tokenizer(self, directory: Path, tmp_path: Path, template: str | None) -> None:
        if template is not None:
            (directory / "chat_template.jinja").write_text(template)
        text, tokenizer = read_text(directory, "llama"), AutoTokenizer.from_pretrained(directory)
        assert text is not None
        full = text.full()
        assert type(full) is type(tokenizer)
        assert text.get_vocab() == tokenizer.get_vocab() == full.get_vocab()
        assert text.eos_token_id == tokenizer.eos_token_id == full.eos_token_id
        assert text.chat_template == tokenizer.chat_template == full.chat_template
        for string in self.TEXTS:
            ids = tokenizer.encode(string)
            assert text.encode(string) == ids == full.encode(string)
            for skip in (True, False):
                expected = tokenizer.decode(ids, skip_special_tokens=skip)
                assert text.decode(ids, skip_special_tokens=skip) == expected
                assert full.decode(ids, skip_special_tokens=skip) == expected
        for number, each in enumerate((tokenizer, full)):
            each.save_pretrained(tmp_path / str(number))
        for file in (tmp_path / "0").iterdir():
            assert json_or_text(file) == json_or_text(tmp_path / "1" / file.name), file.name
        if template is not None:
            chats = [each.apply_chat_template([{"role": "user", "content": "hi"}]) for each in (tokenizer, full)]
            assert chats[0]["input_ids"] == chats[1]["input_ids"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"tokenizer_class": "LlamaTokenizer"},
            {"add_bos_token": False},
            {"eos_token": "<|never seen|>"},
            {"eos_token": {"content": "<|eos|>"}},
            {"clean_up_tokenization_spaces": True},
        ],
        ids=str,
    )
    def test_transformers_reads_what_is_unusual(self, directory: Path, changes: dict[str, Any]) -> None:
        file = directory / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        assert read_text(directory, "llama") is None

    @pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "tokenizer.model"])
    def test_other_files_with_a_say(self, directory: Path, name: str) -> None:
        (directory / name).write_text("{}")
        assert read_text(directory, "llama") is None

    def test_damage_is_for_transformers_to_describe(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{")
        assert read_text(directory, "llama") is None

    def test_families_with_a_tokenizer_of_their_own(self, directory: Path) -> None:
        assert isinstance(read_text(directory, "qwen3"), TokenText)
        assert read_text(directory, "qwen2") is None
        assert read_text(directory, "mistral") is None


def test_generate_imports_neither_transformers_nor_a_compiler(repo_root: Path) -> None:
    code = """
import sys
from flexquant_rl.cli import main
sys.argv[1:] = ["generate", "default", "--policy", "fixed:4", "--prompt", "def f(", "--max-new-tokens", "8"]
assert main() == 0
print(*sorted({"transformers", "huggingface_hub.hf_api", "torch._dynamo", "sympy", "triton"} & {*sys.modules}))
"""
    if load_library() is None:
        pytest.skip("the native kernels could not be built")
    result = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "", f"fq generate also imports {result.stdout.splitlines()[-1]}"
