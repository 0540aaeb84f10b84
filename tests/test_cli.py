"""Each `fq` subcommand, end to end, on a tiny model; mistakes are in bad_input, training in test_train_cli."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from cli_runner import TINY_EPISODES, Finished, run, tree, write_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flexquant_rl import cli, train
from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.runs.run import new_run
from flexquant_rl.engine.benches.harness import BenchRefusedError
from flexquant_rl.engine.bits_display import coloured, has_colours, legend, numbers
from flexquant_rl.engine.checkpoint import load_checkpoint, load_model
from flexquant_rl.engine.control import runner
from flexquant_rl.engine.control.artefact import load_policy, save_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile, profile_model
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.streamed_text import StreamedText
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.prompts import load_windows

WIDTHS = (3, 4, 5, 6, 8)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def quantized(tiny_model_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    out = tmp_path_factory.mktemp("quantized") / "nested"
    return out, run(cli.main, "quantize", tiny_model_dir, out, "--group-size", 32, "--text", text)


@pytest.fixture(scope="module")
def nested(quantized: tuple[Path, Finished]) -> Path:
    """The checkpoint that `fq quantize` wrote."""
    return quantized[0]


@pytest.fixture(scope="module")
def profiled(nested: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A copy of the checkpoint with the `profile.json` that `fq profile` put into it; every step took 1 ms."""

    def one_millisecond(step: Callable[[], object], device: torch.device) -> float:
        step()
        return 1.0

    model = shutil.copytree(nested, tmp_path_factory.mktemp("profiled") / "model")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "clock_ms", one_millisecond)
        return model, run(cli.main, "profile", model, "--text", text, "--steps", 40)


