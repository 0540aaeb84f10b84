"""Checkpoints come back bit for bit, and nothing that was changed, cut or taken away is ever loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from flexquant_rl.engine import checkpoint, files
from flexquant_rl.engine.checkpoint import (
    CHECKPOINT_VERSION,
    is_nested_checkpoint,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig

FILES = (
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
TOKEN_IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def saved(nested_model: NestedCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint of the tiny model. Read it only."""
    out = tmp_path_factory.mktemp("checkpoint") / "nested"
    save_checkpoint(nested_model, out)
    return out


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def logits_by_width(model: NestedCausalLM) -> dict[int, Tensor]:
    """Logits of the same tokens with every unit at each stored width."""
    session = DecodeSession(model)
    return {b: session.score(TOKEN_IDS, torch.full((model.num_units,), b)) for b in model.bit_widths}


def assert_same_model(loaded: NestedCausalLM, original: NestedCausalLM) -> None:
    """Bitwise equal logits at every width and everything else that names a model."""
    assert loaded.fingerprint == original.fingerprint
    assert (loaded.units, loaded.config, loaded.max_context) == (original.units, original.config, original.max_context)
    assert not any(tensor.is_meta for tensor in [*loaded.hf_model.parameters(), *loaded.hf_model.buffers()])
    after = logits_by_width(loaded)
    for bit_width, logits in logits_by_width(original).items():
        assert torch.equal(after[bit_width], logits), f"logits changed at width {bit_width}"


def assert_refused(path: Path, match: str) -> None:
    """Loading raises one line that says what is wrong and what to do."""
    with pytest.raises(InputError, match=match) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "again" in message or "pass " in message or "update" in message


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest, as a careless tool would."""
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def edit_config(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes config.json and makes the manifest agree, as a program of another version would have written it."""
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))
    digest = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    edit_manifest(path, lambda manifest: manifest["files"].update({"config.json": digest}))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites the tensors; the file stays a valid safetensors file."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("unit", ["layer", "half"])
