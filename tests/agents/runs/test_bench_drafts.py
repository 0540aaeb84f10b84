"""`fq bench drafts`: everybody on the same prompts, texts compared, rows of medians. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Finished, run, write_text
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexquant_rl import cli
from flexquant_rl.agents.commands import servable
from flexquant_rl.agents.config import DraftsBench, TrainConfig
from flexquant_rl.agents.preparation import Prepared, prepare
from flexquant_rl.agents.runs import bench_drafts as module
from flexquant_rl.agents.runs.bench_drafts import (
    LLAMA_CPP,
    LLAMA_CPP_DRAFTS,
    Contender,
    Turn,
    bench_drafts,
    ends_in_loop,
    take_turns,
)
from flexquant_rl.engine.benches.clocks import WALL
from flexquant_rl.engine.benches.harness import BenchRefusedError
from flexquant_rl.engine.benches.llama_cpp import has_llama_cpp
from flexquant_rl.engine.control.draft_counts import DraftCounts
from flexquant_rl.engine.control.draft_limits import NGRAM_DRAFTS
from flexquant_rl.engine.control.traces import PlannedSequence
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.kernels.native import supported_isas

needs_library = pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")
needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python and gguf are not installed")
NAMES = ("draft:3,length=2", "draft:4,length=5,confidence=0.3", "fixed:3")
SIZES = ("--prompts", 3, "--prompt-tokens", 6, "--new-tokens", 14, "--rounds", 2, "--threads", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(autouse=True)
def _without_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps a benchmark from running tests inside of tests."""
    monkeypatch.setattr("flexquant_rl.agents.commands.bench.run_tests", lambda files, progress: "not run")


def bench(model: Path, text: Path, *options: object) -> Finished:
    return run(cli.main, "bench", "drafts", "--model", model, "--text", text, "--policy", *NAMES, *SIZES, *options)


