"""Sweeps: what may vary, one run for each trial, the choice on validation text, and what a resume does not repeat.

Trials run in this process here; `tests/test_sweep_ray.py` runs them through Ray.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_runner import TINY_EPISODES, Finished, leftovers, run, tree, write_text
from small_runs import no_clock

from flexquant_rl import cli, train
from flexquant_rl.agents import preparation
from flexquant_rl.agents.commands import sweep as command
from flexquant_rl.agents.config import PPOConfig, TrainConfig
from flexquant_rl.agents.runs import ray_trials, training
from flexquant_rl.agents.runs.ray_trials import Workers
from flexquant_rl.agents.runs.run import load_run, load_sweep
from flexquant_rl.agents.runs.sweep import Trial, configurations, notes, parse_settings, trials
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.prompts import PromptWindows

TINY_SWEEP = (
    *TINY_EPISODES,
    *("--env-steps", 32, "--ppo.num-envs", 4, "--ppo.batch-size", 8, "--ppo.num-epochs", 1, "--seeds", 2),
    *("--validation-sequences", 3, "--test-sequences", 3, "--num-dials", 2, "--oracle-samples", 0),
    *("--long-tokens", 0, "--importance-windows", 10, "--time-budgets", 0.6, "--latency", "roofline"),
)
RATES = ("--set", "ppo.learning_rate=1e-3,3e-2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials that were run, one after the other in this process; clocks and pictures are left out."""
    names: list[str] = []

    def run_here(some: Sequence[Trial], where: Workers) -> dict[str, str]:
        failed = {}
        for trial in some:
            names.append(trial.directory.name)
            outcome = ray_trials._train({"directory": str(trial.directory), "started_in": str(Path.cwd())})
            failed |= {trial.name: outcome["error"]} if "error" in outcome else {}
        return failed

    monkeypatch.setattr(command, "run_trials", run_here)
    monkeypatch.setattr(Workers, "check", lambda self: None)
    monkeypatch.setattr(training, "clone", partial(training.clone, num_steps=10))
    monkeypatch.setattr(
        "flexquant_rl.agents.evaluation.contest.measured_time_shares",
        no_clock,
    )
    for name in ("plot_pareto", "plot_bits", "plot_learning_curve"):
        monkeypatch.setattr(f"flexquant_rl.agents.runs.phases.{name}", lambda *_, **__: None)
    return names


@pytest.fixture
def sweep(tiny_model_dir: Path, text: Path, tmp_path: Path, trained: list[str]) -> Callable[..., Finished]:
    start = ("sweep", "--model", tiny_model_dir, "--text", text, "--run", tmp_path / "sweep", *TINY_SWEEP)
    return lambda *options: run(cli.main, *start, *options)


