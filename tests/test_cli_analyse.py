"""`fq analyse` on a tiny model: what it writes, that nothing is measured twice, interruptions, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Finished, leftovers, run, tree, write_text
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexquant_rl import cli
from flexquant_rl.agents.analysis import report
from flexquant_rl.agents.analysis import run as stages
from flexquant_rl.agents.analysis.rows import PartRow, PastRow, RowStore, StrategyRow, TimeRow, TokensRow, WindowRow
from flexquant_rl.agents.commands import analyse as analyse_module
from flexquant_rl.engine.quantisation import tuning
from flexquant_rl.fq_env.calibration_text import CalibrationText

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a missing glyph is only a warning

SIZES = ("--windows", 4, "--window-tokens", 24, "--bit-widths", 3, 4, 8)
FILES = {
    *("analysis.json", "past.jsonl", "report.md", "sensitivity.jsonl", "sensitivity.png", "strategies.jsonl"),
    *("strategies.png", "text.jsonl", "times.jsonl", "tokens.jsonl", "tokens.png"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def analyse(model: object, text: Path, out: Path, *options: object) -> Finished:
    return run(cli.main, "analyse", model, "--text", text, "--out", out, *SIZES, *options)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than anything else of a tiny model."""
    monkeypatch.setattr(report, "_draw", lambda *arguments: None)


