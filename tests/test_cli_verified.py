"""`train.py --task verified` on a tiny model: what it leaves, how it goes on, and what others do with its policies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Finished, leftovers, run, tree, write_sentences
from PIL import Image
from small_runs import TINY_DRAFTS, TINY_LEARNING, leave_out_the_clock, make_drafts_short

from flexquant_rl import cli, train
from flexquant_rl.agents.commands.drafts import timed_threads
from flexquant_rl.agents.runs import verified_preparation, verified_run
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.artefact import load_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.draft_limits import NGRAM_DRAFTS
from flexquant_rl.engine.control.draft_times import DraftTimes
from flexquant_rl.engine.control.drafting_rules import EVERY_RULE, RULES, FixedRounds, Plain, ProductStop
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.served_drafts import own_ngram_drafts
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.quantisation.config import QuantizationConfig

FILES = {"policy.json", "policy.safetensors", "profile.json"}


@pytest.fixture(scope="module")
def endless() -> Any:
    """No text ends early; what takes seconds is cut short."""
    with pytest.MonkeyPatch.context() as patch:
        make_drafts_short(patch)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    write_sentences(path, 120)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verified")


@pytest.fixture(scope="module")
def train_it(endless: None, tiny_model_dir: Path, text: Path) -> Callable[..., Finished]:
    start = ("--model", tiny_model_dir, "--text", text, *TINY_DRAFTS)
    return lambda *options: run(train.main, *start, *options)


@pytest.fixture(scope="module")
def finished(folder: Path, train_it: Callable[..., Finished]) -> Finished:
    return train_it("--run", folder / "run", "--seeds", 2)


class TestRun:
    def test_the_last_line(self, finished: Finished, folder: Path) -> None:
        result = finished.result
        assert result["run_dir"] == str(folder / "run")
        assert result["policy_dir"] == str(folder / "run" / "policy")
        assert (result["env_steps"], result["verify_width"], result["latency_source"]) == (256, 8, "measured")
        families = [row["family"] for row in result["rows"]]
        references = ("hindsight", "clairvoyant")
        assert families == ["plain", "lookups", *(kind.family for kind in RULES), "ppo", "ppo", *references]
        assert [row["seed"] for row in result["rows"] if row["family"] == "ppo"] == [0, 1]
        rows = {row["family"]: row for row in result["rows"]}
        for name, row in rows.items():
            assert row["speedup_low"] <= row["speedup_modelled"] * (1 + 1e-9)
            assert row["output_kl_nats"] == 0
            assert (row["speedup_measured"] is None) == (name in references)
            assert (row["speedup_modelled_clocked"] is None) == (name in references)
            assert row["speedup_modelled"] <= rows["clairvoyant"]["speedup_modelled"] + 1e-9
        said = " ".join(result["findings"])
        assert "the learned policy (2 training seeds)" in said
        assert "the best fixed rounds, fixed:width=" in said
        assert "the best tuned rule, " in said
        assert "exported is " in said
        assert "rounds that end behind the first wrong draft" in said
        assert "by what they see, means over seeds" in said
        card = load_policy(folder / "run" / "seeds" / "1" / "policy").card
        assert set(card.config["scores"]["curves"]) == {"confidences", "signals"}

    def test_policies_carry_what_they_look_up(self, finished: Finished, folder: Path) -> None:
        depth = finished.result["costs"]["verify_ms"][1:]
        for name in ("rules/lookups", "rules/fixed", "seeds/0/policy"):
            assert own_ngram_drafts(load_policy(folder / "run" / name)) == min(NGRAM_DRAFTS, len(depth)), name
        assert own_ngram_drafts(load_policy(folder / "run" / "rules" / "plain")) == 0

    def test_policies_carry_the_threads_of_their_times(self, finished: Finished, folder: Path) -> None:
        policy = load_policy(folder / "run" / "seeds" / "0" / "policy")
        assert isinstance(policy, DeployedDrafts)
        assert {"device", "threads", "traces"} <= policy.card.config.keys()
        assert timed_threads(policy) == 1, "the default of the lean decoder"

    def test_a_run_from_before_anything_was_looked_up(self, finished: Finished, folder: Path, tmp_path: Path) -> None:
        """Its configuration does not say so, and none of its policies does; those of another number are refused."""
        copy = tmp_path / "run"
        shutil.copytree(folder / "run", copy)
        config = json.loads((copy / "config.json").read_text())
        assert config["config"]["verified"].pop("ngram_drafts") == NGRAM_DRAFTS
        (copy / "config.json").write_text(json.dumps(config))
        refused = run(train.main, "--resume", copy).error
        assert "tokens, but the run 0 (verified.ngram_drafts); delete" in refused

    def test_acceptance_is_shown_first(self, finished: Finished, folder: Path) -> None:
        assert finished.out.startswith("acceptance of drafts. By place in the round")
        assert max(map(len, finished.out.splitlines()[: finished.out.splitlines().index("")])) <= 110
        report = (folder / "run" / "report.md").read_text()
        parts = [line for line in report.splitlines() if line.startswith("## ")]
        assert parts[0] == "## How acceptance is spread"
        assert parts[1] == "## Result"
        assert "](drafts.png)" in report
        assert "are verified at once, under every policy but plain decoding" in report
        assert "With 2 training seeds nothing is said about another training" in report

    def test_what_is_left(self, finished: Finished, folder: Path) -> None:
        assert finished.code == 0
        files = tree(folder / "run")
        assert {"config.json", "costs.json", "eval.jsonl", "report.md", "drafts.png"} <= files.keys()
        rules = [f"rules/{kind.family}" for kind in EVERY_RULE]
        places = ["policy", "seeds/0/policy", "seeds/1/policy", *rules]
        assert {f"{place}/{name}" for place in places for name in FILES} <= files.keys()
        assert leftovers(files) == []
        lines = [json.loads(line) for line in (folder / "run" / "eval.jsonl").read_text().splitlines()]
        assert [line["policy"] for line in lines] == [row["policy"] for row in finished.result["rows"]]
        assert {len(line["sequence_time_steps"]) for line in lines} == {lines[0]["num_sequences"]}
        with Image.open(folder / "run" / "drafts.png") as image:
            assert image.format == "PNG"
            assert min(image.size) > 300

    def test_what_is_exported_is_the_fastest_on_validation(self, finished: Finished, folder: Path) -> None:
        chosen = load_policy(folder / "run" / "policy")
        assert isinstance(chosen, DeployedDrafts)
        speeds = [row["speedup_validation"] for row in finished.result["rows"] if row["speedup_validation"]]
        assert chosen.facts.speedup_validation == max(speeds)

    def test_a_resume_repeats_nothing(self, finished: Finished, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("tuned", "train_drafts"):
            monkeypatch.setattr(verified_run, name, lambda *_, **__: pytest.fail("done before"))
        leave_out_the_clock(monkeypatch)
        again = run(train.main, "--resume", folder / "run").result
        columns = ("policy", "seed", "speedup_modelled", "speedup_validation")
        for row, before in zip(again["rows"], finished.result["rows"], strict=True):
            assert [row[name] for name in columns] == [before[name] for name in columns]

    def test_costs_of_another_recording(self, finished: Finished, folder: Path) -> None:
        assert finished.code == 0
        path = folder / "run" / "costs.json"
        whole = path.read_text()
        try:
            path.write_text(json.dumps(json.loads(whole) | {"recording": "other"}))
            assert "is of another recording than this run's" in run(train.main, "--resume", folder / "run").error
            path.write_text(json.dumps(json.loads(whole) | {"version": 1}))
            refused = run(train.main, "--resume", folder / "run").error
            assert "start a new run, with --traces" in refused
            assert "delete it" not in refused
            shorter = json.loads(whole)
            shorter["costs"]["verify_ms"] = shorter["costs"]["verify_ms"][:1]
            path.write_text(json.dumps(shorter))
            short = run(train.main, "--resume", folder / "run").error
            assert short.startswith(f"{path}: costs of 2 levels and passes over up to 1 tokens")
            assert short.endswith("delete it to have drafts and passes timed again")
            path.write_text("{}")
            assert "no readable costs" in run(train.main, "--resume", folder / "run").error
        finally:
            path.write_text(whole)


def test_an_interruption_changes_nothing(
    finished: Finished, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the second seed trains; its costs are those of the run that was not."""
    source, copy = folder / "run", tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "costs.json"):
        (copy / name).write_bytes((source / name).read_bytes())
    for name in ("traces", "rules"):
        shutil.copytree(source / name, copy / name)
    shutil.rmtree(copy / "rules" / "confidence")
    leave_out_the_clock(monkeypatch)
    whole = verified_run.train_drafts

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if options["seed"] == 1:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(verified_run, "train_drafts", interrupted)
    stopped = run(train.main, "--resume", copy)
    assert stopped.code == 130
    assert f"--resume {copy}" in stopped.err
    assert (copy / "seeds" / "0" / "policy" / "policy.json").is_file()
    monkeypatch.setattr(verified_run, "train_drafts", whole)
    assert run(train.main, "--resume", copy).code == 0
    for name in ("seeds/0/policy", "seeds/1/policy", "rules/confidence", "policy"):
        for file in ("policy.safetensors", "profile.json"):
            assert (copy / name / file).read_bytes() == (source / name / file).read_bytes(), name