def test_the_grid() -> None:
    swept = parse_settings(["ppo.learning-rate=1e-4, 3e-4", "env_steps=64,128,256"])
    assert swept == {"ppo.learning_rate": [1e-4, 3e-4], "env_steps": [64, 128, 256]}
    base = TrainConfig(seeds=3, seed=5, ppo=PPOConfig(gamma=0.5))
    found = configurations(base, swept)
    assert len(found) == 6
    assert {(one.ppo.learning_rate, one.env_steps) for _, one in found} == {
        (rate, steps) for rate in (1e-4, 3e-4) for steps in (64, 128, 256)
    }
    for settings, one in found:
        assert replace(one, env_steps=base.env_steps, ppo=base.ppo) == base, "nothing else differs"
        assert settings == {"ppo.learning_rate": one.ppo.learning_rate, "env_steps": one.env_steps}
    every = trials(base, swept, Path("s"))
    assert len({trial.directory for trial in every}) == len({trial.name for trial in every}) == 18
    assert {trial.config.seed for trial in every} == {5, 6, 7}
    assert {trial.config.seeds for trial in every} == {1}
    assert [settings for settings, _ in configurations(base, {})] == [{}], "without options, seeds alone"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo.learning_rat=1", "--set ppo.learning_rat: .* did you mean ppo.learning_rate?"),
        ("learning_rate=1e-4", "did you mean ppo.learning_rate?"),
        ("gamma=0.5", "did you mean ppo.gamma?"),
        ("zzz=1", "use one of env_steps, ppo.num_envs"),
        ("env.max_new_tokens=8,16", "the same in all trials.* give --env.max-new-tokens once, or start a sweep"),
        ("model=a,b", "give --model once"),
        ("ppo.gamma", "has no values; write KEY=VALUE,VALUE"),
        ("ppo.gamma=", "has no values"),
        ("ppo.gamma=0.5,high", "'high' is not a number"),
        ("ppo.gamma=0.5,", "'' is not a number"),
        ("ppo.num_envs=4.5", "'4.5' is not a whole number"),
        ("ppo.gamma=0.5,0.50", "has a value twice"),
    ],
)
def test_bad_settings(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_settings([text])


def test_bad_values_leave_nothing(tmp_path: Path, sweep: Callable[..., Finished]) -> None:
    for options, message in (
        (("--set", "ppo.gamma=0.5,1.5"), "ppo.gamma=1.5 must be from 0 to 1; change --ppo.gamma"),
        (("--set", "ppo.gamma=0.5", "ppo.gamma=0.6"), "--set ppo.gamma is given twice"),
        (("--seeds", 0), "seeds=0 must be at least 1"),
        (("--model", tmp_path / "nowhere"), "nowhere"),
    ):
        assert message in sweep(*options).error
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (Workers(None, 0, 1, 0.0), "workers=0 must be at least 1"),
        (Workers(None, None, 0, 0.0), "cpus=0 must be at least 1"),
        (Workers(None, None, 1, -0.5), "gpus=-0.5 must be at least 0"),
    ],
)
def test_bad_workers(workers: Workers, message: str) -> None:
    with pytest.raises(InputError, match=message):
        workers.check()


