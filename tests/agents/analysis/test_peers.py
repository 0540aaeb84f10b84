"""Other libraries' formats beside ours: rows, what they are compared with, and the picture; on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Finished, run, write_text
from random_models import random_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexquant_rl import cli
from flexquant_rl.agents.analysis import peers as module
from flexquant_rl.agents.analysis.figures import plot_strategies
from flexquant_rl.agents.analysis.peer_report import best_at, peer_findings, peer_method, peer_sections
from flexquant_rl.agents.analysis.peers import model_facts, with_hqq
from flexquant_rl.agents.analysis.rows import RowStore, StrategyRow, TimeRow, TokensRow, times_by_row
from flexquant_rl.agents.analysis.strategies import is_peer, recipe_text
from flexquant_rl.engine.benches.llama_cpp import has_llama_cpp
from flexquant_rl.kernels.native import supported_isas

needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python and gguf are not installed")
needs_hqq = pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="hqq is not installed")
needs_library = pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")
LLAMA_CPP_NAMES = ["llama.cpp:Q4_0", "llama.cpp:IQ4_NL", "llama.cpp:Q4_K_M", "llama.cpp:Q5_0", "llama.cpp:Q8_0"]
SIZES = ("--windows", 3, "--window-tokens", 24, "--bit-widths", 3, 4, 8)


def model_of(**changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**(sizes | heads | {"initializer_range": 0.1, "tie_word_embeddings": True} | changes))
    model = random_model(LlamaForCausalLM, config, seed=2)
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def analyse(model: Path, text: Path, out: Path, *options: object) -> Finished:
    strategies = () if "--strategies" in options else ("--strategies", "rtn:64")
    return run(cli.main, "analyse", model, "--text", text, "--out", out, *SIZES, *strategies, *options)


@needs_library
@needs_llama_cpp
@needs_hqq
def test_peers_stand_beside_ours(text: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model_of().save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    alone = analyse(model, text, out).result
    assert "Beside other libraries" not in (out / "report.md").read_text()
    printed = analyse(model, text, out, "--peers")
    rows = {(row["strategy"], row["bit_width"]): row for row in printed.result["rows"]}
    assert [name for name, _ in rows if name.startswith("llama.cpp")] == LLAMA_CPP_NAMES
    assert {key for key in rows if key[0].startswith("hqq")} == {
        (f"hqq:g{size}", b) for size in (64, 128) for b in (3, 4)
    }
    kl = {key: row["output_kl_nats"] for key, row in rows.items()}
    assert [kl["rtn:64", width] for width in (3, 4, 8)] == [row["output_kl_nats"] for row in alone["rows"]]
    assert 0 < kl["llama.cpp:Q8_0", 8] < kl["llama.cpp:Q5_0", 5] < kl["llama.cpp:Q4_0", 4]
    assert kl["hqq:g64", 3] > kl["hqq:g64", 4] > 0
    # The tied head and its embedding have 8 bits in a Q4_0 file, and everything else 4.5.
    head, body = 64 * 128, 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    bits = 8 * rows["llama.cpp:Q4_0", 4]["bytes_per_weight"]
    assert bits == pytest.approx((8.5 * head + 4.5 * body) / (head + body))
    assert 8 * rows["llama.cpp:Q8_0", 8]["bytes_per_weight"] == pytest.approx(8.5)
    assert 8 * rows["hqq:g64", 4]["bytes_per_weight"] == pytest.approx(4.5)
    assert 8 * rows["hqq:g128", 4]["bytes_per_weight"] == pytest.approx(4.25)
    assert all(row["measured_ms"] > 0 for row in rows.values())
    store = RowStore(out)
    tokens = [row for row in store.read(TokensRow) if row.strategy == "llama.cpp:Q4_0"]
    assert sum(map(sum, (row.output_kl_nats for row in tokens))) / (3 * 23) == pytest.approx(
        kl["llama.cpp:Q4_0", 4], rel=1e-4
    )
    report = (out / "report.md").read_text()
    assert "\n## Beside other libraries\n" in report
    assert "at equal measured time" in report or "at equal bytes per weight" in report
    assert "nan" not in report
    times = store.read(TimeRow)
    names = {*LLAMA_CPP_NAMES, "hqq:g64", "hqq:g128"}
    assert {row.strategy for row in times if row.strategy} == names
    assert {row.beside for row in times} == {None, *names}
    for name in names:  # one at a time, and ours at every width in its turns
        together = [row for row in times if row.beside == name]
        assert {row.strategy for row in together} == {None, name}
        assert [row.bit_width for row in together if row.strategy is None] == [3, 4, 8]
    # Nothing is measured twice, and rows are enough for the report.
    again = analyse(model, text, out, "--peers")
    assert "timing" not in again.err
    assert store.read(TimeRow) == times
    # Groups of 128 are timed among HQQ's, which are not ours.
    copied = shutil.copytree(out, tmp_path / "more")
    more = analyse(model, text, copied, "--strategies", "rtn", "--peers").result
    assert all(row["measured_ms"] > 0 for row in more["rows"])
    assert {(row.group_size, row.beside) for row in RowStore(copied).read(TimeRow) if row.strategy is None} == {
        (size, beside) for size in (64, 128) for beside in (None, *names)
    }
    # What an interrupted run had timed stays, and only what is missing is timed.
    kept = [row for row in times if row.beside != "hqq:g64"]
    store.replace(kept, TimeRow)
    resumed = analyse(model, text, out, "--peers").err
    assert [line for line in resumed.splitlines() if line.startswith("timing")] == [
        "timing steps in groups of 64 beside hqq:g64"
    ]
    assert store.read(TimeRow)[: len(kept)] == kept
    store.replace(times, TimeRow)
    analyse(model, text, out, "--peers")
    (out / "report.md").unlink()
    run(cli.main, "analyse", "--from-rows", shutil.copytree(out, tmp_path / "copy"))
    assert (tmp_path / "copy" / "report.md").read_text() == report
    # An analysis of before version 4 knows one run of turns.
    old = shutil.copytree(out, tmp_path / "old")
    plan = json.loads((old / "analysis.json").read_text())
    (old / "analysis.json").write_text(json.dumps(plan | {"version": 3}))
    lines = [json.loads(line) for line in (old / "times.jsonl").read_text().splitlines()]
    alone = [one for one in lines if one["strategy"] or not one["beside"]]
    without = [{key: value for key, value in one.items() if key != "beside"} for one in alone]
    (old / "times.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in without))
    refused = analyse(model, text, old, "--peers").error
    assert "version 3, this is 4; analyse again into another directory" in refused
    assert run(cli.main, "analyse", "--from-rows", old).code == 0
    assert "at equal measured time" in (old / "report.md").read_text()


@needs_hqq
def test_hqq_leaves_the_model_as_it_was() -> None:
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = ["lm_head", "model.layers.1.mlp.down_proj"]
    quantised, num_bytes = with_hqq(model, names, 4, 64)
    assert num_bytes == (64 * 128 + 128 * 64) * 4.5 / 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert quantised.get_input_embeddings().weight is model.get_input_embeddings().weight
    windows = torch.arange(3, 51).view(2, 24)
    facts = model_facts(model, quantised, windows, first=1, label="hqq")
    assert facts.output_kl_nats.shape == (2, 22)
    assert float(facts.output_kl_nats.mean()) > 0
    same = model_facts(model, model, windows, first=1, label="same")
    assert float(same.output_kl_nats.max()) == 0
    assert bool(same.top1_agreement.all())


def test_facts_are_those_of_the_definition() -> None:
    one, other = model_of(), model_of(rms_norm_eps=0.1)
    windows = torch.arange(5, 53).view(2, 24)
    facts = model_facts(one, other, windows, first=2, label="other")
    with torch.inference_mode():
        base, own = (model(windows[:, :-1]).logits[:, 2:].log_softmax(-1) for model in (one, other))
    torch.testing.assert_close(facts.output_kl_nats, (base.exp() * (base - own)).sum(-1), rtol=1e-3, atol=1e-6)
    following = windows[:, 3:, None]
    torch.testing.assert_close(facts.token_nll_nats, -own.gather(-1, following)[..., 0])
    assert torch.equal(facts.top1_ids, own.argmax(-1))
    assert torch.equal(facts.top1_agreement, own.argmax(-1) == base.argmax(-1))


def test_what_peers_are_refused_with(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model_of().save_pretrained(model)
    monkeypatch.setattr(module, "has_llama_cpp", lambda: False)
    monkeypatch.setattr(module, "has_hqq", lambda: False)
    error = analyse(model, text, tmp_path / "out", "--peers").error
    assert 'pip install "flexquant-rl[bench]"' in error
    assert not (tmp_path / "out").exists()


def test_a_nested_checkpoint_alone_has_no_peers(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_hqq", lambda: True)
    assert run(cli.main, "quantize", tiny_model_dir, tmp_path / "nested").code == 0
    options = ("--windows", 3, "--window-tokens", 24, "--peers", "--out", tmp_path / "out")
    error = run(cli.main, "analyse", tmp_path / "nested", "--text", text, *options).error
    assert "--peers quantises unquantised weights; name the model that it was made from with --reference" in error
    assert not (tmp_path / "out").exists()


@needs_library
@needs_llama_cpp
def test_a_nested_checkpoint_has_those_of_the_model_that_it_was_made_from(
    text: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_hqq", lambda: False)
    model, nested, out = tmp_path / "model", tmp_path / "nested", tmp_path / "out"
    model_of().save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    assert run(cli.main, "quantize", model, nested, "--group-size", 64, "--bit-widths", 3, 4, 8).code == 0
    options = ("--windows", 3, "--window-tokens", 24, "--reference", model, "--peers")
    finished = run(cli.main, "analyse", nested, "--text", text, "--out", out, *options)
    found = {(row["strategy"], row["bit_width"]): row for row in finished.result["rows"]}
    assert [name for name, _ in found] == ["stored"] * 3 + LLAMA_CPP_NAMES
    # They are what they are beside a strategy of the model itself.
    wanted = analyse(model, text, tmp_path / "other", "--peers").result["rows"]
    for one in wanted:
        key = (one["strategy"].replace("rtn:64", "stored"), one["bit_width"])
        assert found[key]["output_kl_nats"] == pytest.approx(one["output_kl_nats"], rel=1e-3)
        assert found[key]["bytes_per_weight"] == pytest.approx(one["bytes_per_weight"])
        assert found[key]["measured_ms"] > 0
    assert "\n## Beside other libraries\n" in (out / "report.md").read_text()


def row(strategy: str, bit_width: int, kl: float, size: float, group_size: int = 128) -> StrategyRow:
    return StrategyRow(strategy, group_size, bit_width, kl, kl, kl, kl, 9.0, 8.0, 0.9, size, 1.0, 99)


ROWS = [
    *(row("rtn", 3, 1.0, 0.4), row("rtn", 4, 0.01, 0.6), row("rtn", 8, 0.0, 1.0)),
    *(row("gptq:64", 3, 0.5, 0.45, 64), row("gptq:64", 4, 0.005, 0.65, 64)),
    *(row("llama.cpp:Q4_0", 4, 0.2, 0.5, 32), row("hqq:g64", 4, 0.004, 0.62, 64), row("llama.cpp:Q8_0", 8, 1e-4, 1.1)),
]


def timed(strategy: str | None, group_size: int, bit_width: int, ms: float, beside: str | None = None) -> TimeRow:
    return TimeRow(group_size, bit_width, ms, ms, ms, 2, "cpu", strategy, beside)


Q4_0 = "llama.cpp:Q4_0"
# The machine was twice as slow while Q4_0 took turns with ours.
TIMES = [
    *(timed(None, 128, 3, 1.0), timed(None, 128, 4, 2.0)),
    *(timed(None, 128, 3, 2.0, Q4_0), timed(None, 128, 4, 4.0, Q4_0), timed(Q4_0, 32, 4, 3.0, Q4_0)),
]
AT_ONCE = [*TIMES[:2], timed(Q4_0, 32, 4, 1.5)]


def test_times_go_to_the_rows_that_they_are_of() -> None:
    found = {key: one.measured_ms for key, one in times_by_row(ROWS, [*TIMES, timed(None, 64, 4, 3.0)]).items()}
    expected = {("rtn", 3): 1.0, ("rtn", 4): 2.0, ("gptq:64", 4): 3.0, ("llama.cpp:Q4_0", 4): 3.0}
    assert found == expected, "hqq has groups of 64 and 4 bits too, and no time of ours"


def test_the_best_of_ours_at_equal_bytes() -> None:
    found = best_at(ROWS, lambda one: one.bytes_per_weight, 0.5)
    assert found == (pytest.approx(0.1), "rtn"), "halfway between 1 and 0.01 on a logarithmic scale"
    found = best_at(ROWS, lambda one: one.bytes_per_weight, 0.62)
    assert found is not None
    assert found[1] == "gptq:64"
    found = best_at(ROWS, lambda one: one.bytes_per_weight, 1.1)
    assert found == (pytest.approx(0.005), "gptq:64"), "all of ours read less"
    assert best_at(ROWS, lambda one: one.bytes_per_weight, 0.3) is None, "all of ours read more"


def test_words_and_table() -> None:
    assert peer_findings(ROWS, TIMES) == peer_findings(ROWS, AT_ONCE), "analyses of before had all at once"
    by_bytes, by_time = peer_findings(ROWS, TIMES)
    assert "equal bytes per weight: `llama.cpp:Q4_0` at 4 bits 0.5, `hqq:g64` at 4 bits" in by_bytes
    assert "Ours loses no more in 1 of 3." in by_bytes
    assert "equal measured time: `llama.cpp:Q4_0` at 4 bits 0.5. Ours loses no more in 1 of 1." in by_time
    table = "\n".join(peer_sections([*ROWS, replace(row("hqq:g64", 3, 0.1, 0.5, 64), quantising_seconds=7.0)], TIMES))
    assert "quantising took 1 s at 4 bits and 7 s at 3 bits." in table
    assert "| `llama.cpp:Q8_0` |" in table
    assert "not measured" in table
    assert "while no other library's model is held" in "".join(peer_method(ROWS, TIMES))
    assert "all formats in turns" in "".join(peer_method(ROWS, AT_ONCE))
    ours = [one for one in ROWS if not is_peer(one.strategy)]
    assert peer_sections(ours, TIMES) == peer_method(ours, TIMES) == peer_findings(ours, TIMES) == []
    assert "asked for Q4_0" in recipe_text("llama.cpp:Q4_0")
    assert "groups of 64" in recipe_text("hqq:g64")


@pytest.mark.filterwarnings("error")
def test_peers_are_drawn(tmp_path: Path) -> None:
    ours = [one for one in ROWS if not is_peer(one.strategy)]
    pictures = []
    for name, rows in (("ours", ours), ("all", ROWS)):
        plot_strategies(rows, TIMES, tmp_path / name, title="t", caption="c")
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] != pictures[1]