@pytest.fixture(scope="module")
def analysed(tiny_model_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """An analysis of three strategies, one of them tuned."""
    out = tmp_path_factory.mktemp("analysed") / "out"
    options = ("--strategies", "rtn:32", "rtn-text:64", "rtn-tuned:64", "--tune-steps", 2)
    return out, analyse(tiny_model_dir, text, out, *options)


def test_rows_of_an_analysis(analysed: tuple[Path, Finished]) -> None:
    out, finished = analysed
    printed = finished.result
    assert {path.name for path in out.iterdir()} == FILES
    assert [(row["strategy"], row["bit_width"]) for row in printed["rows"]] == [
        (name, width) for name in ("rtn:32", "rtn-text:64", "rtn-tuned:64") for width in (3, 4, 8)
    ]
    store = RowStore(out)
    rows = {(row.strategy, row.bit_width): row for row in store.read(StrategyRow)}
    for name in ("rtn:32", "rtn-text:64", "rtn-tuned:64"):
        kl = [rows[name, width].output_kl_nats for width in (3, 4, 8)]
        assert kl == sorted(kl, reverse=True)
        assert all(
            rows[name, b].output_kl_low <= rows[name, b].output_kl_nats <= rows[name, b].output_kl_high for b in (3, 8)
        )
    # Planes, and two float16 for each group; inputs are padded to 128, which a tiny model feels.
    assert rows["rtn:32", 3].bytes_per_weight > rows["rtn-text:64", 3].bytes_per_weight > 3 / 8
    assert {(row.group_size, row.bit_width) for row in store.read(TimeRow)} == {
        (size, width) for size in (32, 64) for width in (3, 4, 8)
    }
    assert all(row["measured_ms"] > 0 for row in printed["rows"])
    tokens, windows = store.read(TokensRow), store.read(WindowRow)
    assert (len(windows), len(windows[0].tokens)) == (4, 23)
    for row in rows.values():
        own = [
            kl
            for one in tokens
            if (one.strategy, one.bit_width) == (row.strategy, row.bit_width)
            for kl in one.output_kl_nats
        ]
        assert len(own) == row.num_tokens == 4 * 23
        assert math.fsum(own) / len(own) == pytest.approx(row.output_kl_nats, rel=1e-4)
    parts = store.read(PartRow)
    assert {row.strategy for row in parts} == {row.strategy for row in store.read(PastRow)} == {"rtn-tuned:64"}
    named = {kind: {row.part for row in parts if row.kind == kind} for kind in ("unit", "matrices", "matrix")}
    assert named["unit"] == {"layer.0", "layer.1", "head"}
    assert named["matrices"] == {"q", "k", "v", "o", "gate", "up", "down", "head"}
    assert len(named["matrix"]) == 15
    assert {row.bit_width for row in parts if row.kind == "matrix"} == {4}


def test_report_of_an_analysis(analysed: tuple[Path, Finished]) -> None:
    report = (analysed[0] / "report.md").read_text(encoding="utf-8")
    for heading in ("In short", "Strategies", "Sensitive parts of `rtn-tuned:64`", "Tokens of `rtn-tuned:64`"):
        assert f"\n## {heading}\n" in report
    for picture in ("strategies.png", "sensitivity.png", "tokens.png"):
        assert f"]({picture})" in report
        assert (analysed[0] / picture).read_bytes().startswith(b"\x89PNG")
    assert "nan" not in report
    tables = [line for line in report.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_again_from_rows(analysed: tuple[Path, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = shutil.copytree(analysed[0], tmp_path / "copy")
    expected = (out / "report.md").read_text()
    for name in ("report.md", "strategies.png", "tokens.png"):
        (out / name).unlink()
    monkeypatch.setattr(stages, "load_causal_lm", None)
    for option in (("--strategies", "rtn"), ("--peers",), ("--tune-steps", 3), ("--reference", out)):
        error = run(cli.main, "analyse", "--from-rows", out, *option).error
        assert error == f"--from-rows {out} measures nothing; leave {option[0]} out"
    finished = run(cli.main, "analyse", "--from-rows", out)
    assert finished.result["rows"] == analysed[1].result["rows"]
    assert (out / "report.md").read_text() == expected
    assert {path.name for path in out.iterdir()} == FILES


@pytest.mark.usefixtures("undrawn")
def test_more_strategies_are_added(
    analysed: tuple[Path, Finished], tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(analysed[0], tmp_path / "copy")
    measured: list[str] = []
    original = stages.strategy_rows

    def noted(model: Any, strategy: str, *rest: Any) -> Any:
        measured.append(strategy)
        return original(model, strategy, *rest)

    monkeypatch.setattr(stages, "strategy_rows", noted)
    options = ("--strategies", "rtn:32", "rtn-tuned:64", "--tune-steps", 2, "--examine", "rtn-tuned:64")
    assert "is there already" in analyse(tiny_model_dir, text, out, *options).err
    assert measured == []
    result = analyse(tiny_model_dir, text, out, "--strategies", "rtn:64", "--tune-steps", 2).result
    assert measured == ["rtn:64"]
    assert len(result["rows"]) == 4 * 3
    assert "Tokens of `rtn-tuned:64`" not in (out / "report.md").read_text()
    analyse(tiny_model_dir, text, out, *options)  # what is asked for is shown, not what was measured last
    assert "Tokens of `rtn-tuned:64`" in (out / "report.md").read_text()
    error = analyse(tiny_model_dir, text, out, "--strategies", "rtn:64", "--windows", 3).error
    assert "holds an analysis with windows_sha256" in error


def test_calibration_is_known_by_its_content(
    analysed: tuple[Path, Finished], tiny_model_dir: Path, text: Path, tmp_path: Path
) -> None:
    """Strategies that are fitted to a file of the same name and another content do not stand beside the others."""
    out = shutil.copytree(analysed[0], tmp_path / "copy")
    plan = json.loads((out / "analysis.json").read_text())
    other = tmp_path / text.name
    other.write_text("others" + text.read_text())
    changed = analyse_module._content_sha256(CalibrationText((other,)))
    assert analyse_module._content_sha256(CalibrationText((text,))) == plan["calibration_sha256"] != changed
    (out / "analysis.json").write_text(json.dumps(plan | {"calibration_sha256": changed}))
    error = analyse(tiny_model_dir, text, out, "--strategies", "rtn:64", "--tune-steps", 2).error
    assert "holds an analysis with calibration_sha256" in error
    assert "give the same options, or another --out" in error


def fail_once(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, count: int, error: BaseException) -> None:
    """Lets the call of this number fail."""
    original: Callable[..., Any] = getattr(place, name)
    calls = 0

    def failing(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise error
        return original(*args, **keywords)

    monkeypatch.setattr(place, name, failing)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("strategy", "place", "name"), [("rtn-tuned:64", tuning, "write_states"), ("rtn:32", stages, "part_rows")]
)
def test_interrupted_analysis_goes_on(
    analysed: tuple[Path, Finished],
    tiny_model_dir: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    place: Any,
    name: str,
) -> None:
    out = tmp_path / "out"
    options = ("--strategies", strategy, "--tune-steps", 2)
    with monkeypatch.context() as patched:
        fail_once(patched, place, name, 1, KeyboardInterrupt())
        finished = analyse(tiny_model_dir, text, out, *options)
    assert finished.code == 130
    assert finished.err.splitlines()[-1] == "interrupted; the same command goes on from there"
    with monkeypatch.context() as patched:  # what was done is not done again
        patched.setattr("flexquant_rl.engine.quantisation.unfinished.nest", None)
        if name == "part_rows":
            patched.setattr(stages, "strategy_rows", None)
        result = analyse(tiny_model_dir, text, out, *options).result
    assert {path.name for path in out.iterdir()} == {name for name in FILES if not name.endswith(".png")}
    whole = {(row["strategy"], row["bit_width"]): row["output_kl_nats"] for row in analysed[1].result["rows"]}
    assert all(row["output_kl_nats"] == whole[row["strategy"], row["bit_width"]] for row in result["rows"])


@pytest.mark.usefixtures("undrawn")
def test_full_disk(tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        full = OSError(errno.ENOSPC, "No space left on device", "tokens.jsonl")
        fail_once(patched, RowStore, "replace", 2, full)
        error = analyse(tiny_model_dir, text, out, "--strategies", "rtn").error
    assert error == "tokens.jsonl: No space left on device; free some space and run the command again"
    assert leftovers(tree(out)) == []
    assert len(analyse(tiny_model_dir, text, out, "--strategies", "rtn").result["rows"]) == 3


def test_nested_checkpoint_as_it_is_stored(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    nested, out = tmp_path / "nested", tmp_path / "out"
    assert run(cli.main, "quantize", tiny_model_dir, nested, "--group-size", 32, "--bit-widths", 4, 8).code == 0
    for option in (("--strategies", "rtn"), ("--examine", "rtn")):
        error = analyse(nested, text, out, *option).error
        assert error == (
            f"{nested} is a nested checkpoint, which has one strategy, as it is stored; leave {option[0]} out, or give "
            "the model that it was made from"
        )
        assert not out.exists()
    result = analyse(nested, text, out).result
    assert [(row["strategy"], row["bit_width"]) for row in result["rows"]] == [("stored", 4), ("stored", 8)]
    assert result["rows"][0]["output_kl_nats"] > result["rows"][1]["output_kl_nats"] == 0
    plan = json.loads((out / "analysis.json").read_text())
    assert (plan["nested"], plan["reference"], plan["bit_widths"]) == (True, "8-bit", [4, 8])
    assert "the checkpoint as it is stored" in (out / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_nested_checkpoint_against_the_model_that_it_was_made_from(
    analysed: tuple[Path, Finished], tiny_model_dir: Path, text: Path, tmp_path: Path
) -> None:
    nested, out = tmp_path / "nested", tmp_path / "out"
    assert run(cli.main, "quantize", tiny_model_dir, nested, "--group-size", 32, "--bit-widths", 3, 4, 8).code == 0
    rows = analyse(nested, text, out, "--reference", tiny_model_dir).result["rows"]
    expected = [row for row in analysed[1].result["rows"] if row["strategy"] == "rtn:32"]
    for row, same in zip(rows, expected, strict=True):
        assert row["output_kl_nats"] == pytest.approx(same["output_kl_nats"], rel=1e-4)
    assert json.loads((out / "analysis.json").read_text())["reference"] == "unquantised"
    assert "holds an analysis with" in analyse(nested, text, out).error  # its own 8 bits are another reference


@pytest.mark.usefixtures("undrawn")
def test_reference_of_another_model(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    nested, out = tmp_path / "nested", tmp_path / "out"
    assert run(cli.main, "quantize", tiny_model_dir, nested, "--group-size", 32, "--bit-widths", 4, 8).code == 0
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")

    def said_of(name: str, tensor: Tensor) -> str:
        save_file({**tensors, name: tensor}, other / "model.safetensors", {"format": "pt"})
        return analyse(nested, text, out, "--reference", other).error

    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    error = said_of(name, tensors[name].flip(0).contiguous())
    assert "away from the reference's, more than 20.0%, so it is another model; give the model that the" in error
    # A fine-tuned model is near, and nothing that is not nested has changed but by rounding.
    error = said_of("model.embed_tokens.weight", 1.01 * tensors["model.embed_tokens.weight"])
    assert "model.embed_tokens.weight is 0.99% away from the reference's, more than 0.2%, so it is another" in error
    error = analyse(nested, text, out, "--reference", nested).error
    assert error == f"--reference {nested} is a nested checkpoint; give the model that {nested} was made from"
    error = analyse(tiny_model_dir, text, out, "--reference", other).error
    assert error == f"{tiny_model_dir} is no nested checkpoint and is judged against itself; leave --reference out"
    assert not out.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{", "strategies.jsonl:1 is no row of an analysis"),
        ('{"strategy": "rtn"}', "missing or unknown: "),
        ("\udcff", "cannot be read"),
        ("", "no strategy is finished yet"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_damaged_rows(analysed: tuple[Path, Finished], tmp_path: Path, damage: str, message: str) -> None:
    out = shutil.copytree(analysed[0], tmp_path / "copy")
    (out / "strategies.jsonl").write_bytes(damage.encode(errors="surrogateescape"))
    assert message in run(cli.main, "analyse", "--from-rows", out).error


@pytest.mark.usefixtures("undrawn")
def test_wrong_types_in_rows(analysed: tuple[Path, Finished], tmp_path: Path) -> None:
    out = shutil.copytree(analysed[0], tmp_path / "copy")
    file = out / "strategies.jsonl"
    first = json.loads(file.read_text().splitlines()[0]) | {"output_kl_nats": "little"}
    file.write_text(json.dumps(first))
    assert "output_kl_nats='little' must be a number" in run(cli.main, "analyse", "--from-rows", out).error


def test_what_is_quantised_alike_is_quantised_once(analysed: tuple[Path, Finished]) -> None:
    assert analysed[1].err.count("rtn-text:64: loading the model") == 1
    assert "rtn-tuned:64: loading the model" not in analysed[1].err


def test_an_analysis_is_inspected(analysed: tuple[Path, Finished], tmp_path: Path) -> None:
    out, _ = analysed
    found = run(cli.main, "inspect", out, "--json").result
    assert (found["kind"], found["complete"], found["windows"]) == ("analysis", True, 4)
    assert found["strategies"] == ["rtn:32", "rtn-text:64", "rtn-tuned:64"]
    assert len(found["output_kl_nats"]) == 9
    shutil.copytree(out, tmp_path / "half")
    (tmp_path / "half" / "report.md").unlink()
    assert not run(cli.main, "inspect", tmp_path / "half", "--json").result["complete"]
    (tmp_path / "half" / "analysis.json").write_text("{")
    assert run(cli.main, "inspect", tmp_path / "half").code == 2


@pytest.mark.usefixtures("undrawn")
def test_rotated_strategies(tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, names = tmp_path / "out", ("--strategies", "rtn:32", "rtn-rotated:32")
    with monkeypatch.context() as patched:  # found out before the strategies that could be measured are
        patched.setattr("flexquant_rl.engine.quantisation.rotation.ROTATED_MODEL_TYPES", ("mamba",))
        error = analyse(tiny_model_dir, text, out, *names).error
        reason = "a rotation does not pass through the norms of model type 'llama', only through those of mamba"
        assert error == f"{reason}; leave the rotation out"
        assert not out.exists()
    rows = analyse(tiny_model_dir, text, out, *names).result["rows"]
    kl = {(row["strategy"], row["bit_width"]): row["output_kl_nats"] for row in rows}
    assert 0 < kl["rtn-rotated:32", 8] < kl["rtn-rotated:32", 4] < kl["rtn-rotated:32", 3]
    assert kl["rtn-rotated:32", 3] != kl["rtn:32", 3]
