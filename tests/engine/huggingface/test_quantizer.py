"""Nested models through transformers' own loaders: the same weights, saved and loaded without a bit's difference."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import tiny_causal_lm, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)

from flexquant_rl import FlexQuantConfig
from flexquant_rl.engine.checkpoint import (
    CONFIG_FILE,
    MANIFEST_FILE,
    TENSORS_FILE,
    WEIGHTS_ENTRY,
    WEIGHTS_NOTE,
    load_checkpoint,
    save_checkpoint,
)
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import file_sha256
from flexquant_rl.engine.huggingface.quantizer import FlexQuantizer, nested_model
from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig

PROMPT = torch.tensor([[1, 104, 101, 108, 108, 111]])
TINY: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),  # Conv1D with biases, and a tied head
    ("opt", {}),
    ("qwen2", {"tie_word_embeddings": True, "vocab_size": 136}),
    ("gemma", {}),
    ("gpt_neox", {}),
]


@pytest.fixture(scope="module")
def checkpoint(nested_model: NestedCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested checkpoint of the tiny Llama. Read it only."""
    path = tmp_path_factory.mktemp("quantizer") / "nested"
    save_checkpoint(nested_model, path)
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> PreTrainedModel:
    """The same, as transformers loads it. Read it only."""
    return load(checkpoint)


def load(path: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    return model


def rewritten(checkpoint: Path, out: Path, **entries: Any) -> Path:
    """A copy of a checkpoint with other entries in config.json, None for none, and a manifest that knows them."""
    out.mkdir()
    for file in checkpoint.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / CONFIG_FILE).read_text())
    config = {name: value for name, value in (config | entries).items() if value is not None}
    (out / CONFIG_FILE).write_text(json.dumps(config))
    manifest = json.loads((out / MANIFEST_FILE).read_text())
    manifest["files"][CONFIG_FILE] = file_sha256(out / CONFIG_FILE)
    (out / MANIFEST_FILE).write_text(json.dumps(manifest))
    return out


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def logits_at_largest_width(model: NestedCausalLM, token_ids: Tensor) -> Tensor:
    widths = torch.full((*token_ids.shape, model.num_units), max(model.bit_widths))
    return model.forward(token_ids, widths, keep=token_ids.shape[1]).logits


def test_loaded_model_is_the_nested_model(
    loaded: PreTrainedModel, nested_model: NestedCausalLM, checkpoint: Path
) -> None:
    assert isinstance(loaded, LlamaForCausalLM)
    assert sum(isinstance(module, NestedLinear) for module in loaded.modules()) == 15
    assert loaded.flexquant.fingerprint == nested_model.fingerprint
    assert_same_state(state(loaded), state(load_checkpoint(checkpoint).hf_model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_outside_any_plan_the_largest_width_is_read(loaded: PreTrainedModel, nested_model: NestedCausalLM) -> None:
    with torch.no_grad():
        logits = loaded(PROMPT).logits
    assert torch.equal(logits, logits_at_largest_width(nested_model, PROMPT))


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_whatever_is_asked(checkpoint: Path, loaded: PreTrainedModel, dtype: Any) -> None:
    assert_same_state(state(load(checkpoint, dtype=dtype)), state(loaded))


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 32},
        {"group_size": 32, "unit": "half", "bit_widths": (2, 4, 8)},
        {"group_size": 64, "quantize_head": False},
    ],
    ids=["plain", "half", "no_head"],
)
def test_plain_model_is_nested_as_by_us(
    tiny_model_dir: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: Any, options: dict[str, Any]
) -> None:
    ours = nest(tiny_llama, tiny_tokenizer, QuantizationConfig(**options), keep_reference=False)
    theirs = load(tiny_model_dir, quantization_config=FlexQuantConfig(**options))
    assert nested_model_of(theirs).fingerprint == ours.fingerprint
    assert nested_model_of(theirs).config == ours.config
    assert_same_state(state(theirs), state(ours.hf_model))


