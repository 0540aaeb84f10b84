"""The code in the documents of the environments runs as it stands, on a small model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexquant_rl.engine import embedded
from flexquant_rl.fq_env import prompts
from flexquant_rl.fq_env.shared import forget_shared
from flexquant_rl.fq_env.stdlib_text import StdlibSplit, stdlib_text


def some_stdlib_text(split: StdlibSplit) -> dict[str, str]:
    """A part of it: all takes seconds, letter by letter."""
    return dict(list(stdlib_text(split).items())[:3])


@pytest.fixture(autouse=True)
def small_default(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> Iterator[None]:
    """The tiny model and a part of the text are the defaults."""
    forget_shared()
    monkeypatch.setattr(embedded, "embedded_model_path", lambda: tiny_model_dir)
    monkeypatch.setattr(prompts, "stdlib_text", some_stdlib_text)
    yield
    forget_shared()


def blocks(path: Path, section: str = "") -> list[str]:
    """The Python blocks of a document, or of one of its sections."""
    text = path.read_text(encoding="utf-8")
    if section:
        (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(block: str, name: str) -> dict[str, Any]:
    """The names that a block leaves."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, name, "exec"), names)
    return names


def test_environment_document(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, vector, training, control_variate = blocks(repo_root / "docs" / "environment.md")
    run(first, "environment.md")
    shown = capsys.readouterr().out
    line = r"^\d\.\d\d bits  \d+% saved  \d\.\d{4} nats  reward [+-]\d+\.\d\d$"
    assert len(re.findall(line, shown, re.MULTILINE)) == 12
    assert "\x1b[48;5;" in shown
    run(vector, "environment.md")
    run(training, "environment.md")
    rewards = run(control_variate, "environment.md")["rewards"]
    assert rewards.shape == (8,)
    assert abs(rewards).max() < 2e-3


def test_readme(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(repo_root / "README.md")
    names = run(block, "README.md")
    saved, nats = map(float, capsys.readouterr().out.split())
    assert (saved, nats) == (names["info"]["time_saved"], names["info"]["output_kl_nats"])
    assert nats >= 0


def test_a_new_task(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(repo_root / "docs" / "extending.md", "A new task")
    names = run(block, "tolerant_task.py")
    assert capsys.readouterr().out.count("bits") == 8
    observation, info, env = names["observation"], names["info"], names["env"]
    assert env.observation_space.contains(observation)
    assert len(env.feature_names) == len(observation)
    assert observation[env.feature_names.index("tolerance")] == pytest.approx(0.02)
    assert info["bits_saved"] == pytest.approx(1 - info["mean_bit_width"] / 8)
    assert info["kl_cost"] == pytest.approx(20 * max(info["output_kl_nats"] - 0.02, 0), abs=1e-5)
    assert names["reward"] == pytest.approx(info["bits_saved"] - info["kl_cost"], abs=1e-5)
