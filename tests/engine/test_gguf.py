""".gguf files as models: the values that the file stands for, its own tokenizer, and one line for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runner import run, write_text
from transformers import LlamaConfig, LlamaForCausalLM

from flexquant_rl import cli
from flexquant_rl.engine import loading
from flexquant_rl.engine.benches import llama_cpp
from flexquant_rl.engine.benches.options import VerifyBench
from flexquant_rl.engine.benches.verify import bench_verify
from flexquant_rl.engine.checkpoint import load_checkpoint, load_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.loading import load_causal_lm

VOCAB_SIZE = 261


def packages() -> None:
    """Skips a test where the extra is not installed."""
    for name in ("gguf", "accelerate"):
        pytest.importorskip(name, reason="the extra `gguf` is not installed")


def tiny_model() -> LlamaForCausalLM:
    """A random Llama in float16's numbers, whose rows are whole blocks of 32."""
    config = LlamaConfig(
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(config).half().float().eval()


def byte_tokens() -> list[str]:
    """The 256 letters of a byte-level vocabulary, two pairs and three specials."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    letters = [chr(byte) for byte in kept] + [chr(256 + index) for index in range(len(others))]
    return [*letters, "th", "the", "<unk>", "<s>", "</s>"]


def write(path: Path, model: LlamaForCausalLM, kind: str = "F16") -> Path:
    """Writes a model with its tokenizer as llama.cpp's conversion does."""
    import gguf

    class WithVocabulary(gguf.GGUFWriter):
        def add_tokenizer_model(self, name: str) -> None:
            super().add_tokenizer_model("gpt2")
            self.add_tokenizer_pre("default")
            self.add_token_list(byte_tokens())
            self.add_token_types([1] * (VOCAB_SIZE - 3) + [3, 3, 3])
            self.add_token_merges(["t h", "th e"])
            self.add_bos_token_id(VOCAB_SIZE - 2)
            self.add_eos_token_id(VOCAB_SIZE - 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", WithVocabulary)
        llama_cpp.write_gguf(model, path, kind)  # type: ignore[arg-type]
    return path


def test_values_and_tokenizer_of_the_file(tmp_path: Path) -> None:
    packages()
    model = tiny_model()
    loaded, tokenizer = load_causal_lm(str(write(tmp_path / "tiny.gguf", model)))
    expected = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name
    assert getattr(loaded.config, "quantization_config", None) is None
    assert tokenizer.decode(tokenizer("the thing").input_ids, skip_special_tokens=True) == "the thing"
    assert len(tokenizer("the", add_special_tokens=False).input_ids) == 1
    assert tokenizer.eos_token_id == VOCAB_SIZE - 1


def test_quantised_files_stand_for_their_values(tmp_path: Path) -> None:
    packages()
    import gguf

    model = tiny_model()
    loaded, _ = load_causal_lm(str(write(tmp_path / "tiny.gguf", model, "Q8_0")))
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    torch.testing.assert_close(
        loaded.model.layers[1].mlp.up_proj.weight.detach(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7
    )


def test_commands_take_the_file_for_a_model(tmp_path: Path) -> None:
    packages()
    file = write(tmp_path / "tiny.gguf", tiny_model())
    result = run(cli.main, "quantize", file, tmp_path / "nested", "--group-size", 32).result
    assert Path(result["out"]) == tmp_path / "nested"
    nested = load_checkpoint(tmp_path / "nested")
    plain = tmp_path / "plain"
    tiny_model().save_pretrained(plain)
    nested.tokenizer.save_pretrained(plain)
    assert load_model(str(plain), nested.config).fingerprint == nested.fingerprint
    for model in (file, tmp_path / "nested"):
        found = run(cli.main, "generate", model, "--policy", "fixed:8", "--prompt", "the", "--max-new-tokens", 3).result
        assert found["num_tokens"] >= 1
    found = run(cli.main, "inspect", file, "--json").result
    assert (found["kind"], found["architecture"], found["layers"]) == ("gguf model", "llama", 2)
    assert found["weights"] == sum(parameter.numel() for parameter in tiny_model().parameters())


@pytest.mark.timeout(600)
def test_other_commands_take_one_too(tmp_path: Path) -> None:
    packages()
    file, text = write(tmp_path / "tiny.gguf", tiny_model()), write_text(tmp_path / "text.txt")
    options = ("--text", text)
    assert "give --out FILE" in run(cli.main, "profile", file, *options).error
    profile = tmp_path / "profile.json"
    result = run(cli.main, "profile", file, *options, "--source", "roofline", "--out", profile).result
    assert result["profile"] == str(profile)
    episodes = ("--env.prompt-tokens", 8, "--env.max-new-tokens", 4, "--sequences", 2, "--profile", profile)
    (row,) = run(cli.main, "evaluate", file, "--policy", "fixed:4", *options, *episodes).result["rows"]
    assert row["output_kl_nats"] > 0
    recorded = ("--tokens", 40, "--prompt-tokens", 8, "--max-new-tokens", 12, "--widths", 3)
    assert run(cli.main, "record", file, tmp_path / "traces", *options, *recorded).result["num_tokens"] >= 12
    exported = run(cli.main, "export", "fixed:4", tmp_path / "policy", "--model", file).result
    assert len(exported["units"]) == 3
    timed = VerifyBench(model=str(file), rounds=1, prompt_tokens=8, num_tokens=(1, 2), new_tokens=1, bit_widths=(8,))
    assert {row["model"] for row in bench_verify(timed)} == {"tiny.gguf"}


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_without_the_extra_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    find_spec = loading.importlib.util.find_spec
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find_spec(name, *rest)
    )
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    arguments = (file, tmp_path / "out") if command == "quantize" else (file,)
    error = run(cli.main, command, *arguments).error
    assert 'pip install "flexquant-rl[gguf]"' in error
    assert "gguf" in error.split(":")[1]
    assert not (tmp_path / "out").exists()


def test_what_is_no_gguf_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.gguf is not a file"):
        load_causal_lm(str(tmp_path / "none.gguf"))
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="does not begin as a .gguf file does"):
        load_model(str(tmp_path / "pointer.gguf"))
    packages()
    whole = write(tmp_path / "whole.gguf", tiny_model()).read_bytes()
    for length in (40, 2000, len(whole) - 500):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut.gguf.*cannot be loaded") as error:
            load_causal_lm(str(tmp_path / "cut.gguf"))
        assert "\n" not in str(error.value)