def nested_model_of(model: PreTrainedModel) -> NestedCausalLM:
    return nested_model(model)


@pytest.mark.parametrize(("family", "options"), TINY, ids=[family for family, _ in TINY])
@pytest.mark.parametrize("quantize_head", [True, False], ids=["head", "no_head"])
def test_saved_and_loaded_bit_for_bit(
    family: str, options: dict[str, Any], quantize_head: bool, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = tiny_causal_lm(tiny_config(family, **options))
    plain.save_pretrained(tmp_path / "plain")
    config = FlexQuantConfig(group_size=32, quantize_head=quantize_head)
    first = load(tmp_path / "plain", quantization_config=config)
    first.save_pretrained(tmp_path / "nested")
    again = load(tmp_path / "nested")
    assert_same_state(state(first), state(again))
    with torch.no_grad():
        logits = first(PROMPT).logits
        assert torch.equal(again(PROMPT).logits, logits)
        assert not torch.allclose(plain(PROMPT).logits, logits, atol=1e-6), "nothing was quantised"
    again.save_pretrained(tmp_path / "again", max_shard_size="1MB")  # as `push_to_hub` calls it
    for name in (TENSORS_FILE, MANIFEST_FILE, CONFIG_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "nested" / name).read_bytes(), name
    # And it is a checkpoint of ours once the tokenizer is there.
    tiny_tokenizer.save_pretrained(tmp_path / "again")
    ours = load_checkpoint(tmp_path / "again")
    assert ours.fingerprint == nested_model_of(again).fingerprint
    assert torch.equal(logits_at_largest_width(ours, PROMPT), logits)


def test_saving_over_a_checkpoint_replaces_it(tmp_path: Path, loaded: PreTrainedModel, tiny_model_dir: Path) -> None:
    other = load(tiny_model_dir, quantization_config=FlexQuantConfig(group_size=64))
    other.save_pretrained(tmp_path / "nested")
    loaded.save_pretrained(tmp_path / "nested")
    assert_same_state(state(load(tmp_path / "nested")), state(loaded))


def test_saving_refuses_what_would_be_another_file(tmp_path: Path, loaded: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="variant='fp16': a nested model is saved as one checkpoint"):
        loaded.save_pretrained(tmp_path / "out", variant="fp16")
    loaded.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_checkpoints_without_the_note_load(checkpoint: Path, loaded: PreTrainedModel, tmp_path: Path) -> None:
    assert json.loads((checkpoint / CONFIG_FILE).read_text())[WEIGHTS_ENTRY] == WEIGHTS_NOTE
    old = rewritten(checkpoint, tmp_path / "old", **{WEIGHTS_ENTRY: None})
    assert_same_state(state(load(old)), state(loaded))
    assert load_checkpoint(old).fingerprint == loaded.flexquant.fingerprint


def test_checkpoint_without_a_manifest_loads(checkpoint: Path, loaded: PreTrainedModel, tmp_path: Path) -> None:
    # As transformers downloads it: what it knows of, and no other file.
    part = rewritten(checkpoint, tmp_path / "part")
    (part / MANIFEST_FILE).unlink()
    assert_same_state(state(load(part)), state(loaded))


def flip(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.planes"][0, 0, 0] ^= 1


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.scale"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.extra"] = torch.zeros(1)


def shorten(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "up_proj.planes has sha256"),
        (drop, "lacks 1 tensors, e.g. model.layers.1.mlp.up_proj.scale"),
        (add, "has unexpected 1 tensors, e.g. model.extra"),
        (shorten, "model.norm.weight has shape"),
    ],
)
def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path, damage: Any, message: str) -> None:
    path = rewritten(checkpoint, tmp_path / "damaged")
    tensors = load_file(path / TENSORS_FILE)
    damage(tensors)
    save_file(tensors, path / TENSORS_FILE)
    with pytest.raises(InputError, match=message):
        load(path)


