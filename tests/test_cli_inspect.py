"""`fq inspect` names every artefact, says what it is of and whether it is whole, and refuses the rest in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import Finished, run
from evaluation_rows import row
from toy_traces import random_traces

from flexquant_rl import cli
from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.evaluation.rows import REPORT_FILE, ROWS_FILE, write_rows
from flexquant_rl.agents.onnx_policy import ONNX_FILE, write_onnx
from flexquant_rl.agents.runs.run import new_run
from flexquant_rl.agents.tasks.rows import TaskPlan, TaskRow, claim, save_rows
from flexquant_rl.engine.checkpoint import load_checkpoint, load_model, save_checkpoint
from flexquant_rl.engine.control.artefact import load_policy, save_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet, StaticPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.traces import sequence_path, start_recording, write_embedding, write_sequence
from flexquant_rl.engine.control.verify_costs import modelled_costs
from flexquant_rl.engine.files import write_json
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig

DIAL = (DialPoint(100.0, 1.2, 0.01, 6.0), DialPoint(30.0, 1.5, 0.05, 5.0))


@pytest.fixture(scope="module")
def nested(tiny_model_dir: Path) -> NestedCausalLM:
    return load_model(str(tiny_model_dir), QuantizationConfig(group_size=32), keep_reference=False)


@pytest.fixture(scope="module")
def profile(nested: NestedCausalLM) -> Profile:
    sensitivity = torch.tensor([0.5, 0.1, 0.03, 0.01, 0.0]).expand(3, -1)
    return Profile(roofline_cost(nested), sensitivity, nested.bit_widths, nested.fingerprint, 9, "8-bit")


@pytest.fixture(scope="module")
def artefacts(
    nested: NestedCausalLM, profile: Profile, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One of everything, whole. Read it only."""
    root = tmp_path_factory.mktemp("artefacts")
    shutil.copytree(tiny_model_dir, root / "model")
    save_checkpoint(nested, root / "nested")
    profile.save(root / "nested" / "profile.json")
    card = PolicyCard(SignalSchema(3, nested.bit_widths, horizon=32), nested.fingerprint, ("a", "b", "head"), DIAL)
    save_policy(LearnedPolicy(PrecisionNet(card.schema), card), profile, root / "learned")
    save_policy(StaticPolicy("mine", torch.tensor([3, 4, 8]), card), profile, root / "static")
    with new_run(TrainConfig(model="some-model", seeds=2), root / "run") as run_dir:
        for place in ("seeds/0/policy", "seeds/1/policy", "policy"):
            shutil.copytree(root / "learned", run_dir / place)
        profile.save(run_dir / "profile.json")
        write_rows(run_dir / ROWS_FILE, [row("static", 0.5, 0.02), row("ppo", 0.6, 0.01)])
        (run_dir / REPORT_FILE).write_text("# Report\n")
    with new_run(TrainConfig(), root / "sweep", {"ppo.gamma": (0.7, 0.8)}):
        pass
    traces = random_traces(np.random.default_rng(0))
    start_recording(root / "recording", traces.plan)
    for index, trace in enumerate(traces.sequences):
        write_sequence(root / "recording", traces.plan, index, trace)
    write_embedding(root / "recording", traces.plan, traces.embedding_ids, traces.embedding)
    write_results(root, nested.fingerprint)
    return {path.name: path for path in root.iterdir()}


def write_results(root: Path, fingerprint: str) -> None:
    """What `fq evaluate --out`, `fq tasks`, `fq bench --json` and a run of drafts leave."""
    (root / "evaluation").mkdir()
    write_rows(root / "evaluation" / ROWS_FILE, [row("fixed", 0.5, 0.02)])
    (root / "evaluation" / REPORT_FILE).write_text("# Report\n")
    (root / "tasks").mkdir()
    claim(root / "tasks", TaskPlan("some-model", fingerprint, 100, False, {"line": "0" * 64}))
    asked = TaskRow(
        *("fixed:4", "static", "", None, None, None, "line", "exact_match", 0.5, 0.25, 0.75),
        *(("a", "b"), (0, 1), (0.0, 1.0), ("x", "y"), 1.5),
    )
    save_rows(root / "tasks", [asked], TaskRow)
    (root / "tasks" / REPORT_FILE).write_text("# Report\n")
    costs = modelled_costs([0.5, 0.6], [1.0, 1.1], depth=3)
    write_json(root / "costs.json", {"version": 3, "recording": "d" * 64, "costs": costs.to_dict()})
    rows = [{"provider": "lean", "p50_us": 1.0, "cpu": "a cpu", "commit": "c0ffee", "tests": "passed"}]
    write_json(root / "bench.json", {"bench": "verify", "rows": rows})


def inspect(path: Path | str, *options: str) -> Finished:
    return run(cli.main, "inspect", path, *options)


def facts(path: Path | str) -> dict[str, Any]:
    return inspect(path, "--json").result