def test_without_ray(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.tune", None)
    found = run(cli.main, "sweep", "--model", tiny_model_dir, "--run", tmp_path / "sweep")
    assert found.error == "fq sweep needs Ray Tune, and it is missing; pip install 'flexquant-rl[ray]'"
    assert tree(tmp_path) == {}


def test_a_whole_sweep(
    sweep: Callable[..., Finished], trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is profiled once, test text opened once and last; the policy is that of the best mean on validation text."""
    opened: set[tuple[str, int]] = set()
    split = PromptWindows.split

    def spy(windows: PromptWindows, name: Any) -> Any:
        opened.add((name, len(trained)))
        return split(windows, name)

    monkeypatch.setattr(PromptWindows, "split", spy)
    profiled: list[Any] = []
    profile_model = preparation.profile_model

    def profile(*arguments: Any, **options: Any) -> Any:
        profiled.append(arguments)
        return profile_model(*arguments, **options)

    monkeypatch.setattr(preparation, "profile_model", profile)
    finished = sweep(*RATES)
    result = finished.result
    assert trained == ["0-seed0", "0-seed1", "1-seed0", "1-seed1"]
    assert len(profiled) == 1
    assert {done for name, done in opened if name == "test"} == {4}
    summary = result["sweep"]
    assert (summary["trials"], summary["failed"]) == (4, {})
    means = [one["mean"] for one in summary["configurations"]]
    assert means == sorted(means, reverse=True)
    assert all(
        one["mean"] == pytest.approx(sum(one["validation_reward_over_static"]) / 2) for one in summary["configurations"]
    )
    assert summary["chosen"] == summary["configurations"][0]["settings"]
    best = summary["configurations"][0]["validation_reward_over_static"]
    assert result["validation_reward_over_static"]["chosen"] == best
    assert {row["seed"] for row in result["rows"] if row["family"] == "ppo"} <= {0, 1}
    # The exported policy is the best seed's of the chosen configuration.
    index = [{"ppo.learning_rate": 1e-3}, {"ppo.learning_rate": 3e-2}].index(summary["chosen"])
    seed = best.index(max(best))
    folder = tmp_path / "sweep"
    chosen = folder / "trials" / f"{index}-seed{seed}" / "seeds" / str(seed) / "policy" / "policy.safetensors"
    assert (folder / "policy" / "policy.safetensors").read_bytes() == chosen.read_bytes()
    files = tree(folder)
    assert leftovers(files) == []
    report = (folder / "report.md").read_text()
    assert report.count("- swept, chosen: ppo.learning_rate=") == report.count("- swept, not chosen: ") == 1
    # Each trial is a run with what the sweep has prepared.
    trial = folder / "trials" / "1-seed1"
    assert load_run(trial).ppo.learning_rate == 3e-2
    for name in ("profile.json", "static_front.safetensors", "importance.safetensors"):
        assert (trial / name).read_bytes() == (folder / name).read_bytes()
    # Again: nothing is trained, and all is as it was.
    again = run(cli.main, "sweep", "--resume", folder).result
    assert len(trained) == 4
    assert again["rows"] == result["rows"]
    assert again["sweep"] == summary


def test_a_sweep_is_the_runs_that_it_holds(
    sweep: Callable[..., Finished], trained: list[str], tmp_path: Path, tiny_model_dir: Path, text: Path
) -> None:
    """The seeds of a configuration end with the weights that `train.py` gives them."""
    assert sweep().code == 0
    start = ("--model", tiny_model_dir, "--text", text, "--run", tmp_path / "run", *TINY_SWEEP)
    assert run(train.main, *start).code == 0
    for seed in (0, 1):
        name = f"seeds/{seed}/policy/policy.safetensors"
        whole = (tmp_path / "run" / name).read_bytes()
        assert (tmp_path / "sweep" / "trials" / f"0-seed{seed}" / name).read_bytes() == whole


def test_what_failed_is_tried_again_and_nothing_else(
    sweep: Callable[..., Finished], trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = training.build_ppo

    def break_some(env: Any, config: PPOConfig, **options: Any) -> Any:
        if config.learning_rate == 3e-2 and options["seed"] == 1:
            raise InputError("the disk of this worker is odd")
        return build(env, config, **options)

    monkeypatch.setattr(training, "build_ppo", break_some)
    result = sweep(*RATES).result
    failed = {"ppo.learning_rate=0.03, seed 1": "the disk of this worker is odd"}
    assert result["sweep"]["failed"] == failed
    assert result["sweep"]["chosen"] == {"ppo.learning_rate": 1e-3}
    assert len(result["sweep"]["configurations"]) == 1, "a configuration counts with all its seeds"
    assert "failed, and its configuration left out: ppo.learning_rate=0.03, seed 1 (the disk" in "".join(
        result["findings"]
    )
    trained.clear()
    monkeypatch.setattr(training, "build_ppo", build)
    again = run(cli.main, "sweep", "--resume", tmp_path / "sweep").result
    assert trained == ["1-seed1"]
    assert (again["sweep"]["failed"], len(again["sweep"]["configurations"])) == ({}, 2)


def test_no_trial_finishes(sweep: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise InputError("out of memory")

    monkeypatch.setattr(training, "build_ppo", broken)
    error = sweep("--seeds", 1).error
    assert error.startswith("no configuration has finished with all its seeds (as configured, seed 0: out of memory)")
    assert f"fq sweep --resume {tmp_path / 'sweep'}" in error
    assert not (tmp_path / "sweep" / "eval.jsonl").exists()


def test_sweeps_and_runs_are_told_apart(
    sweep: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = sweep(*RATES)
    folder = tmp_path / "sweep"
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == f"interrupted; continue with: fq sweep --resume {folder}"
    assert load_sweep(folder)[1] == {"ppo.learning_rate": [1e-3, 3e-2]}
    assert run(train.main, "--resume", folder).error.startswith(f"{folder} is a sweep; continue it with fq sweep")
    assert run(cli.main, "sweep", "--resume", folder, "--seeds", 3).error.startswith("--resume continues a sweep as")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sweep": {"ppo.gama": [1]}}))
    assert "did you mean ppo.gamma?" in run(cli.main, "sweep", "--resume", folder).error
    (folder / "config.json").write_text(json.dumps(config | {"sweep": [1]}))
    assert "is not a run" in run(cli.main, "sweep", "--resume", folder).error
    del config["sweep"]
    (folder / "config.json").write_text(json.dumps(config))
    assert run(cli.main, "sweep", "--resume", folder).error.startswith(f"{folder} is a run; continue it with train.py")


def test_notes_without_any_sweep_are_none() -> None:
    assert notes([], {}) == []
