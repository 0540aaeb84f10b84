"""Plain lines where stderr is no terminal, a bar where it is; stdout stays free for the JSON line."""

from __future__ import annotations

import sys

import pytest

from flexquant_rl.agents import progress
from flexquant_rl.agents.progress import StepBar, say, track


class Clock:
    """A second passes between two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def test_say(capsys: pytest.CaptureFixture[str]) -> None:
    say("loading the model")
    assert capsys.readouterr() == ("", "loading the model\n")


def test_track_yields_everything_and_is_quiet_when_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([3, 1, 2], "profiling")) == [3, 1, 2]
    assert list(track(iter("ab"), "profiling")) == ["a", "b"]
    assert list(track([], "profiling")) == []
    assert capsys.readouterr() == ("", "")


def test_track_prints_plain_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "time", Clock())
    assert list(track(range(40), "profiling")) == list(range(40))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert 2 <= len(lines) <= 5
    assert all(line.startswith("profiling: ") and " of 40, " in line for line in lines)
    assert not set(err) & {"\r", "\x1b"}
    list(track((index for index in range(40)), "reading"))
    assert " of " not in capsys.readouterr().err
    list(track((index for index in range(40)), "reading", total=40))
    assert " of 40" in capsys.readouterr().err


def test_step_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = StepBar("PPO seed 0", 1000)
    bar.update(0, "best +0.1")
    bar.update(500, "best +0.2")
    bar.close()
    assert capsys.readouterr() == (
        "",
        "PPO seed 0: 0 of 1000 env steps, best +0.1\nPPO seed 0: 500 of 1000 env steps, best +0.2\n",
    )


def test_bars_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(track(range(5), "profiling")) == list(range(5))
    bar = StepBar("PPO seed 0", 10, initial=4)
    bar.update(10, "done")
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "profiling" in err
    assert "PPO seed 0" in err
    assert "\r" in err