def test_file_cut_short_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = rewritten(checkpoint, tmp_path / "cut")
    (path / TENSORS_FILE).write_bytes((path / TENSORS_FILE).read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged or cut short"):
        load(path)


def test_another_version_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    stored = json.loads((checkpoint / CONFIG_FILE).read_text())["quantization_config"]
    path = rewritten(checkpoint, tmp_path / "other", quantization_config=stored | {"version": 99})
    with pytest.raises(InputError, match="version 99, but this program reads"):
        load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 48}, "group_size=48 is not supported"),
        ({"bit_widths": (3, 4)}, "end in 8; use 3,4,8"),
        ({"bits": 4}, "no option 'bits'"),
        ({"method": "awq"}, "method='awq' is not a quantiser"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        FlexQuantConfig(**options)
    assert "\n" not in str(error.value)


def test_calibrated_methods_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(InputError, match="run `fq quantize SOURCE OUT --method gptq"):
        load(tiny_model_dir, quantization_config=FlexQuantConfig("gptq"))


@pytest.mark.parametrize("device_map", ["auto", {"model": 0, "lm_head": "cpu"}, {"": "disk"}])
def test_several_devices_are_refused(device_map: Any) -> None:
    with pytest.raises(InputError, match="a nested one is on one"):
        FlexQuantizer(FlexQuantConfig()).validate_environment(device_map=device_map)
    FlexQuantizer(FlexQuantConfig()).validate_environment(device_map={"": "cpu"}, weights_only=True)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_another_dtype_is_refused(checkpoint: Path, cast: Any) -> None:
    # transformers refuses some casts of any quantised model itself, with a ValueError too.
    with pytest.raises(ValueError, match="computes in float32 from float16 scales|not supported for quantized model"):
        cast(load(checkpoint))


def test_moving_drops_what_was_decoded(loaded: PreTrainedModel) -> None:
    model = copy.deepcopy(loaded)
    linear = model.model.layers[0].mlp.up_proj
    before = linear.dense(8)
    assert linear.dense(8) is before
    model.to("cpu")
    assert linear.dense(8) is not before


def test_generates_what_a_session_decodes(loaded: PreTrainedModel, nested_model: NestedCausalLM) -> None:
    session = DecodeSession(nested_model)
    output = session.prefill(PROMPT)
    expected = []
    for _ in range(20):
        expected.append(int(output.logits.argmax(-1)))
        output = session.step(torch.tensor(expected[-1:]), torch.full((nested_model.num_units,), 8))
    found = loaded.generate(PROMPT, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found[0, PROMPT.shape[1] :].tolist() == expected


def test_padded_rows_of_a_batch_are_as_alone(loaded: PreTrainedModel) -> None:
    prompts = [PROMPT[0, :2], PROMPT[0], PROMPT[0, 3:]]
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in prompts]).long()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = loaded.generate(ids, attention_mask=mask, **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = loaded.generate(prompt[None], **options)
        assert row[longest:].tolist() == alone[0, len(prompt) :].tolist()


def test_samples_and_streams(loaded: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    torch.manual_seed(3)
    expected = loaded.generate(PROMPT, **options)
    torch.manual_seed(3)
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True)
    found = loaded.generate(PROMPT, streamer=streamer, **options)
    assert found.tolist() == expected.tolist()
    assert "".join(pieces(streamer)) == tiny_tokenizer.decode(found[0, PROMPT.shape[1] :])
    torch.manual_seed(4)
    assert loaded.generate(PROMPT, **options).tolist() != expected.tolist()


def pieces(streamer: TextIteratorStreamer) -> Iterator[str]:
    yield from streamer


def test_plain_models_hold_no_nested_one(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM is not a nested model; load a nested checkpoint"):
        nested_model(tiny_llama)


def test_text_needs_the_tokenizer(loaded: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="without its tokenizer; load both with flexquant_rl.load_model"):
        _ = nested_model_of(loaded).token_text
    assert nested_model_of(loaded).eos_token_ids == (2,)
