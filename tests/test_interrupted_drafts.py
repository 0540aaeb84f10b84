"""Ctrl-C in every phase of drafts: recording, timing, tuning, training, checking, export, judging, report, generating.

One run is interrupted in each phase in turn, and resumed each time. It must end as one that nobody has interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Finished, leftovers, run, tree, write_sentences
from small_runs import TINY_DRAFTS, make_drafts_short, no_clock

from flexquant_rl import cli, train
from flexquant_rl.agents.runs import verified_preparation, verified_run
from flexquant_rl.engine.control import recording, rounds
from flexquant_rl.engine.control.drafting_rules import FixedRounds, Plain, ProductStop
from flexquant_rl.engine.control.verify_costs import VerifyCosts

COSTS = VerifyCosts("measured", 2.0, 2.0, (0.8, 1.2), (2.1, 2.2, 2.3), 0.1, 0.05)
PHASES: tuple[tuple[str, Any, str, int], ...] = (
    ("recording", recording, "write_sequence", 3),
    ("embedding", recording, "write_embedding", 1),
    ("timing", verified_preparation, "timed_drafts", 1),
    ("costs", verified_preparation, "write_json", 1),
    ("tuning", verified_run, "tuned", 2),
    ("training", verified_run, "train_drafts", 1),
    ("checking", verified_run, "check_parity", 1),
    ("export", verified_run, "save_policy", 1),
    ("judging", verified_run, "clairvoyant", 1),
    ("clock", verified_run, "measured_time_shares", 1),
    ("rows", verified_run, "write_rows", 1),
    ("picture", verified_run, "plot_drafts", 1),
    ("report", verified_run, "write_draft_report", 1),
)
"""Name, where the phase is called, what it is called, and which call is interrupted."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rules, costs that are the same in every run, no clock, a picture that is a byte."""
    make_drafts_short(monkeypatch)
    monkeypatch.setattr(verified_run, "EVERY_RULE", (Plain, FixedRounds, ProductStop))
    monkeypatch.setattr(verified_preparation, "timed_drafts", lambda *_, **__: COSTS)
    monkeypatch.setattr(verified_run, "measured_time_shares", no_clock)
    monkeypatch.setattr(verified_run, "plot_drafts", lambda *arguments, **_: arguments[3].write_bytes(b"."))


def interrupted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, which: int, main: Callable[[], Any]) -> Any:
    """Calls `main` with the n-th call of a function interrupted, and the function put back."""
    whole, calls = getattr(module, name), 0

    def interrupt(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == which:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        found = main()
    assert calls >= which, f"{name} was not called"
    return found


def test_a_run_that_is_interrupted_in_every_phase_ends_as_one_that_is_not(
    short: None, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    write_sentences(text, 120)
    start = ("--model", tiny_model_dir, "--text", text, *TINY_DRAFTS, "--seeds", 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(train.main, *start, "--run", whole).result
    command: tuple[object, ...] = (*start, "--run", parts)
    for phase, module, name, which in PHASES:
        stopped = interrupted(monkeypatch, module, name, which, partial(run, train.main, *command))
        assert stopped.code == 130, phase
        assert f"--resume {parts}" in stopped.err
        assert "Traceback" not in stopped.err
        command = ("--resume", parts)
    last = run(train.main, *command).result
    said = {name: value for name, value in last.items() if name not in ("run_dir", "policy_dir", "env_steps_per_s")}
    assert said == {name: done[name] for name in said}
    assert tree(parts).keys() == tree(whole).keys()
    assert leftovers(tree(parts)) == []
    timed = {"config.json", "policy.json"}  # when it was, where it is and how fast it went
    for name, size in tree(whole).items():
        if size is not None and Path(name).name not in timed:
            assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_same_record_command_goes_on(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    write_sentences(text, 120)
    sizes = ("--tokens", 40, "--prompt-tokens", 8, "--max-new-tokens", 8, "--depth", 2, "--widths", 3, 5)

    def record(out: Path) -> Finished:
        return run(cli.main, "record", tiny_model_dir, out, "--text", text, *sizes)

    assert record(tmp_path / "whole").code == 0
    for name, which in (("write_sequence", 2), ("write_embedding", 1)):
        stopped = interrupted(monkeypatch, recording, name, which, lambda: record(tmp_path / "parts"))
        assert stopped.code == 130
        assert "the same command goes on" in stopped.err
        assert run(cli.main, "inspect", tmp_path / "parts").result["missing"].startswith("run the same `fq record`")
    assert record(tmp_path / "parts").code == 0
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    for name in tree(tmp_path / "whole"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_generating_with_drafts_ends_in_one_line(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a round: what was settled is on the terminal, and nothing hangs."""
    options = ("--prompt", "abc abc", "--max-new-tokens", 24, "--verify-width", 8)
    stopped = interrupted(
        monkeypatch, rounds, "settled_tokens", 3, lambda: run(cli.main, "generate", tiny_model_dir, *options)
    )
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert stopped.out.strip(), "what was settled before"
