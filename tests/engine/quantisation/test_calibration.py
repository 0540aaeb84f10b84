"""Calibration text: what reaches each linear, what is made of it, what is kept of it, and the command's options."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from cli_runner import run, write_sentences
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flexquant_rl import cli
from flexquant_rl.engine.checkpoint import load_checkpoint, load_model, save_checkpoint
from flexquant_rl.engine.control.output_kl import output_kl_nats
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import REFERENCE_WIDTH
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import NestedCausalLM, decoder_layers, make_units
from flexquant_rl.engine.nesting import nest, unseen
from flexquant_rl.engine.quantisation import calibration
from flexquant_rl.engine.quantisation.calibration import Calibration, input_hessians
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.quantisation.gptq import quantize_gptq
from flexquant_rl.engine.quantisation.quantize import quantize_rtn
from flexquant_rl.engine.quantisation.token_weights import token_weights

GPTQ = QuantizationConfig(method="gptq", group_size=32)


def build_llama() -> PreTrainedModel:
    """Half as wide as `tiny_llama`: GPTQ walks over the inputs of every linear. The last group is short here too."""
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {
        "vocab_size": 128,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(initializer_range=0.1, tie_word_embeddings=False, **sizes, **heads, **tokens))


def build_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def build_opt() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(vocab_size=128, max_position_embeddings=64, word_embed_proj_dim=32, **sizes))


def build_neox() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=128, max_position_embeddings=64, **sizes))


def seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The same random model every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


@pytest.fixture(params=[build_llama, build_gpt2, build_opt, build_neox], ids=["llama", "gpt2", "opt", "neox"])
def hf_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return seeded(request.param)


@pytest.fixture(scope="module")
def small_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with `build_llama` and the tokenizer of `tiny_model_dir`. Read it only."""
    path = tmp_path_factory.mktemp("small-llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, path)
    seeded(build_llama).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Five windows of 24 tokens, `[5, 24]`. Read it only."""
    return torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def hessians_of_a_whole_pass(
    hf_model: PreTrainedModel, names: list[str], windows: Tensor, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same numbers with a hook on every linear and one pass over all the text."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).double())

    handles = [hf_model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    hf_model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return {name: (x.T * weights[name].double()) @ x / len(x) for name, x in inputs.items()}


def stages_of(hf_model: PreTrainedModel, *, head: bool) -> list[list[str]]:
    return [list(unit.linears) for unit in make_units(hf_model, QuantizationConfig(quantize_head=head))]


@pytest.mark.parametrize("head", [True, False])
# Five passes of a window; 2, 2 and 1 windows; one pass. One block of inputs; a few, the last one short; many.
@pytest.mark.parametrize(("batch_tokens", "block_inputs"), [(1, 512), (48, 20), (10_000, 3)])
def test_layer_by_layer_is_a_whole_pass(
    hf_model: PreTrainedModel,
    windows: Tensor,
    batch_tokens: int,
    block_inputs: int,
    head: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "_BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(calibration, "_BLOCK_INPUTS", block_inputs)
    stages = stages_of(hf_model, head=head)
    names = [name for stage in stages for name in stage]
    weights = {name: torch.rand(windows.numel()) * 2 for name in names}
    del weights[names[0]]  # one that weighs all tokens alike
    expected = hessians_of_a_whole_pass(hf_model, names, windows, {names[0]: torch.ones(windows.numel()), **weights})
    layers = list(decoder_layers(hf_model))
    found = dict(zip(names, input_hessians(hf_model, layers, stages, windows, weights), strict=True))
    for name in names:
        scale = float(expected[name].diagonal().mean())
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
    for module in hf_model.modules():
        assert not {*module._forward_pre_hooks, *module._forward_hooks}, "a hook was left behind"
        assert "forward" not in module.__dict__, "a layer is still stood in for"


def test_layers_run_once_for_the_text_and_once_for_a_token(hf_model: PreTrainedModel, windows: Tensor) -> None:
    tokens_of_layers: list[list[int]] = []
    layers = list(decoder_layers(hf_model))
    for layer in layers:
        seen: list[int] = []
        tokens_of_layers.append(seen)
        module = next(layer.children())  # a norm or the attention, which run only where the layer does
        module.register_forward_hook(lambda _, args, out, seen=seen: seen.append(1))
    for _ in input_hessians(hf_model, layers, stages_of(hf_model, head=True), windows, {}):
        continue
    assert tokens_of_layers == [[1, 1]] * len(layers)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_linear_is_fitted_to_what_the_unquantised_model_feeds_it(
    hf_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, windows: Tensor, method: str
) -> None:
    names = [name for stage in stages_of(hf_model, head=True) for name in stage]
    expected = hessians_of_a_whole_pass(hf_model, names, windows, token_weights(hf_model, names, windows, unseen))
    config = QuantizationConfig(method="gptq" if method == "gptq" else "rtn", group_size=32)
    model = nest(hf_model, tiny_tokenizer, config, calibration=windows)
    assert model.calibration == Calibration.of(windows)
    quantize = quantize_gptq if method == "gptq" else quantize_rtn
    for name, linear in model.nested_linears().items():
        dense = linear.reference_weight
        assert dense is not None
        alone = quantize(dense, hessian=expected[name], group_size=32)
        # Float32 rounds differently, layer by layer: a code in a thousand may fall on the other side of a tie.
        assert float((linear.planes != alone.planes).float().mean()) < 0.05, name
        torch.testing.assert_close(linear.scale, alone.scale, rtol=0.05, atol=1e-3, msg=name)


def test_linears_that_no_token_reaches_are_rounded(tiny_tokenizer: PreTrainedTokenizerFast, windows: Tensor) -> None:
    llama = seeded(build_llama)
    llama.model.layers[0].mlp.register_module("spare", nn.Linear(32, 8))  # an expert that is never chosen
    model = nest(llama, tiny_tokenizer, GPTQ, calibration=windows)
    spare = model.nested_linears()["model.layers.0.mlp.spare"]
    error = spare.dense(8) - spare.dense(0)
    assert float(error.abs().max()) < 0.01


def test_gptq_needs_text(tiny_model_dir: Path) -> None:
    with pytest.raises(InputError, match=r"^method='gptq' fits weights to text.*--calibration FILE. and use OUT$"):
        load_model(str(tiny_model_dir), GPTQ)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(0, 24, dtype=torch.int64), "int64 \\[0, 24\\] but must be .* at least one token; give more text"),
        (torch.zeros(4, 4), "float32 \\[4, 4\\]"),
        (torch.full((2, 4), 128), "token ids from 128 to 128, but the model knows 0 to 127; use the model's own"),
    ],
)
def test_bad_windows_are_refused(
    windows: Tensor, message: str, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        nest(tiny_llama, tiny_tokenizer, GPTQ, calibration=windows)
    assert "\n" not in str(caught.value)


def test_facts_are_of_the_tokens(windows: Tensor) -> None:
    digest = hashlib.sha256(b"".join(token.to_bytes(8, "little") for token in windows.flatten().tolist())).hexdigest()
    assert Calibration.of(windows) == Calibration(120, digest)


# Checkpoints


@pytest.fixture(scope="module")
def calibrated(small_model_dir: Path, windows: Tensor) -> NestedCausalLM:
    """Read it only."""
    return nest(*load_causal_lm(str(small_model_dir)), GPTQ, calibration=windows)


def test_checkpoint_keeps_method_and_facts(calibrated: NestedCausalLM, tmp_path: Path) -> None:
    save_checkpoint(calibrated, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert (loaded.config, loaded.calibration) == (calibrated.config, calibrated.calibration)
    assert loaded.config.method == "gptq"
    assert loaded.fingerprint == calibrated.fingerprint
    save_checkpoint(loaded, tmp_path / "again")
    for key in ("quantization_config", "architectures"):
        first, second = (json.loads((tmp_path / out / "config.json").read_text())[key] for out in ("out", "again"))
        assert first == second
    # Whatever method is asked for, a nested checkpoint is what it is.
    assert load_model(str(tmp_path / "out"), QuantizationConfig()).config.method == "gptq"


@pytest.mark.parametrize("damage", [{"num_tokens": 3}, {"tokens": 3, "sha256": ""}, 7])
def test_bad_facts_are_refused(calibrated: NestedCausalLM, tmp_path: Path, damage: object) -> None:
    out = tmp_path / "out"
    save_checkpoint(calibrated, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["calibration"] = damage
    (out / "config.json").write_text(json.dumps(config))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["config.json"] = hashlib.sha256((out / "config.json").read_bytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="bad quantization_config"):
        load_checkpoint(out)


# The command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Sentences for the character tokenizer."""
    return write_sentences(tmp_path / "text.txt", 900)


@pytest.mark.parametrize(("method", "used"), [(None, "gptq"), ("rtn", "rtn"), ("gptq", "gptq")])
def test_command_calibrates(small_model_dir: Path, tmp_path: Path, text: Path, method: str | None, used: str) -> None:
    options = ("--group-size", 32, "--calibration", text, "--text", text, "--tune-steps", 0)
    options = (*options, *(("--method", method) if method else ()))
    result = run(cli.main, "quantize", small_model_dir, tmp_path / "out", *options).result
    assert result["calibration_tokens"] == 64 * 128  # 256 tokens do not fit the context
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.config.method == used
    assert loaded.calibration is not None
    assert loaded.calibration.num_tokens == result["calibration_tokens"]
    assert result["perplexity_by_width"]["8"] == pytest.approx(result["perplexity_by_width"]["reference"], rel=0.01)


def test_command_has_text_for_the_embedded_model(
    small_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexquant_rl.engine.embedded.embedded_model_path", lambda: small_model_dir)
    result = run(cli.main, "quantize", "default", tmp_path / "out", "--method", "gptq", "--tune-steps", 0).result
    assert result["calibration_tokens"] == 64 * 128
    assert load_checkpoint(tmp_path / "out").config.method == "gptq"


def test_command_wants_text_for_gptq(small_model_dir: Path, tmp_path: Path) -> None:
    error = run(cli.main, "quantize", small_model_dir, tmp_path / "out", "--method", "gptq").error
    assert error == "--method gptq fits the weights to text; give it some with --calibration FILE"
    assert not (tmp_path / "out").exists()


def test_command_refuses_bad_text(small_model_dir: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    start = ("quantize", small_model_dir, tmp_path / "out", "--calibration")
    assert "holds no window of 128 tokens; give more text" in run(cli.main, *start, short).error
    missing = tmp_path / "none.txt"
    assert run(cli.main, *start, missing).error == f"{missing} is not a file; --calibration takes text files"


# Real models; more in test_format_quality.py


@pytest.mark.slow
def test_gptq_is_better_than_round_to_nearest_on_a_real_model(shared_dir: Path) -> None:
    text = shared_dir / "text" / "tinystories_valid_head.txt"
    model_dir = shared_dir / "models" / "stories260K"
    if not (model_dir / "model.safetensors").is_file() or not text.is_file():
        pytest.skip("needs stories260K and its text in the shared folder")
    output_kl: dict[str, dict[int, float]] = {}
    for method in ("rtn", "gptq"):
        hf_model, tokenizer = load_causal_lm(str(model_dir))
        ids = torch.tensor([tokenizer(text.read_text(encoding="utf-8")[:100_000], verbose=False)["input_ids"]])[0]
        windows = ids[: len(ids) // 128 * 128].view(-1, 128)
        config = QuantizationConfig(method="gptq" if method == "gptq" else "rtn")
        model = nest(hf_model, tokenizer, config, calibration=windows[:48] if method == "gptq" else None)
        session, unseen_windows = DecodeSession(model, max_length=128), windows[-48:]
        full = session.score(unseen_windows, torch.full((model.num_units,), REFERENCE_WIDTH))
        scores = {b: session.score(unseen_windows, torch.full((model.num_units,), b)) for b in (4, 8)}
        output_kl[method] = {b: float(output_kl_nats(full, scores[b]).mean()) for b in scores}
    # KL, not perplexity: the gap of perplexity at 4 bits is noise until 400 windows are read.
    assert output_kl["gptq"][4] < 0.8 * output_kl["rtn"][4], output_kl
    assert output_kl["gptq"][8] < 0.001, output_kl