@pytest.mark.parametrize("quantize_head", [True, False], ids=["head", "dense_head"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_roundtrip_is_bitwise(
    unit: Any,
    quantize_head: bool,
    tied: bool,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    tiny_llama.config.tie_word_embeddings = tied
    tiny_llama.tie_weights()
    config = QuantizationConfig(group_size=64, bit_widths=(3, 5, 8), unit=unit, quantize_head=quantize_head)
    model = nest(tiny_llama, tiny_tokenizer, config)
    num_bytes = save_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert_same_model(loaded, model)
    assert not loaded.has_reference
    assert num_bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.planes" in names) == quantize_head
    assert ("lm_head.weight" in names) == (not quantize_head and not tied), "a tied embedding is stored once"
    if tied and not quantize_head:
        assert loaded.hf_model.get_output_embeddings().weight is loaded.hf_model.get_input_embeddings().weight


def test_weights_of_widths_are_kept_and_used(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = torch.randint(3, 128, (6, 32))
    errors = {}
    for weights in ((), (1.0, 1.0, 1000.0)):
        config = QuantizationConfig("gptq", 32, (3, 4, 8), width_weights=weights)
        model = nest(deepcopy(tiny_llama), tiny_tokenizer, config, keep_reference=True, calibration=text)
        save_checkpoint(model, tmp_path / str(len(weights)))
        loaded = load_checkpoint(tmp_path / str(len(weights)))
        assert_same_model(loaded, model)
        assert loaded.config.width_weights == weights
        session = DecodeSession(model)
        full = torch.full((model.num_units,), 8)
        errors[weights] = float((session.score(text, full) - session.score(text, 0 * full)).square().mean())
    assert errors[1.0, 1.0, 1000.0] < 0.8 * errors[()]
    with pytest.raises(InputError, match="width_weights=.*are for gptq.*but method='rtn'"):
        QuantizationConfig(width_weights=(1.0, 1.0, 1.0, 1.0, 2.0)).validate()
    with pytest.raises(InputError, match="must be one positive number for each of the widths"):
        QuantizationConfig("gptq", width_weights=(1.0, 2.0)).validate()


def test_saving_a_loaded_checkpoint_gives_the_same_files(saved: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(saved), tmp_path / "again")
    assert tuple(sorted(file.name for file in saved.iterdir())) == FILES
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_conv1d_model_with_biases_roundtrips(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf_model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    model = nest(hf_model, tiny_tokenizer, QuantizationConfig(group_size=32))
    save_checkpoint(model, tmp_path / "out")
    assert_same_model(load_checkpoint(tmp_path / "out"), model)


def test_values_that_fit_16_bits_are_stored_in_16(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    embedding, norm = tiny_llama.model.embed_tokens, tiny_llama.model.norm
    embedding.weight.data.copy_(embedding.weight.data.bfloat16())
    norm.weight.data.copy_(torch.linspace(0.5, 1.5, 64).half())
    model = nest(tiny_llama, tiny_tokenizer, QuantizationConfig(group_size=32))
    save_checkpoint(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.float16
    assert_same_model(load_checkpoint(tmp_path / "out"), model)


def test_real_model_roundtrips(shared_dir: Path, tmp_path: Path) -> None:
    model = load_model(str(shared_dir / "models" / "stories260K"), QuantizationConfig())
    save_checkpoint(model, tmp_path / "out")
    loaded = load_model(str(tmp_path / "out"), QuantizationConfig())
    assert_same_model(loaded, model)
    text = "Once upon a time"
    assert loaded.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert loaded.hf_model.generation_config.eos_token_id == model.hf_model.generation_config.eos_token_id


def test_transformers_reads_config_and_tokenizer(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.quantization_config == {
        "quant_method": "flexquant",
        "version": CHECKPOINT_VERSION,
        "planes": 8,
        "bit_order": "8c+t",
        "method": "rtn",
        "group_size": 32,
        "bit_widths": [3, 4, 5, 6, 8],
        "unit": "layer",
        "quantize_head": True,
        "width_weights": [],
        "rotate": False,
    }
    assert AutoTokenizer.from_pretrained(saved)("a b")["input_ids"] == [97, 32, 98]


def test_files_have_the_permissions_of_the_umask(nested_model: NestedCausalLM, tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        save_checkpoint(nested_model, tmp_path / "out")
    finally:
        os.umask(previous)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_loaded_weights_do_not_follow_the_file(copy: Path) -> None:
    loaded = load_checkpoint(copy)
    before = logits_by_width(loaded)
    loaded.dense_cache.clear()
    file = copy / "model.safetensors"
    with file.open("r+b") as stream:  # in place: the inode that was read
        stream.write(b"\xff" * file.stat().st_size)
    after = logits_by_width(loaded)
    assert all(torch.equal(after[bit_width], logits) for bit_width, logits in before.items())


# Damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.3, 0.9999], ids=["start", "inside", "end"])
def test_flipped_byte_is_refused(copy: Path, name: str, where: float) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(where * len(data))] ^= 0xFF
    (copy / name).write_bytes(data)
    assert is_nested_checkpoint(copy)
    assert_refused(copy, name)


@settings(max_examples=40)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(saved: Path, name: str, where: float, bit: int) -> None:
    original = (saved / name).read_bytes()
    data = bytearray(original)
    data[int(where * len(data))] ^= 1 << bit
    try:
        (saved / name).write_bytes(data)
        with pytest.raises(InputError) as caught:
            load_checkpoint(saved)
    finally:
        (saved / name).write_bytes(original)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999], ids=["empty", "half", "last_bytes"])
def test_truncated_file_is_refused(copy: Path, name: str, kept: float) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: int(kept * len(data))])
    assert_refused(copy, name)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert_refused(copy, f"{name} is missing")


def test_bytes_after_the_tensors_are_refused(copy: Path) -> None:
    with (copy / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    assert_refused(copy, r"model\.safetensors")


PLANES = "model.layers.1.mlp.down_proj.planes"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        pytest.param(lambda t: t.pop(PLANES), f"lacks 1 tensors, e.g. {PLANES}", id="missing"),
        pytest.param(lambda t: t.update(extra=torch.zeros(1)), "unexpected 1 tensors, e.g. extra", id="extra"),
        pytest.param(lambda t: t.update(renamed=t.pop(PLANES)), f"lacks 1 tensors, e.g. {PLANES}", id="renamed"),
        pytest.param(
            lambda t: t.update({PLANES: t[PLANES][:4]}), r"shape \[4, 64, 8\].* needs \[8, 64, 8\]", id="shape"
        ),
        pytest.param(lambda t: t.update({PLANES: t[PLANES].float()}), "is float32, but must be int32", id="dtype"),
        pytest.param(
            lambda t: t.update({PLANES: t[PLANES].view(torch.float32)}),
            "is float32, but must be int32",
            id="bytes_as_float",
        ),
        pytest.param(lambda t: t.update({PLANES: t[PLANES] ^ 1}), rf"{PLANES} has sha256 .* manifest", id="value"),
        pytest.param(
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}), "has dtype float32", id="widened"
        ),
    ],
)
def test_tensors_that_differ_from_the_manifest_are_refused(copy: Path, edit: Any, match: str) -> None:
    edit_tensors(copy, edit)
    assert_refused(copy, match)


def test_tensors_of_another_architecture_are_refused(copy: Path) -> None:
    edit_config(copy, lambda config: config.update(intermediate_size=180))
    assert_refused(copy, r"shape \[172, 64\]|shape \[8, 172, 4\].*needs \[8, 180, 4\]")
    edit_config(copy, lambda config: config.update(num_hidden_layers=3))
    assert_refused(copy, r"lacks \d+ tensors, e.g. model.layers.2")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        pytest.param({"version": 2}, "version 2, but this program reads 1", id="version"),
        pytest.param({"planes": 4}, "planes 4, but this program reads 8", id="planes"),
        pytest.param({"bit_order": "t8"}, "bit_order 't8', but this program reads '8c", id="bit_order"),
        pytest.param({"bit_widths": [3, 9]}, r"bit_widths=\(3, 9\) must be", id="widths"),
        pytest.param({"bit_widths": 8}, "bad quantization_config", id="widths_type"),
        pytest.param({"bit_widths": [4, 8]}, r"shape \[5, .* needs \[2, ", id="fewer_widths"),
        pytest.param({"group_size": 48}, "group_size=48 is not supported", id="group_size"),
        pytest.param({"group_size": 64}, r"shape \[5, .* needs \[5, ", id="other_group_size"),
        pytest.param({"method": "magic"}, "method='magic'", id="method"),
        pytest.param({"quant_method": "gptq"}, "no quantization_config of method 'flexquant'", id="quant_method"),
    ],
)
def test_quantization_of_another_kind_is_refused(copy: Path, edit: dict[str, Any], match: str) -> None:
    edit_config(copy, lambda config: config["quantization_config"].update(edit))
    assert_refused(copy, match)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        pytest.param(lambda m: m.update(version=2), "checkpoint version 2, but this program reads 1", id="version"),
        pytest.param(lambda m: m.pop("tensors"), "manifest.json is damaged", id="no_tensors"),
        pytest.param(lambda m: m["files"].pop("config.json"), "manifest.json is damaged", id="config_not_listed"),
        pytest.param(lambda m: m["tensors"].pop(PLANES), f"manifest.json lacks 1 tensors, e.g. {PLANES}", id="tensor"),
        pytest.param(lambda m: m["tensors"][PLANES].pop("sha256"), "has sha256 .* manifest.json says None", id="hash"),
    ],
)
def test_manifest_of_another_kind_is_refused(copy: Path, edit: Any, match: str) -> None:
    edit_manifest(copy, edit)
    assert_refused(copy, match)