def test_a_recording_that_exists(
    finished: Finished,
    folder: Path,
    train_it: Callable[..., Finished],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert finished.code == 0
    traces = folder / "run" / "traces"
    error = train_it("--traces", traces, "--run", tmp_path / "run").error
    assert "--verified.tokens is for a recording made here" in error
    own = [option for option in TINY_DRAFTS if not str(option).startswith("--verified.tokens")][2:]
    learning = own[own.index("--env-steps") :]
    monkeypatch.setattr(verified_run, "EVERY_RULE", (Plain, FixedRounds, ProductStop))
    leave_out_the_clock(monkeypatch)
    start = ("--model", tiny_model_dir, "--task", "verified", *learning, "--verified.live-prompts", 0)
    taken = run(train.main, *start, "--traces", traces, "--run", tmp_path / "run", "--seeds", 1).result
    assert all(row["speedup_measured"] is None for row in taken["rows"])
    assert not (tmp_path / "run" / "traces").exists()


def test_times_of_a_profile(
    finished: Finished, folder: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is timed then, and a resume needs no more than what the run has kept."""
    assert finished.code == 0
    model = load_model(str(tiny_model_dir), QuantizationConfig())
    costs = VerifyCosts("measured", 2.0, 2.0, (0.8, 1.0, 1.2), (2.1, 2.2, 2.3, 2.4), 0.1, 0.05)
    cost = replace(roofline_cost(model), source="measured", decoder=default_decoder(model)[0], num_threads=1)
    zeros = torch.zeros(model.num_units, len(model.bit_widths))
    times = DraftTimes((3, 4, 5), 8, costs)
    given = Profile(cost, zeros, model.bit_widths, model.fingerprint, 9, "unquantised", times)
    given.save(tmp_path / "given.json")
    monkeypatch.setattr(verified_run, "EVERY_RULE", (Plain, FixedRounds, ProductStop))
    monkeypatch.setattr(verified_preparation, "timed_drafts", lambda *_, **__: pytest.fail("the profile has them"))
    leave_out_the_clock(monkeypatch)
    start = ("--model", tiny_model_dir, "--task", "verified", *TINY_LEARNING, "--seeds", 1)
    options = ("--traces", folder / "run" / "traces", "--profile", tmp_path / "given.json", "--run", tmp_path / "run")
    result = run(train.main, *start, *options).result
    want = replace(costs, draft_ms=(0.8, 1.2), verify_ms=(2.1, 2.2, 2.3)).to_dict()
    assert VerifyCosts.from_dict(result["costs"]) == VerifyCosts.from_dict(want)
    assert "| source of these costs | measured by fq profile |" in (tmp_path / "run" / "report.md").read_text()
    assert "measured by this run" in (folder / "run" / "report.md").read_text()
    (tmp_path / "given.json").unlink()
    for kept in ("costs.json", "profile.json"):  # either of them is enough
        (tmp_path / "run" / kept).unlink()
        again = run(train.main, "--resume", tmp_path / "run").result
        assert again["costs"] == result["costs"]
        assert [row["policy"] for row in again["rows"]] == [row["policy"] for row in result["rows"]]


def test_levels_between_stored_widths(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A knapsack of a profile drafts: recorded, timed, learned from and exported as one level of several."""
    profile = tmp_path / "profile.json"
    run(cli.main, "profile", tiny_model_dir, "--source", "roofline", "--text", text, "--out", profile)
    monkeypatch.setattr(verified_run, "EVERY_RULE", (Plain, FixedRounds))
    leave_out_the_clock(monkeypatch)
    start = ("--model", tiny_model_dir, "--text", text, *TINY_DRAFTS, "--seeds", 1, "--run", tmp_path / "run")
    finished = run(train.main, *start, "--verified.widths", 3.5, 5, "--profile", profile)
    assert finished.code == 0, finished.err
    assert "no times of drafts between stored widths" in finished.err
    policy = load_policy(tmp_path / "run" / "seeds" / "0" / "policy")
    assert isinstance(policy, DeployedDrafts)
    assert len(set(policy.level_bit_widths[0].tolist())) > 1
    assert set(policy.level_bit_widths[1].tolist()) == {5}
    assert "| 3.5 |" in (tmp_path / "run" / "report.md").read_text()


def test_policies_are_exported_and_generate(finished: Finished, folder: Path, tiny_model_dir: Path) -> None:
    """The run's own policy, one of its rules, and drafts by name."""
    assert finished.code == 0
    model = ("--model", tiny_model_dir)
    for name, command in (
        ("chosen", (folder / "run", folder / "chosen")),
        ("rule", (folder / "run" / "rules" / "confidence", folder / "rule")),
        ("named", ("draft:3,length=2,confidence=0.3", folder / "named", *model)),
    ):
        exported = run(cli.main, "export", *command).result
        assert exported["out"] == str(folder / name)
        assert {path.name for path in (folder / name).iterdir()} == FILES
    prompt = ("--prompt", "the cat sat", "--max-new-tokens", 24)
    plain = run(cli.main, "generate", tiny_model_dir, "--policy", "fixed:8", *prompt)
    for name in ("run", "chosen", "rule", "named"):
        # What the run has chosen may be plain decoding, which has nothing to compare and takes no n-gram drafts.
        ngrams = () if name in ("run", "chosen") else ("--ngram-drafts", 2)
        drafted = run(cli.main, "generate", tiny_model_dir, "--policy", folder / name, *ngrams, *prompt)
        assert drafted.result.get("same_as_plain", name in ("run", "chosen")) is True
        assert drafted.out.rsplit("\n", 2)[0] == plain.out.rsplit("\n", 2)[0]
    error = run(cli.main, "generate", tiny_model_dir, "--policy", folder / "rule", "--verify-width", 6, *prompt).error
    assert "verifies at 8; leave the option out" in error


def test_what_a_run_left_is_said(finished: Finished, folder: Path) -> None:
    run_dir = folder / "run"
    said = run(cli.main, "inspect", run_dir).result
    assert (said["kind"], said["task"], said["missing"]) == ("run", "verified", None)
    rows = said["rows"]["eval.jsonl"]
    assert {"plain", "fixed", "ppo", "clairvoyant"} <= set(rows["policies"])
    assert rows["verify_width"] == 8
    assert said["model_fingerprint"] == said["policy"]["model_fingerprint"]
    policy = run(cli.main, "inspect", run_dir / "policy").result
    assert (policy["kind"], policy["mode"]) == ("policy of drafts", "verified")
    assert policy["drafts"]["verify_width"] == 8


def test_both_modes_in_one_table(finished: Finished, folder: Path, tiny_model_dir: Path, text: Path) -> None:
    assert finished.code == 0
    policies = ("fixed:6", "fixed:8", "draft:3,length=2", "draft:3,length=2,verify=6", folder / "run")
    options = ("--text", text, "--sequences", 3, "--env.prompt-tokens", 8, "--env.max-new-tokens", 6)
    out = folder / "compared"
    done = run(
        cli.main,
        "evaluate",
        tiny_model_dir,
        "--policy",
        *policies,
        *options,
        "--latency",
        "roofline",
        "--out",
        out,
    )
    rows = {row["policy"]: row for row in done.result["rows"]}
    assert len(rows) == 5
    for name, width in (("draft:3,length=2", 8), ("draft:3,length=2,verify=6", 6), (str(folder / "run"), 8)):
        row, base = rows[name], rows[f"fixed:{width}"]
        for column in ("output_kl_nats", "perplexity", "top1_agreement", "mean_bit_width"):
            assert row[column] == base[column]
        assert row["time_share_modelled"] is None
        assert row["speedup_measured"] > 0
    assert {path.name for path in out.iterdir()} == {"eval.jsonl", "report.md", "pareto.png"}
    report = (out / "report.md").read_text()
    assert "Drafts lose nothing against their verify width" in report
    assert "Every policy is run at the settings that were asked for" in report
    assert "not modelled" in report


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--task", "verified", "--oracle-samples", 4),
            "--oracle-samples 4 is for --task lossy, and the task is verified",
        ),
        (("--task", "verified", "--ppo.gamma", 0.5), "--ppo.* is for --task lossy"),
        (("--traces", "somewhere"), "--traces somewhere is for --task verified, and the task is lossy"),
        (("--verified.depth", 4), "--verified.* is for --task verified"),
        (("--task", "verified", "--latency", "roofline"), "--latency roofline counts the bytes of a step"),
        (("--task", "verified", "--traces", "nowhere"), "no readable recording"),
        (("--task", "verified", "--verified.depth", 0), "verified.depth=0 must be at least 1"),
        (("--task", "verified", "--verified.live-prompts", -1), "verified.live_prompts=-1 must not be negative"),
        (("--task", "verified", "--verified.ppo.gamma", 2), "verified.ppo.gamma=2 must be from 0 to 1"),
        (("--task", "verified", "--verified.depth", 99), "depth=99 must be 1 to 15"),
        (("--task", "verified", "--verified.widths", 8), "must be one or more below the verify width"),
    ],
)
def test_mistakes(options: tuple[object, ...], said: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    error = run(train.main, "--model", tiny_model_dir, "--run", tmp_path / "run", *options).error
    assert said in error
    assert not (tmp_path / "run").exists()


def test_rules_and_runs_are_told_apart(finished: Finished, folder: Path, tmp_path: Path) -> None:
    assert finished.code == 0
    for options, said in (
        ((folder / "run" / "rules", tmp_path / "a"), "is not a run"),
        ((folder / "run" / "rules" / "fixed", tmp_path / "a", "--model", "x"), "--model is for a policy by name"),
        (("draft:3", tmp_path / "a"), "name the model with --model"),
        (("draft:0", tmp_path / "a"), "width=0 is no width"),
    ):
        assert said in run(cli.main, "export", *options).error
    assert not (tmp_path / "a").exists()
