"""The whole of `train.py` on a tiny model: what it leaves behind, and that an interruption anywhere changes nothing."""

from __future__ import annotations

import errno
import json
import re
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from cli_runner import TINY_RUN, Finished, leftovers, run, spawn, tree, write_text
from PIL import Image
from small_runs import make_quick
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flexquant_rl import cli, train
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.artefact import load_policy
from flexquant_rl.engine.quantisation.config import QuantizationConfig

ROW_FIELDS = {
    *("policy", "seed", "kl_weight", "mean_bit_width", "output_kl_nats", "output_kl_p99_nats"),
    *("perplexity", "top1_agreement", "speedup_modelled", "speedup_measured"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def finished(folder: Path, tiny_model_dir: Path, text: Path) -> Finished:
    """`python train.py` as it is started by hand, in a process of its own, nothing replaced."""
    options = ("--model", tiny_model_dir, "--text", text, "--run", "run", "--seeds", 1, "--latency", "roofline")
    process = spawn("train.py", *options, *TINY_RUN, cwd=folder)
    out, err = process.communicate(timeout=280)
    return Finished(process.returncode, out, err)


@pytest.mark.slow
class TestWholeRun:
    def test_last_line_is_json(self, finished: Finished) -> None:
        result = finished.result
        assert result["run_dir"] == "run"
        assert result["policy_dir"] == "run/policy"
        assert result["env_steps"] == 48
        assert result["env_steps_per_s"] > 0
        assert result["captured_headroom"] is None or isinstance(result["captured_headroom"], float)
        assert all(row.keys() >= ROW_FIELDS for row in result["rows"])

    def test_rows_cover_all_kinds_of_policies(self, finished: Finished) -> None:
        rows = finished.result["rows"]
        expected = {"fixed", "static", "random", "entropy", "schedule", "token", "ppo", "oracle", "oracle-unit"}
        assert {row["family"] for row in rows} == expected
        learned = [row for row in rows if row["family"] == "ppo"]
        assert {row["seed"] for row in learned} <= {0}
        for family in ("fixed", "static"):
            budgets = [row["time_budget"] for row in rows if row["family"] == family]
            assert len(set(budgets)) == len(budgets) == 4, family
        assert isinstance(finished.result["budgets_out_of_reach"], list)
        assert all(row["output_kl_nats"] >= 0 and 3 <= row["mean_bit_width"] <= 8 for row in rows)
        assert all(row["speedup_measured"] > 0 for row in rows if not row["policy"].startswith("oracle:"))

    def test_longer_than_in_training(self, finished: Finished, folder: Path) -> None:
        """Ten tokens where four were trained: in files of their own, and told apart in the report."""
        rows = finished.result["long_rows"]
        assert {"static"} <= {row["family"] for row in rows} <= {"static", "ppo", "token"}
        run_dir = folder / finished.result["run_dir"]
        for name, tokens, expected in (("eval_long.jsonl", 10, rows), ("eval.jsonl", 4, finished.result["rows"])):
            lines = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
            assert {line["num_tokens"] // line["num_sequences"] for line in lines} == {tokens}
            assert len(lines) == len(expected)
        assert "sequences of 10 tokens ([eval_long.jsonl](eval_long.jsonl))" in (run_dir / "report.md").read_text()

    def test_console_table_fits_the_screen(self, finished: Finished) -> None:
        lines = finished.out.splitlines()
        table = lines[: lines.index("")]
        assert len(table) == 2 + len(finished.result["rows"])
        assert max(map(len, table)) <= 110

    def test_stderr_holds_progress_and_nothing_else(self, finished: Finished) -> None:
        known = (
            "loading",
            "quantising",
            "profiling",
            "solving",
            "learning which tokens",
            "the signals explain",
            "the input token alone explains",
            "measuring what",
            "validation reward over static",
            "PPO seed 0",
            "meeting the time budgets",
            "evaluating",
            "timing",
            "the clock disagrees",  # where the machine is not quiet
            "oracle",
            "report",
        )
        assert [line for line in finished.err.splitlines() if not line.startswith(known)] == []

    def test_run_directory(self, finished: Finished, folder: Path) -> None:
        run_dir = folder / finished.result["run_dir"]
        files = tree(run_dir)
        assert {
            "config.json",
            "profile.json",
            "eval.jsonl",
            "report.md",
            "pareto.png",
            "bits.png",
            "learning.png",
        } <= files.keys()
        assert {f"policy/{name}" for name in ("policy.json", "policy.safetensors", "profile.json")} <= files.keys()
        assert leftovers(files) == []
        assert len((run_dir / "eval.jsonl").read_text().splitlines()) == len(finished.result["rows"])
        for name in ("pareto.png", "bits.png", "learning.png"):
            with Image.open(run_dir / name) as image:
                assert image.format == "PNG"
                assert min(image.size) > 300
                image.load()
        report = (run_dir / "report.md").read_text()
        assert re.search(r"between the nearest two of \d+ allocations. One that is left out is within", report)
        assert "](pareto.png)" in report
        assert "](bits.png)" in report
        assert "](learning.png)" in report
        assert re.search(r"Test sequence \d of 3, dial \S+, seed 0: widths move by", report)
        assert json.loads((run_dir / "config.json").read_text())["config"]["env_steps"] == 48

    def test_tensorboard(self, finished: Finished, folder: Path) -> None:
        assert finished.code == 0
        events = EventAccumulator(str(folder / "run" / "seeds" / "0" / "tensorboard"))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        assert {"reward/total", "bits/mean", "quality/output_kl_nats", "policy/approx_kl"} <= tags
        assert {"validation/reward_over_static", "policy/policy_entropy"} <= tags

    def test_policy_is_of_this_model(self, finished: Finished, folder: Path, tiny_model_dir: Path) -> None:
        model = load_model(str(tiny_model_dir), QuantizationConfig())
        policy = load_policy(folder / finished.result["policy_dir"], model_fingerprint=model.fingerprint)
        assert policy.card.unit_names == tuple(unit.name for unit in model.units)
        assert len(policy.card.dial) == 2


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signal_from_the_shell(
    tmp_path: Path, tiny_model_dir: Path, text: Path, number: signal.Signals, code: int, word: str
) -> None:
    options = ("--model", tiny_model_dir, "--text", text, "--run", "run")
    process = spawn("train.py", *options, *TINY_RUN, cwd=tmp_path)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("loading the model")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert out == ""
    assert err.splitlines()[-1] == f"{word}; continue with: python train.py --resume run"
    assert "Traceback" not in err
    assert leftovers(tree(tmp_path)) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def start(tiny_model_dir: Path, text: Path) -> tuple[object, ...]:
    """The options of every run below: two seeds."""
    # Latencies that are the same in every run: those that are measured are not. Of the policies that learn nothing by
    # reward, those are judged that cost little, at two budgets.
    options = ("--latency", "roofline", "--time-budgets", 0.5, 0.7, "--baselines", "untrained", "token")
    return ("--model", tiny_model_dir, "--text", text, "--seeds", 2, *TINY_RUN, *options)


@pytest.fixture(scope="module")
def uninterrupted(start: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_quick(monkeypatch)
        assert run(train.main, *start, "--run", run_dir).code == 0
    return run_dir


def test_policy_by_tokens_is_judged_inspected_exported_and_served(
    uninterrupted: Path, tiny_model_dir: Path, text: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (uninterrupted / "eval.jsonl").read_text().splitlines()]
    assert "token" in {row["family"] for row in rows}
    assert "output KL of token against static" in (uninterrupted / "report.md").read_text()
    found = run(cli.main, "inspect", uninterrupted / "by_token", "--json").result
    assert (found["kind"], len(found["dial"]), found["complete"]) == ("policy by tokens", 2, True)
    exported = run(cli.main, "export", uninterrupted / "by_token", tmp_path / "by_token").result
    assert exported["dial"] == found["dial"]
    speed = min(point["speedup_modelled"] for point in found["dial"])
    asked = ("--policy", tmp_path / "by_token", "--prompt", "abc abc", "--max-new-tokens", 4)
    for setting in (("--speed", speed), ("--kl-weight", 3.0)):
        generated = run(cli.main, "generate", tiny_model_dir, *asked, *setting)
        assert generated.code == 0, generated.err
    options = ("--text", text, "--sequences", 2, "--latency", "roofline")
    judged = run(cli.main, "evaluate", tiny_model_dir, "--policy", tmp_path / "by_token", *options).result
    assert {row["family"] for row in judged["rows"] if row["kl_weight"]} == {f"token:{tmp_path / 'by_token'}"}


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run ends with, but for clocks."""
    folders = ("policy", "by_token", "seeds/0/policy", "seeds/1/policy")
    files = [f"{folder}/policy.safetensors" for folder in folders]
    # The last checkpoints too: where no update beats the clone, the policy says nothing about training.
    files += ["seeds/0/checkpoint.safetensors", "seeds/1/checkpoint.safetensors"]
    files += ["seeds/0/cloned.safetensors", "seeds/1/cloned.safetensors"]
    files += ["profile.json", "static_front.safetensors", "importance.safetensors"]
    rows = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    dial = json.loads((run_dir / "policy" / "policy.json").read_text())["dial"]
    return {"rows": rows, "dial": dial} | {name: (run_dir / name).read_bytes() for name in files}


def files_of(run_dir: Path) -> set[str]:
    """The files of a run, but for TensorBoard's, of which every resume adds one."""
    return {path for path in tree(run_dir) if "tfevents" not in path}


def stopping_at(target: str, call: int, stop: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a function, `module:name` below flexquant_rl, call `stop` at its n-th call, before its own work."""
    module_name, _, path = target.partition(":")
    owner: Any = import_module(f"flexquant_rl.{module_name}")
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            stop()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def interrupt() -> None:
    """What Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


# Each seed takes 12 steps of 4 episodes at a time, 3 rollouts of 4; two epochs of two batches follow each rollout. What
# is replaced on disk: configuration, profile, front, importance, the clone, then a checkpoint before each rollout.
PHASES = {
    "quantising": ("engine.nesting:quantize_rtn", 4),
    "profiling": ("engine.control.sensitivity:allocation_kl_nats", 1),
    "front": ("agents.policies.static_front:allocation_kl_nats", 1),
    "importance": ("agents.evaluation.influence:_of_part", 2),
    "cloning": ("agents.runs.imitation:_targets", 5),
    "seed 0, rollout": ("agents.runs.ppo:TrainingCallback._on_step", 7),
    "seed 0, update": ("agents.runs.unit_ppo:UnitPPO._gradient_step", 7),
    "seed 0, checkpoint": ("engine.files:os.replace", 6),
    "seed 0, validation": ("agents.runs.training:Validation.__call__", 2),
    "seed 0, export": ("agents.runs.training:check_parity", 1),
    "seed 1, rollout": ("agents.runs.ppo:TrainingCallback._on_step", 22),
    "dial table": ("agents.runs.training:DialPoint", 2),
    "evaluation": ("agents.evaluation.contest:summarise", 3),
    "oracle": ("agents.evaluation.oracle:trace_in_flight", 2),
    "report": ("agents.runs.phases:write_report", 1),
}
# A run takes seconds, so each is interrupted in several phases, in order and apart from each other. What is counted is
# counted from the start of a process: none of these interruptions lies behind another that would have it count less.
RUNS = [
    ["quantising", "importance", "seed 0, validation", "evaluation"],
    ["profiling", "cloning", "seed 1, rollout", "oracle"],
    ["front", "seed 0, rollout", "seed 0, export", "report"],
    ["seed 0, checkpoint", "seed 0, update", "dial table"],
]
# Seven steps are a rollout more than a checkpoint keeps: the third of these interruptions is in the second seed.
AGAIN_AND_AGAIN = ["quantising", "front", "cloning", *["seed 0, rollout"] * 3, "evaluation", "report"]


def test_every_phase_is_interrupted() -> None:
    assert sorted(phase for phases in RUNS for phase in phases) == sorted(PHASES)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("phases", [*RUNS, AGAIN_AND_AGAIN], ids="+".join)
def test_resumed_run_ends_like_an_uninterrupted_one(
    phases: list[str], start: tuple[object, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = (*start, "--run", run_dir)
    for phase in phases:
        with pytest.MonkeyPatch.context() as monkeypatch:
            stopping_at(*PHASES[phase], interrupt, monkeypatch)
            stopped = run(train.main, *arguments)
        assert stopped.code == 130, f"{phase}: {stopped.err}"
        assert stopped.err.splitlines()[-1] == f"interrupted; continue with: python train.py --resume {run_dir}"
        assert stopped.out == ""
        assert leftovers(tree(run_dir)) == []
        arguments = ("--resume", run_dir)
    finished = run(train.main, *arguments)
    assert finished.result["run_dir"] == str(run_dir)
    assert outcome(run_dir) == outcome(uninterrupted)
    assert files_of(run_dir) == files_of(uninterrupted)


@pytest.mark.usefixtures("quick")
def test_full_disk_while_training(start: tuple[object, ...], uninterrupted: Path, tmp_path: Path) -> None:
    def full_disk() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoint.safetensors")

    with pytest.MonkeyPatch.context() as monkeypatch:
        stopping_at("agents.runs.ppo:write_tensors", 2, full_disk, monkeypatch)
        stopped = run(train.main, *start, "--run", tmp_path / "run")
    assert stopped.error == "checkpoint.safetensors: No space left on device; free some space and run the command again"
    assert run(train.main, "--resume", tmp_path / "run").code == 0
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


@pytest.mark.usefixtures("quick")
def test_finished_run_may_be_resumed(uninterrupted: Path) -> None:
    before = outcome(uninterrupted)
    assert run(train.main, "--resume", uninterrupted).code == 0
    assert outcome(uninterrupted) == before