@needs_library
def test_rows_of_ours(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    finished = bench(tiny_model_dir, text, "--no-peers", "--json", tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == finished.result
    rows = finished.result["rows"]
    assert [row["policy"] for row in rows] == ["fixed:8", *NAMES]
    assert all(row["num_samples"] == 2 and len(row["tokens_per_s_by_prompt"]) == 3 for row in rows)
    assert all(row["prompt_sources"] == ["text.txt"] * 3 and row["clock"] == "thread_cpu" for row in rows)
    plain, *drafts, low = rows
    assert "same_tokens" not in plain
    all_tokens = plain["timed_tokens"] + 3
    assert (all_tokens < 3 * 14) == (plain["ended_prompts"] > 0)
    for row in drafts:
        assert row["same_tokens"] == row["all_tokens"] == all_tokens
        assert row["same_prompts"] == 3
        assert row["tokens_per_pass"] >= 1
        assert row["times_faster_than"].keys() == {"fixed:8"}
        assert row["ngram_drafts"] == NGRAM_DRAFTS
    assert low["all_tokens"] == low["timed_tokens"] + 3, (
        "a lossy policy may give another text, and says how far it goes along"
    )
    assert finished.out.startswith("provider")


@needs_library
def test_only_what_weighs_units_is_bound_to_the_profile(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Binding measures the static front, which takes minutes of a real model."""
    profile = tmp_path / "profile.json"
    run(cli.main, "profile", tiny_model_dir, "--source", "roofline", "--text", text, "--out", profile)
    prepared: list[object] = []

    def counted(config: TrainConfig, *others: Any) -> Prepared:
        prepared.append(config)
        return prepare(config, *others)

    monkeypatch.setattr(servable, "prepare", counted)
    policies = ("draft:3,length=2", "draft:3.5,length=2", "fixed:3")
    model = ("--model", tiny_model_dir, "--text", text, "--no-peers", "--profile", profile)
    rows = run(cli.main, "bench", "drafts", *model, *SIZES, "--policy", *policies).result["rows"]
    assert [row["policy"] for row in rows] == ["fixed:8", *policies]
    assert len(prepared) == 1


@needs_library
def test_all_threads_have_one_text(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain decoding with the first number of threads is what every other row is compared with."""
    options = ("--no-peers", "--threads", 1, 2, "--rounds", 1)
    rows = bench(tiny_model_dir, text, *options).result["rows"]
    assert [row["num_threads"] for row in rows] == [1] * 4 + [2] * 4
    assert "same_tokens" not in rows[0]
    for row in (*rows[1:3], *rows[4:7]):
        assert row["same_tokens"] == row["all_tokens"] == rows[0]["timed_tokens"] + 3
    alone = bench(tiny_model_dir, text, *options, "--policy").result["rows"]
    assert [(row["policy"], row["num_threads"]) for row in alone] == [("fixed:8", 1), ("fixed:8", 2)]
    lean = module._lean_contenders

    def with_a_wrong_one(*options: Any) -> list[Contender]:
        found = lean(*options)
        if options[-1] is not None:
            own = found[0].continue_prompt
            found[0].continue_prompt = lambda prompt_ids: replace(own(prompt_ids), token_ids=[*range(14)])
        return found

    monkeypatch.setattr(module, "_lean_contenders", with_a_wrong_one)
    refused = bench(tiny_model_dir, text, *options, "--policy")
    assert refused.code == 1
    assert "fixed:8 on prompt 0: token 0 of the continuation" in refused.err


@needs_library
def test_ngram_drafts(tiny_model_dir: Path, text: Path) -> None:
    """What finds drafts in the text has other rounds and the same text, and they are counted apart."""
    names = ("draft:3,length=2,ngrams=0", "draft:3,length=2,ngrams=4", "lookups:ngrams=4", "fixed:3")
    model = ("--model", tiny_model_dir, "--text", text, "--no-peers")
    plain, without, found, alone, low = run(cli.main, "bench", "drafts", *model, *SIZES, "--policy", *names).result[
        "rows"
    ]
    assert not {"ngram_drafts", "acceptance_of_found"} & (plain.keys() | low.keys())
    assert (without["ngram_drafts"], found["ngram_drafts"]) == (0, 4)
    assert without["acceptance_of_found"] is None
    assert 0 < found["acceptance_of_found"] <= 1
    assert alone["ngram_drafts"] == 4
    assert alone["acceptance_of_found"] > 0
    assert alone["acceptance"] is None, "no width drafts"
    for row in (without, found, alone):
        assert row["same_tokens"] == row["all_tokens"] == plain["timed_tokens"] + 3


@needs_library
def test_why_llama_cpp_is_not_measured(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    if has_llama_cpp():
        assert "rows of 172, which Q4_0 cannot hold" in bench(tiny_model_dir, text).err
    assert run(cli.main, "quantize", tiny_model_dir, tmp_path / "nested").code == 0
    reason = "--reference" if has_llama_cpp() else "flexquant-rl[bench]"
    assert reason in bench(tmp_path / "nested", text).err


@needs_library
@needs_llama_cpp
def test_beside_llama_cpp(text: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1))
    llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    nested = tmp_path / "nested"
    assert run(cli.main, "quantize", tmp_path / "model", nested).code == 0
    options = ("--reference", tmp_path / "model", "--draft-lengths", 1, 4, "--p-min", 0, 0.5)
    rows = bench(nested, text, *options).result["rows"]
    assert [row["provider"] for row in rows] == ["lean"] * 4 + [LLAMA_CPP] + [LLAMA_CPP_DRAFTS] * 4
    drafted = rows[5:]
    assert [(row["draft_length"], row["p_min"]) for row in drafted] == [(1, 0.0), (1, 0.5), (4, 0.0), (4, 0.5)]
    assert [row.get("best") for row in drafted].count(True) == 1
    assert all(0 < row["same_tokens"] <= row["all_tokens"] == row["timed_tokens"] + 3 for row in drafted)
    assert all(row["tokens_per_pass"] >= 1 for row in drafted)
    assert rows[1]["times_faster_than"].keys() == {"fixed:8", LLAMA_CPP, LLAMA_CPP_DRAFTS}
    alone = bench(nested, text, "--reference", tmp_path / "model", "--draft-lengths", "--threads", 1, 2)
    assert "as GGUF, at Q8_0\n" in alone.err
    assert [row["provider"] for row in alone.result["rows"]] == ["lean"] * 8 + [LLAMA_CPP] * 2
    other = LlamaForCausalLM(LlamaConfig(**(sizes | {"num_hidden_layers": 1}), **heads))
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    assert "has 1 layers and 128 tokens" in bench(nested, text, "--reference", tmp_path / "other").error


@needs_library
def test_samples_are_not_compared(tiny_model_dir: Path, text: Path) -> None:
    finished = bench(tiny_model_dir, text, "--temperature", 0.8)
    assert "llama.cpp is not timed: our loops over it are greedy, and the temperature is 0.8" in finished.err
    for row in finished.result["rows"]:
        assert row["temperature"] == 0.8
        assert not {"same_tokens", "same_prompts"} & row.keys()
    assert finished.result["rows"][1]["tokens_per_pass"] >= 1


PROMPTS = [PlannedSequence((1, 2), "test", 0, "a"), PlannedSequence((3,), "test", 1, "a")]


def scripted(name: str, texts: Sequence[list[int]], seconds: Sequence[float]) -> Contender:
    """Gives one text after the other, and takes the time that is next."""
    script: Iterator[tuple[list[int], float]] = iter(zip(texts, seconds, strict=True))

    def turn(prompt_ids: Sequence[int]) -> Turn:
        tokens, took = next(script)
        counts = DraftCounts()
        counts.add_round(3, 1)
        return Turn(tokens, took, counts if name != "plain" else None)

    return Contender(name, {"policy": name, "num_threads": 1}, turn)


def test_medians_of_totals_and_of_prompts(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The first turn does not count. Of the others: times of both prompts together, and of each on its own."""
    config = DraftsBench(prompts=2, new_tokens=3, rounds=3)
    same, other = [5, 6, 7], [5, 9, 7]
    plain = scripted("plain", [same] * 7, [9, 1, 2, 1, 2, 1, 2])
    drafted = scripted("drafted", [same, same, other, same, other, same, other], [9, 0.5, 1, 0.25, 2, 4, 4])
    drafted.plain = plain
    take_turns([plain, drafted], PROMPTS, config.rounds)
    model = nest(tiny_llama, tiny_tokenizer, QuantizationConfig(), keep_reference=False)
    first, second = module._rows(config, [plain, drafted], PROMPTS, model, WALL)
    assert first["p50_us"] == pytest.approx(3 / 4 * 1e6)
    assert first["tokens_per_s"] == pytest.approx(4 / 3, abs=0.05)
    assert first["tokens_per_s_by_prompt"] == [2, 1]
    assert second["p50_us"] == pytest.approx(2.25 / 4 * 1e6)
    assert second["tokens_per_s_by_prompt"] == [4, 1]
    assert (second["same_tokens"], second["all_tokens"], second["same_prompts"]) == (4, 6, 1)
    assert (second["tokens_per_pass"], second["acceptance"]) == (2, pytest.approx(1 / 3, abs=1e-3))
    assert second["times_faster_than"] == {"plain": round(3 / 2.25, 3)}


def test_texts_that_loop_or_end_are_told(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Time is that of tokens that were made; what loops is left out of a second speed."""
    model = nest(tiny_llama, tiny_tokenizer, QuantizationConfig(), keep_reference=False)
    eos = model.eos_token_ids[0]
    looping, ended = [*range(10, 20), *[40, 41, 42] * 30], [5, 6, eos]
    plain = scripted("plain", [looping, looping, ended], [9.0, 99.0, 1.0])
    take_turns([plain], PROMPTS, 1)
    [row] = module._rows(DraftsBench(prompts=2, new_tokens=100), [plain], PROMPTS, model, WALL)
    assert (row["timed_tokens"], row["ended_prompts"], row["looping_prompts"]) == (101, 1, 1)
    assert row["p50_us"] == pytest.approx(100 / 101 * 1e6)
    assert row["tokens_per_s_without_loops"] == 2
    assert row["tokens_per_s_by_prompt"] == [1, 2]
    at_once = scripted("plain", [[eos]] * 3, [0.1] * 3)
    take_turns([at_once], PROMPTS, 1)
    with pytest.raises(InputError, match="every text ends with its first token"):
        module._rows(DraftsBench(prompts=2), [at_once], PROMPTS, model, WALL)


@pytest.mark.parametrize("period", [1, 7, 32])
def test_what_a_loop_is(period: int) -> None:
    loop = [*range(100, 100 + period)]
    long = [1, 2, 3, *loop * 70]
    assert ends_in_loop(long[: 32 + period + 3])
    assert not ends_in_loop(long[: 32 + period - 1]), "not yet said again"
    assert not ends_in_loop([*long, 4])
    assert not ends_in_loop([*range(100)])
    assert not ends_in_loop([*range(33)] * 9), "longer than what is looked at"
    assert not ends_in_loop([])


def test_another_text_is_refused() -> None:
    plain = scripted("plain", [[5, 6, 7]] * 4, [1.0] * 4)
    drafted = scripted("drafted", [[5, 6, 7], [5, 6, 7], [5, 6, 8]], [1.0] * 3)
    drafted.plain, drafted.must_equal = plain, True
    with pytest.raises(BenchRefusedError, match="drafted on prompt 1: token 2 of the continuation"):
        take_turns([plain, drafted], PROMPTS, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 0}, "--prompts 1 or more"),
        ({"new_tokens": 1}, "--new-tokens 2"),
        ({"threads": ()}, "--threads 1 2"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"policy": ("draft:3", "draft:3")}, "names one policy twice"),
        ({"draft_lengths": (0, 3)}, "--draft-lengths 3 5 8"),
        ({"p_min": (1.0,)}, "--p-min 0 0.75"),
    ],
    ids=str,
)
def test_options_out_of_their_domain(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(DraftsBench(), **changes).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "fixed:4", "nowhere"), "nowhere is not the directory of an exported policy"),
        (("--policy", "draft:9"), "width=9 is no width"),
        (("--policy", "."), "no readable policy"),
        (("--policy", "lookups", "--text", "nothing.txt"), "nothing.txt is not a file"),
    ],
)
def test_the_tests_do_not_run_for_what_there_is_none_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    def too_late(files: object, progress: object) -> str:
        raise AssertionError("the tests take minutes")

    monkeypatch.setattr("flexquant_rl.agents.commands.bench.run_tests", too_late)
    monkeypatch.chdir(tmp_path)
    assert message in run(cli.main, "bench", "drafts", *options).error


def test_more_files_than_prompts(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    other = write_text(tmp_path / "other.txt")
    config = DraftsBench(model=str(tiny_model_dir), text=(text, other), prompts=1, prompt_tokens=6, new_tokens=4)
    with pytest.raises(InputError, match="1 prompts leave some of 2 files unread"):
        bench_drafts(config)