@pytest.fixture(scope="module")
def run_dir(nested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What train.py leaves of a finished run that `fq export` reads; the policy is untrained."""
    model = load_checkpoint(nested)
    schema = SignalSchema(model.num_units, model.bit_widths)
    torch.manual_seed(0)
    net = PrecisionNet(schema)
    torch.nn.init.normal_(net.width_head.weight)  # so that widths differ from token to token
    dial = (DialPoint(100.0, 1.2, 0.01, 6.0), DialPoint(30.0, 1.5, 0.05, 5.0), DialPoint(10.0, 1.8, 0.1, 4.0))
    names = tuple(unit.name for unit in model.units)
    folder = tmp_path_factory.mktemp("run") / "run"
    sensitivity = torch.tensor([0.5, 0.1, 0.03, 0.01, 0.0]).expand(3, -1)
    with new_run(TrainConfig(model=str(nested)), folder):
        policy = LearnedPolicy(net, PolicyCard(schema, model.fingerprint, names, dial))
        for name in ("seeds/0/policy", "policy"):
            profile = Profile(roofline_cost(model), sensitivity, WIDTHS, model.fingerprint, 9, "8-bit")
            save_policy(policy, profile, folder / name)
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    out = tmp_path_factory.mktemp("exported") / "policy"
    return out, run(cli.main, "export", run_dir, out)


def test_help_names_every_command() -> None:
    finished = run(cli.main, "--help")
    assert finished.code == 0
    assert all(name in finished.out for name in cli.COMMANDS)


def test_quantize(quantized: tuple[Path, Finished]) -> None:
    out, finished = quantized
    result = finished.result
    assert result["out"] == str(out)
    assert result["bytes"] == sum(size for size in tree(out).values() if size is not None)
    assert result["seconds"] > 0
    perplexities = result["perplexity_by_width"]
    assert list(perplexities) == ["3", "4", "5", "6", "8", "reference"]
    assert all(value > 1 for value in perplexities.values())
    assert abs(perplexities["8"] / perplexities["reference"] - 1) < 0.01
    assert load_checkpoint(out).config.group_size == 32


def test_quantize_without_text(tiny_model_dir: Path, tmp_path: Path) -> None:
    finished = run(cli.main, "quantize", tiny_model_dir, tmp_path / "out", "--bit-widths", 4, 8, "--unit", "half")
    assert finished.result.keys() == {"out", "bytes", "seconds", "peak_memory_bytes"}
    model = load_checkpoint(tmp_path / "out")
    assert model.bit_widths == (4, 8)
    assert model.num_units == 5


def test_profile(profiled: tuple[Path, Finished]) -> None:
    model, finished = profiled
    result = finished.result
    assert result["source"] == "measured"
    assert result["latency_ms_by_width"].keys() == {str(width) for width in WIDTHS}
    assert list(result["latency_ms_by_width"].values()) == pytest.approx([1.0] * len(WIDTHS), abs=1e-3)
    assert 0 <= result["table_error_p50"] <= result["table_error_p95"] < 1e-3
    assert torch.tensor(result["sensitivity"]).shape == (3, len(WIDTHS))
    profile = Profile.load(model / "profile.json")
    assert result["profile"] == str(model / "profile.json")
    assert profile.cost.source == "measured"
    assert profile.reference == "8-bit", "a nested checkpoint holds no unquantised weights"
    profile.cost.check(load_checkpoint(model))
    assert profile.drafts is not None
    assert result["drafts"] == profile.drafts.shares()
    assert result["drafts"]["draft_share_by_width"].keys() == {"3", "4", "5", "6"}
    assert result["drafts"]["pass_share_by_tokens"].keys() == {str(tokens) for tokens in range(1, 10)}
    assert run(cli.main, "inspect", model / "profile.json").result["drafts"] == result["drafts"]


def test_profile_of_a_plain_model(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    finished = run(cli.main, "profile", tiny_model_dir, "--text", text, "--source", "roofline", "--out", out)
    assert finished.result["table_error_p50"] is None
    assert Profile.load(out).reference == "unquantised"
    assert "profile.json" not in tree(tiny_model_dir)


def test_profile_sees_all_of_the_text(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def spy(model: NestedCausalLM, windows: torch.Tensor, *args: Any, **kwargs: Any) -> Profile:
        seen.append(windows)
        return profile_model(model, windows, *args, **kwargs)

    monkeypatch.setattr("flexquant_rl.agents.commands.profile.profile_model", spy)
    out = tmp_path / "profile.json"
    assert not run(cli.main, "profile", tiny_model_dir, "--text", text, "--source", "roofline", "--out", out).code
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    train = load_windows(tokenizer, seen[0].shape[1] + 1, [text]).train[:, :-1]
    assert len(seen[0]) == 12 < len(train)
    assert torch.equal(seen[0][[0, -1]], train[[0, -1]])


def test_plain_model_is_nested_as_the_policy_was_trained(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    quantization = QuantizationConfig(group_size=32, bit_widths=(4, 8))
    model = load_model(str(tiny_model_dir), quantization)
    schema = SignalSchema(model.num_units, model.bit_widths)
    names = tuple(unit.name for unit in model.units)
    config = {"quantization": asdict(quantization)}
    sensitivity = torch.tensor([0.1, 0.01]).expand(model.num_units, -1)
    card = PolicyCard(schema, model.fingerprint, names, (DialPoint(30.0, 1.5, 0.05, 5.0),), config)
    profile = Profile(roofline_cost(model), sensitivity, (4, 8), model.fingerprint, 9, "unquantised")
    save_policy(LearnedPolicy(PrecisionNet(schema), card), profile, tmp_path / "policy")
    options = ("--policy", tmp_path / "policy", "--prompt", "abc", "--max-new-tokens", 3)
    assert run(cli.main, "generate", tiny_model_dir, *options).result["num_tokens"] == 3
    options = ("--text", text, *TINY_EPISODES, "--sequences", 2, "--dials", 1)
    finished = run(cli.main, "evaluate", tiny_model_dir, "--policy", "fixed:4", tmp_path / "policy", *options)
    assert len(finished.result["rows"]) == 2


def test_evaluate(nested: Path, exported: tuple[Path, Finished], text: Path) -> None:
    policies = ("fixed:4", "knapsack:5", "random:3.5", "entropy:1.5", exported[0])
    options = ("--text", text, *TINY_EPISODES, "--sequences", 3, "--dials", 2)
    finished = run(cli.main, "evaluate", nested, "--policy", *policies, *options)
    rows = finished.result["rows"]
    assert [row["policy"] for row in rows] == [*map(str, policies[:4]), str(exported[0]), str(exported[0])]
    assert rows[0]["mean_bit_width"] == 4
    assert rows[0]["kl_weight"] is None
    assert rows[4]["kl_weight"] < rows[5]["kl_weight"]
    assert all(row["output_kl_nats"] >= 0 and row["speedup_measured"] > 0 for row in rows)
    assert "fixed:4" in finished.out.splitlines()[2]


def test_evaluate_against_8_bits_where_no_other_copy_exists(nested: Path, text: Path) -> None:
    options = ("--text", text, *TINY_EPISODES, "--sequences", 2)
    (row,) = run(cli.main, "evaluate", nested, "--policy", "fixed:8", *options).result["rows"]
    assert row["output_kl_nats"] < 1e-6, "steps and the parallel pass round differently"
    assert row["top1_agreement"] == 1


def test_export(run_dir: Path, exported: tuple[Path, Finished]) -> None:
    out, finished = exported
    result = finished.result
    assert result["out"] == str(out)
    assert result["bytes"] == sum(size for size in tree(out).values() if size is not None)
    assert result["units"] == ["layer.0", "layer.1", "head"]
    assert [point["kl_weight"] for point in result["dial"]] == [100.0, 30.0, 10.0]
    assert (out / "policy.safetensors").read_bytes() == (run_dir / "policy" / "policy.safetensors").read_bytes()
    assert load_policy(out).card == load_policy(run_dir / "policy").card


class TestGenerate:
    def generate(self, nested: Path, policy: Path, *options: object, stdout: TextIO | None = None) -> Finished:
        arguments = ("--policy", policy, "--prompt", "abc abc abc", "--max-new-tokens", 6)
        return run(cli.main, "generate", nested, *arguments, *options, stdout=stdout)

    def test_text_then_json(self, nested: Path, exported: tuple[Path, Finished]) -> None:
        finished = self.generate(nested, exported[0])
        assert finished.result["num_tokens"] == 6
        assert finished.result["kl_weight"] == 30, "the middle of the policy's table"
        assert 3 <= finished.result["mean_bit_width"] <= 8
        assert len(finished.out.splitlines()) >= 2
        assert "bits:" not in finished.out

    def test_speed_sets_the_dial(self, nested: Path, exported: tuple[Path, Finished]) -> None:
        fastest = self.generate(nested, exported[0], "--speed", 1.8)
        assert fastest.result["kl_weight"] == 10
        between = self.generate(nested, exported[0], "--speed", 1.65)
        assert between.result["kl_weight"] == pytest.approx((30 * 10) ** 0.5), "half way, on a log scale"
        assert between.result["speed_asked"] == 1.65
        assert "speed 1.65 asked" in between.err
        assert "expected 1.65x modelled, output KL 7.07e-02 nats, 4.50 bits" in between.err
        assert self.generate(nested, exported[0], "--kl-weight", 77).result["kl_weight"] == 77

    def test_sampling_is_seeded(self, nested: Path, exported: tuple[Path, Finished]) -> None:
        def text(seed: int) -> str:
            finished = self.generate(nested, exported[0], "--temperature", 1.5, "--seed", seed)
            return finished.out.rsplit("\n", 2)[0]

        assert text(1) == text(1)
        assert text(1) != text(2)

    def test_bits_as_numbers_where_there_is_no_terminal(self, nested: Path, exported: tuple[Path, Finished]) -> None:
        finished = self.generate(nested, exported[0], "--show-bits")
        (line,) = [line for line in finished.out.splitlines() if line.startswith("bits: ")]
        bits = [float(number) for number in line.removeprefix("bits: ").split()]
        assert len(bits) == 6
        assert bits[0] == 8, "the first token comes from the prompt's pass"
        assert "\x1b" not in finished.out

    def test_bits_as_colours_on_a_terminal(
        self, nested: Path, exported: tuple[Path, Finished], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        reader, writer = pty.openpty()
        with os.fdopen(writer, "w") as terminal:
            finished = self.generate(nested, exported[0], "--show-bits", stdout=terminal)
        assert finished.code == 0, finished.err
        with os.fdopen(reader, "rb", buffering=0) as screen:
            shown = b"".join(until_closed(screen)).decode().replace("\r\n", "\n")
        text, end = shown.split(legend(WIDTHS))
        assert "\x1b[48;5;" in text
        assert "bits: 8.0" not in shown
        assert json.loads(end)["num_tokens"] == 6


def until_closed(terminal: io.RawIOBase) -> Iterator[bytes]:
    """What was written to a terminal whose other end is closed, which Linux reports as an error."""
    with suppress(OSError):
        while chunk := terminal.read(4096):
            yield chunk


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_interrupted_command_leaves_nothing(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    word: str,
) -> None:
    def save_half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        signal.raise_signal(number)

    monkeypatch.setattr("flexquant_rl.engine.files.save_file", save_half)
    finished = run(cli.main, "quantize", tiny_model_dir, tmp_path / "out")
    assert finished == Finished(code, "", f"{word}\n")
    assert tree(tmp_path) == {}


def test_train_is_the_same_as_train_py(tmp_path: Path) -> None:
    assert "--env.prompt-tokens" in run(cli.main, "train", "--help").out
    assert run(cli.main, "train", "--resume", tmp_path).error == run(train.main, "--resume", tmp_path).error


def without_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps a benchmark from running tests inside of tests."""
    monkeypatch.setattr("flexquant_rl.agents.commands.bench.run_tests", lambda files, progress: "not run")


def test_bench_env(nested: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_tests(monkeypatch)
    options = ("--text", text, "--num-envs", 2, "--rounds", 1, "--json", tmp_path / "row.json")
    result = run(cli.main, "bench", "env", "--model", nested, *options).result
    assert result["bench"] == "env"
    (row,) = result["rows"]
    assert row["env"] == "FlexQuant/Decode-v1"
    assert row["env_steps_per_s"] > 0
    assert row["reference"] == "8-bit"
    assert row["tests"] == "not run"
    assert json.loads((tmp_path / "row.json").read_text()) == result


def test_bench_env_over_a_recording(nested: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_tests(monkeypatch)
    sizes = ("--tokens", 40, "--prompt-tokens", 4, "--max-new-tokens", 8, "--widths", 3, 4)
    assert run(cli.main, "record", nested, tmp_path / "traces", "--text", text, *sizes).code == 0
    bench = ("bench", "env", "--traces", tmp_path / "traces", "--num-envs", 3, "--rounds", 1)
    (row,) = run(cli.main, *bench).result["rows"]
    assert row["env"] == "FlexQuant/VerifiedDecode-v0"
    assert row["env_steps_per_s"] > 0
    assert (row["num_envs"], row["draft_widths"]) == (3, [3, 4])
    assert "--model is not for a recording" in run(cli.main, *bench, "--model", nested).error


def test_bench_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_tests(monkeypatch)
    finished = run(cli.main, "bench", "policy", "--units", 2, "--vocab", 9, "--rounds", 1)
    assert {row["provider"] for row in finished.result["rows"]} >= {"policy", "signals", "signals_and_policy"}
    assert finished.out.startswith("provider"), "a table for people before the JSON line"


def test_bench_refuses_what_fails_its_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def red(files: tuple[str, ...], progress: Callable[[str], None]) -> str:
        raise BenchRefusedError("the tests fail (1 failed)")

    monkeypatch.setattr("flexquant_rl.agents.commands.bench.run_tests", red)
    finished = run(cli.main, "bench", "policy", "--json", tmp_path / "rows.json")
    assert finished == Finished(1, "", "error: the tests fail (1 failed)\n")
    assert tree(tmp_path) == {}


class TestStreamedText:
    def stream(self, tokenizer: PreTrainedTokenizerFast, prompt: str, continuation: str) -> list[str]:
        ids = tokenizer.encode(prompt + continuation)
        first = len(tokenizer.encode(prompt))
        text = StreamedText(tokenizer, ids[:first])
        return [text.add(token_id) for token_id in [*ids[first:], tokenizer.eos_token_id]]

    def test_characters_of_several_tokens(self) -> None:
        vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        assert self.stream(fast, "caf", "é 😀!") == ["", "é", " ", "", "", "", "😀", "!", ""]

    def test_spaces_before_words(self) -> None:
        words = ["<unk>", "▁once", "▁upon", "▁a", "▁time", "s"]
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        assert self.stream(fast, "once", " upon a time") == [" upon", " a", " time", ""]


class TestBitsDisplay:
    def test_more_bits_are_darker(self) -> None:
        backgrounds = [coloured("x", width, WIDTHS).split(";")[2] for width in WIDTHS]
        assert len(set(backgrounds)) == len(WIDTHS)
        assert coloured("x", 3, WIDTHS).startswith("\x1b[48;5;227;38;5;16m"), "black on yellow"
        assert coloured("x", 8, WIDTHS).startswith("\x1b[48;5;54;38;5;231m"), "white on purple"

    def test_line_breaks_carry_no_colour(self) -> None:
        first, empty, last = coloured("a\n\nb", 5, WIDTHS).split("\n")
        assert empty == ""
        assert first.endswith("a\x1b[0m")
        assert last.endswith("b\x1b[0m")

    def test_means_outside_the_scale_take_its_ends(self) -> None:
        assert coloured("x", 9, WIDTHS) == coloured("x", 8, WIDTHS)
        assert coloured("x", 0, WIDTHS) == coloured("x", 3, WIDTHS)
        assert "x" in coloured("x", 8, (8,))

    def test_numbers(self) -> None:
        assert numbers([8.0, 4.25]) == "bits: 8.0 4.2"

    @pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
    def test_colours_can_be_refused(self, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        assert has_colours(Terminal())
        assert not has_colours(io.StringIO())
        monkeypatch.setenv(name, value)
        assert not has_colours(Terminal())