def test_unknown_model_type_is_refused_in_one_line(copy: Path) -> None:
    edit_config(copy, lambda config: config.update(model_type="llama-of-tomorrow"))
    assert_refused(copy, "not a model that transformers knows")


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "is not a directory")
    assert_refused(tmp_path, r"manifest\.json is missing")


# Saving


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Interrupted()], ids=["full_disk", "interrupted"]
)
@pytest.mark.parametrize("stage", ["_write_config", "write_tensors", "write_json", "file_sha256"])
def test_failed_save_leaves_nothing(
    nested_model: NestedCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
) -> None:
    def fail(*args: Any) -> None:
        if isinstance(args[0], Path):
            args[0].write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint, stage, fail)
    with pytest.raises(type(error)):
        save_checkpoint(nested_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_as_safetensors_reports_it(
    nested_model: NestedCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: dict[str, Tensor], file: Path, metadata: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match=r"model\.safetensors: .*No space left on device"):
        save_checkpoint(nested_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(nested_model: NestedCausalLM, tmp_path: Path) -> None:
    for name in ("directory", "file"):
        out = tmp_path / name
        note = out / "note.txt" if name == "directory" else out
        note.parent.mkdir(exist_ok=True)
        note.write_text("mine")
        with pytest.raises(InputError, match="exists and is not empty"):
            save_checkpoint(nested_model, out)
        assert note.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_empty_output_directory_and_missing_parents_are_fine(nested_model: NestedCausalLM, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_checkpoint(nested_model, tmp_path / "empty")
    save_checkpoint(nested_model, tmp_path / "a" / "b")
    assert is_nested_checkpoint(tmp_path / "empty")
    assert is_nested_checkpoint(tmp_path / "a" / "b")


# Dispatch


def test_plain_and_nested_directories_are_told_apart(saved: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    assert is_nested_checkpoint(saved)
    assert not is_nested_checkpoint(tiny_model_dir)
    assert not is_nested_checkpoint(saved / "config.json")
    assert not is_nested_checkpoint(tmp_path / "absent")


def test_load_model_quantises_a_plain_directory_and_takes_a_nested_one_as_it_is(
    saved: Path, tiny_model_dir: Path
) -> None:
    config = QuantizationConfig(group_size=128, unit="half")
    plain = load_model(str(tiny_model_dir), config)
    assert plain.has_reference
    assert plain.config == config
    assert not load_model(str(tiny_model_dir), config, keep_reference=False).has_reference
    nested = load_model(str(saved), config)
    assert not nested.has_reference
    assert nested.config == QuantizationConfig(group_size=32)


def test_reference_width_is_refused_without_reference_weights(saved: Path) -> None:
    with pytest.raises(InputError, match="unquantised weights were asked for"):
        DecodeSession(load_checkpoint(saved)).score(TOKEN_IDS)