def test_plain_model(artefacts: dict[str, Path]) -> None:
    found = facts(artefacts["model"])
    assert (found["kind"], found["complete"], found["model_type"]) == ("model", True, "llama")
    assert (found["layers"], found["hidden_size"], found["vocab_size"]) == (2, 64, 128)
    assert found["weights_by_dtype"] == {"F32": found["weights"]}
    assert found["bytes"] == sum(file.stat().st_size for file in artefacts["model"].iterdir())


def test_embedded_model_by_its_name() -> None:
    assert facts("default")["path"].endswith("tiny-code-llama")


def test_nested_checkpoint(artefacts: dict[str, Path], nested: NestedCausalLM) -> None:
    found = facts(artefacts["nested"])
    assert (found["kind"], found["complete"]) == ("nested checkpoint", True)
    assert found["fingerprint"] == load_checkpoint(artefacts["nested"]).fingerprint
    assert found["bit_widths"] == [3, 4, 5, 6, 8]
    assert found["units"] == ["layer.0", "layer.1", "head"]
    assert found["nested_weights"] == int(nested.unit_weights.sum())
    assert found["bytes_by_width"]["8"] > found["bytes_by_width"]["3"] > found["nested_weights"] * 3 / 8
    assert found["profile"]["model_fingerprint"] == found["fingerprint"]


@pytest.mark.parametrize(("name", "kind"), [("learned", "learned policy"), ("static", "static policy")])
def test_policy(artefacts: dict[str, Path], nested: NestedCausalLM, name: str, kind: str) -> None:
    found = facts(artefacts[name])
    assert (found["kind"], found["mode"], found["model_fingerprint"]) == (kind, "lossy", nested.fingerprint)
    assert found["units"] == ["a", "b", "head"]
    assert found["dial"][1]["speedup_modelled"] == 1.5
    assert found.get("allocation") == ([3, 4, 8] if name == "static" else None)


def test_profile_and_rows(artefacts: dict[str, Path], nested: NestedCausalLM) -> None:
    found = facts(artefacts["run"] / "profile.json")
    assert (found["kind"], found["model_fingerprint"]) == ("profile", nested.fingerprint)
    assert (found["latency_source"], found["num_units"]) == ("roofline", 3)
    found = facts(artefacts["run"] / ROWS_FILE)
    assert (found["kind"], found["rows"], found["policies"]) == ("evaluation rows", 2, ["static", "ppo"])
    assert found["time_budgets"] == [0.5, 0.6]


def test_run_and_sweep(artefacts: dict[str, Path], tmp_path: Path) -> None:
    found = facts(artefacts["run"])
    assert (found["kind"], found["complete"], found["model"]) == ("run", True, "some-model")
    assert found["finished_seeds"] == ["seeds/0", "seeds/1"]
    assert found["policy"]["model_fingerprint"] == found["model_fingerprint"]
    assert found["rows"][ROWS_FILE]["rows"] == 2
    found = facts(artefacts["sweep"])
    assert (found["kind"], found["complete"], found["swept"]) == ("sweep", False, {"ppo.gamma": [0.7, 0.8]})
    unfinished = Path(shutil.copytree(artefacts["run"], tmp_path / "run"))
    shutil.rmtree(unfinished / "policy")
    shutil.rmtree(unfinished / "seeds" / "1")
    found = facts(unfinished)
    assert not found["complete"]
    assert found["missing"] == f"policies of seeds, policy; continue with: python train.py --resume {unfinished}"


def test_recording(artefacts: dict[str, Path], tmp_path: Path) -> None:
    found = facts(artefacts["recording"])
    assert (found["kind"], found["complete"], found["sequences"]) == ("recording", True, 6)
    assert found["draft_widths"] == [3, 4, 5]
    part = Path(shutil.copytree(artefacts["recording"], tmp_path / "recording"))
    sequence_path(part, 2).unlink()
    found = facts(part)
    assert (found["complete"], found["sequences"], found["planned_sequences"]) == (False, 5, 6)
    assert "fq record" in found["missing"]


def test_results(artefacts: dict[str, Path], nested: NestedCausalLM, tmp_path: Path) -> None:
    found = facts(artefacts["evaluation"])
    assert (found["kind"], found["complete"], found["policies"]) == ("evaluation", True, ["fixed"])
    found = facts(artefacts["tasks"])
    assert (found["kind"], found["complete"], found["model"]) == ("tasks", True, "some-model")
    assert found["model_fingerprint"] == nested.fingerprint
    assert (found["scores"], found["documents"]) == ({"fixed:4, line": 0.5}, 100)
    found = facts(artefacts["costs.json"])
    assert (found["kind"], found["source"], found["draft_ms"]) == ("costs of drafts", "modelled", [0.5, 0.6])
    assert found["recording"] == "d" * 64
    found = facts(artefacts["bench.json"])
    assert (found["kind"], found["bench"], found["machine"]) == ("benchmark result", "verify", "a cpu")
    for name in ("evaluation", "tasks"):
        part = Path(shutil.copytree(artefacts[name], tmp_path / name))
        (part / REPORT_FILE).unlink()
        found = facts(part)
        assert not found["complete"]
        assert "again" in found["missing"]


