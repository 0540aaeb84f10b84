"""The directory of a run: a name of its own, one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.runs import run
from flexquant_rl.agents.runs.run import load_run, locked_run, new_run
from flexquant_rl.engine.errors import InputError


def test_runs_of_one_second_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.time, "strftime", lambda _: "20300101-000000")
    names = []
    for _ in range(3):
        with new_run(TrainConfig(), None) as run_dir:
            names.append(run_dir.name)
            assert load_run(run_dir) == TrainConfig()
    stem = "tiny-code-llama-20300101-000000"
    assert names == [stem, f"{stem}-2", f"{stem}-3"]


def test_a_refused_default_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such text"), new_run(TrainConfig(), None):
        raise InputError("no such text")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom flexquant_rl.agents.runs.run import locked_run\n"
        f"with locked_run(Path({str(tmp_path)!r})):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        refused = pytest.raises(InputError, match=f"another process is working on {tmp_path}.*wait for it")
        with refused, locked_run(tmp_path):
            pytest.fail("two processes work on one run")
        other.kill()  # however it ends, the lock ends with it
        other.wait()
        with locked_run(tmp_path):
            assert list(tmp_path.iterdir()) == []


def test_whoever_comes_second_is_refused_and_cleans_nothing_up(tmp_path: Path) -> None:
    """Both have seen that there is no run yet."""
    run_dir = tmp_path / "run"
    with new_run(TrainConfig(seed=1), run_dir):
        config = (run_dir / "config.json").read_bytes()
        (run_dir / "config.json").rename(tmp_path / "hidden")  # the second one looked before it was written
        with pytest.raises(InputError, match="another process is working on"), new_run(TrainConfig(seed=2), run_dir):
            pytest.fail("two processes began one run")
        (tmp_path / "hidden").rename(run_dir / "config.json")
        assert (run_dir / "config.json").read_bytes() == config
    assert load_run(run_dir).seed == 1