def test_a_demo_and_an_unfinished_checkpoint(artefacts: dict[str, Path], tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(artefacts["nested"], demo / "nested")
    shutil.copytree(artefacts["run"], demo / "lossy")
    found = facts(demo)
    assert (found["kind"], found["complete"]) == ("demo", False)
    assert found["parts"] == {"nested": "nested checkpoint", "verified": "missing", "lossy": "run"}
    assert found["missing"] == f"continue with: fq demo --out {demo}"
    shutil.copytree(artefacts["run"], demo / "verified")
    assert facts(demo)["complete"]
    shutil.rmtree(demo / "verified" / "policy")
    assert facts(demo)["parts"]["verified"] == "run, not complete"
    unfinished = tmp_path / ".out.unfinished"
    shutil.copytree(artefacts["nested"], unfinished / "start")
    write_json(unfinished / "start.json", "key")
    found = facts(unfinished)
    assert (found["kind"], found["complete"]) == ("unfinished checkpoint", False)
    assert "fq quantize" in found["missing"]


def test_rows_of_a_directory_name_the_directory(artefacts: dict[str, Path]) -> None:
    error = inspect(artefacts["tasks"] / "rows.jsonl").error
    assert f"is a part of what fq tasks wrote; name its directory, {artefacts['tasks']}" in error


def test_onnx_policy(artefacts: dict[str, Path], nested: NestedCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    policy = load_policy(artefacts["learned"])
    assert isinstance(policy, LearnedPolicy)
    path = tmp_path / ONNX_FILE
    write_onnx(policy, path)
    found = facts(path)
    assert (found["kind"], found["model_fingerprint"]) == ("ONNX policy", nested.fingerprint)
    assert (found["units"], found["bit_widths"]) == (["a", "b", "head"], [3, 4, 5, 6, 8])
    cut(path)
    assert "no readable policy" in inspect(path).error


@pytest.mark.parametrize(
    "name",
    [
        *("model", "nested", "learned", "static", "run", "sweep", "recording"),
        *("evaluation", "tasks", "costs.json", "bench.json"),
    ],
)
def test_lines_say_what_the_json_says(artefacts: dict[str, Path], name: str) -> None:
    *lines, last = inspect(artefacts[name]).out.splitlines()
    assert json.loads(last) == facts(artefacts[name])
    assert lines[:2] == [f"path: {artefacts[name]}", f"kind: {json.loads(last)['kind']}"]
    assert all(len(line) < 400 for line in lines)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def edit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def garble(path: Path) -> None:
    path.write_text("{ half")


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("model", "model.safetensors", cut, "damaged or cut short"),
        ("model", "config.json", garble, "not readable JSON"),
        ("model", "tokenizer.json", Path.unlink, "is not valid|tokenizer"),
        ("nested", "model.safetensors", edit, "the file was edited or damaged"),
        ("nested", "manifest.json", Path.unlink, "manifest.json is missing"),
        ("nested", "profile.json", garble, "no readable profile"),
        ("learned", "policy.safetensors", edit, "the file was edited or damaged"),
        ("learned", "profile.json", Path.unlink, "no readable policy"),
        ("static", "policy.json", garble, "no readable policy"),
        ("recording", "sequence-00001.safetensors", edit, "damaged"),
        ("recording", "recording.json", garble, "no readable recording"),
        ("run", "eval.jsonl", garble, "is not JSON"),
        ("run", "policy/policy.safetensors", cut, "policy"),
        ("run", "config.json", garble, "not readable JSON"),
        ("sweep", "config.json", garble, "not readable JSON"),
        ("tasks", "tasks.json", garble, "cannot be read as a plan of tasks"),
        ("tasks", "rows.jsonl", garble, "cannot be read as rows of tasks"),
        ("evaluation", "eval.jsonl", garble, "is not JSON"),
    ],
)
def test_damage_is_one_line(
    artefacts: dict[str, Path], tmp_path: Path, name: str, file: str, damage: Callable[[Path], None], message: str
) -> None:
    copied = Path(shutil.copytree(artefacts[name], tmp_path / name))
    if file == "tokenizer.json":
        (copied / "tokenizer_config.json").unlink()
    damage(copied / file)
    error = inspect(copied).error
    assert any(part in error for part in message.split("|")), error
    assert str(tmp_path) in error


def test_what_is_not_ours_is_one_line(artefacts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "rows.jsonl").write_text("")
    write_json(tmp_path / "costs.json", {"version": 1, "recording": "", "costs": {}})
    write_json(tmp_path / "bench.json", {"bench": "gemv", "rows": []})
    (tmp_path / "alone").mkdir()
    shutil.copy(artefacts["run"] / "profile.json", tmp_path / "alone")
    for name, message in (
        ("none", "does not exist"),
        ("empty", "holds none of policy.json, recording.json, analysis.json, ladder.json, tasks.json, config.json"),
        ("note.txt", "is no file of ours by its name"),
        ("list.json", "is no profile"),
        ("rows.jsonl", "holds no evaluation row"),
        ("costs.json", "no readable costs"),
        ("bench.json", "has no rows of a benchmark"),
        ("alone", "name its file itself"),
    ):
        error = inspect(tmp_path / name).error
        assert message in error
        assert str(tmp_path / name) in error
