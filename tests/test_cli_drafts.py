"""`fq generate` with drafts: the text of the verify width, what the drafts came to, and mistakes in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Finished, run

from flexquant_rl import cli
from flexquant_rl.agents.commands.drafts import timed_threads
from flexquant_rl.agents.commands.servable import load_servable
from flexquant_rl.engine.control.artefact import load_policy, save_policy
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts, DraftsFacts, deploy_rule
from flexquant_rl.engine.control.drafting_rules import DraftingRule, FixedRounds, Lookups, Plain
from flexquant_rl.engine.control.verify_costs import modelled_costs
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.serving import Engine


@pytest.fixture(scope="module")
def nested(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nested") / "model"
    assert run(cli.main, "quantize", tiny_model_dir, out).code == 0
    return out


def generate(model: Path, *options: object) -> Finished:
    return run(cli.main, "generate", model, "--prompt", "abc abc", "--max-new-tokens", 24, *options)


def text(finished: Finished) -> str:
    assert finished.code == 0, finished.err
    return finished.out.rsplit("\n", 2)[0]


@pytest.mark.parametrize(("width", "ngram_drafts"), [(8, 0), (6, 4)])
@pytest.mark.parametrize("decoder", ["lean", "hf"])
def test_the_text_is_that_of_the_verify_width(nested: Path, width: int, ngram_drafts: int, decoder: str) -> None:
    drafted = generate(nested, "--verify-width", width, "--ngram-drafts", ngram_drafts, "--decoder", decoder)
    assert text(drafted) == text(generate(nested, "--policy", f"fixed:{width}", "--decoder", decoder))
    result = drafted.result
    assert (result["verify_width"], result["same_as_plain"]) == (width, True)
    assert result["speedup_modelled"] is None
    assert result["speedup_measured"] > 0
    passes = result["num_verify_passes"]
    assert result["tokens_per_pass"] == (result["num_tokens"] - 1) / passes
    assert 1 <= len(result["acceptance_by_position"]) <= 4
    assert "tokens per verify pass" in drafted.err
    assert f"measured over {width} bits without drafts (once, not in turns)" in drafted.err


@pytest.mark.parametrize("decoder", ["lean", "hf"])
@pytest.mark.parametrize(
    ("options", "width"),
    [
        (("--policy", "lookups"), 8),
        (("--policy", "lookups:verify=6,ngrams=4"), 6),
        (("--policy", "lookups", "--verify-width", 3), 3),
    ],
)
def test_lookups_alone_change_no_token(nested: Path, options: tuple[object, ...], width: int, decoder: str) -> None:
    looked_up = generate(nested, *options, "--decoder", decoder)
    assert text(looked_up) == text(generate(nested, "--policy", f"fixed:{width}", "--decoder", decoder))
    result = looked_up.result
    assert (result["verify_width"], result["same_as_plain"]) == (width, True)
    assert (result["num_draft_steps"], result["acceptance_by_position"]) == (0, [])
    assert result["num_found"] > 0


def test_lookups_alone_are_exported(nested: Path, tmp_path: Path) -> None:
    assert run(cli.main, "export", "lookups:ngrams=4", tmp_path / "out", "--model", nested).code == 0
    exported = generate(nested, "--policy", tmp_path / "out")
    assert exported.result["num_found"] == generate(nested, "--policy", "lookups:ngrams=4").result["num_found"] > 0


def test_a_directory_of_the_name_of_a_policy_is_meant(
    nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(cli.main, "export", "draft:3", tmp_path / "lookups", "--model", nested).code == 0
    monkeypatch.chdir(tmp_path)
    for options in ((), ("--verify-width", 8)):
        assert generate(nested, "--policy", "lookups", *options).result["num_draft_steps"] > 0


def test_sampled_text_is_that_of_its_seed(nested: Path) -> None:
    options = ("--policy", "draft:4,length=3", "--temperature", 1.2)
    first, again, other = (generate(nested, *options, "--seed", seed) for seed in (1, 1, 2))
    assert text(first) == text(again) != text(other)
    assert first.result["same_as_plain"] is None


def test_quiet_is_the_text_alone(nested: Path) -> None:
    finished = generate(nested, "--verify-width", 8, "--quiet")
    assert finished.out == text(generate(nested, "--verify-width", 8)) + "\n"
    assert "verify pass" not in finished.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "no policy is named; give --policy DIR or NAME, or --verify-width 8"),
        (("--verify-width", 7), "width 7 is not stored; choose one of 3, 4, 5, 6, 8"),
        (("--verify-width", 0), "--verify-width 0 is no width"),
        (("--verify-width", 3), "width=3 of the drafts is not below the verify width 3"),
        (("--policy", "draft:6", "--verify-width", 5), "width=6 of the drafts is not below the verify width 5"),
        (("--policy", "draft:3,verify=6", "--verify-width", 8), "name two widths; give one of them"),
        (("--policy", "draft:7"), "width 7 is not stored"),
        (("--policy", "draft:9"), "'draft:9': width=9 is no width, which is from 1 to 8"),
        (("--policy", "draft:3,verify=9"), "verify=9 is no width, which is from 1 to 8"),
        (("--verify-width", 9), "verify=9 is no width, which is from 1 to 8; choose one that the model stores"),
        (("--policy", "fixed:4", "--verify-width", 8), "--verify-width 8 is for drafts, and fixed:4 makes none"),
        (("--policy", "nowhere", "--verify-width", 8), "nowhere is not the directory of an exported policy"),
        (("--policy", ".", "--verify-width", 8), "no readable policy"),
        (("--policy", "fixd:4", "--verify-width", 8), "did you mean fixed:4?"),
        (("--policy", "fixed:4", "--ngram-drafts", 2), "--ngram-drafts 2 is for drafts, and fixed:4 makes none"),
        (("--verify-width", 8, "--ngram-drafts", 16), "--ngram-drafts=16 must be 0 to 15"),
        (("--policy", "draft:3,ngrams=2", "--ngram-drafts", 4), "name two numbers; give one of them"),
        (("--policy", "lookups:ngrams=2", "--ngram-drafts", 4), "name two numbers; give one of them"),
        (("--policy", "lookups:verify=6", "--verify-width", 8), "name two widths; give one of them"),
        (("--policy", "lookups", "--verify-width", 7), "width 7 is not stored"),
        (("--policy", "lookup:ngrams=4"), "did you mean lookups:ngrams=4?"),
        (("--policy", "draft:3", "--speed", 1.5), "--speed 1.5 sets a dial, and draft:3 has none"),
    ],
)
def test_mistakes(nested: Path, options: tuple[object, ...], said: str) -> None:
    assert said in generate(nested, *options).error


@pytest.fixture(scope="module")
def plain(nested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run exports where nothing that drafts is faster."""
    out = tmp_path_factory.mktemp("plain") / "policy"
    found = load_servable(str(nested), "draft:3")
    assert isinstance(found.policy, DeployedDrafts)
    own = found.policy
    widths = own.level_bit_widths, own.verify_bit_widths
    save_policy(deploy_rule("plain", own.schema, *widths, own.card, DraftsFacts(Plain())), found.profile, out)
    return out


def test_a_policy_that_never_drafts_says_so(nested: Path, plain: Path) -> None:
    finished = generate(nested, "--policy", plain)
    assert text(finished) == text(generate(nested, "--policy", "fixed:8"))
    assert "this policy never drafts" in finished.err
    assert "accepted" not in finished.err


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_a_policy_that_never_drafts_takes_no_ngram_drafts(nested: Path, plain: Path, command: str) -> None:
    rest = ("--prompt", "abc") if command == "generate" else ("--port", 0)
    refused = run(cli.main, command, nested, "--policy", plain, "--ngram-drafts", 2, *rest)
    assert f"--ngram-drafts 2 is for drafts, and {plain} makes none" in refused.error
    found = load_servable(str(nested), str(plain))
    with pytest.raises(InputError, match=f"ngram_drafts=2, but policy '{plain}' does not draft"):
        Engine(found.model, found.policy, found.profile, ngram_drafts=2)


def drafting_by_times(nested: Path, out: Path, config: dict[str, object], rule: DraftingRule, source: Any) -> Path:
    """What a run exports, the options of the run beside it."""
    found = load_servable(str(nested), "draft:3")
    assert isinstance(found.policy, DeployedDrafts)
    own = found.policy
    card = replace(own.card, config={**own.card.config, **config})
    costs = replace(modelled_costs((0.5,), (1.0, 1.1), depth=own.schema.depth), source=source)
    widths = own.level_bit_widths, own.verify_bit_widths
    save_policy(deploy_rule("tuned", own.schema, *widths, card, DraftsFacts(rule, costs), 2), found.profile, out)
    return out


@pytest.mark.parametrize(
    ("config", "rule", "source", "is_said"),
    [
        ({"device": "cpu", "threads": 2, "traces": "recording"}, FixedRounds(0, 2), "measured", True),
        ({"device": "cpu", "threads": 1, "traces": None}, FixedRounds(0, 2), "measured", False),
        ({"device": "cpu", "threads": None, "traces": None}, FixedRounds(0, 2), "measured", False),
        ({}, FixedRounds(0, 2), "measured", False),
        ({"device": "cpu", "threads": "2"}, FixedRounds(0, 2), "measured", False),
        ({"device": "cuda", "threads": 2}, FixedRounds(0, 2), "measured", False),
        ({"device": "cpu", "threads": 2}, FixedRounds(0, 2), "modelled", False),
        ({"device": "cpu", "threads": 2}, Lookups(), "measured", False),
        ({"device": "cpu", "threads": 2}, Plain(), "measured", False),
    ],
    ids=str,
)
def test_times_of_another_number_of_threads(
    nested: Path, tmp_path: Path, config: dict[str, object], rule: DraftingRule, source: str, is_said: bool
) -> None:
    """What was timed with two threads drafts too long with one, and nothing else would say so."""
    out = drafting_by_times(nested, tmp_path / "tuned", config, rule, source)
    said = f"{out} drafts by the times of --threads 2 and runs with 1, where other rounds may be faster"
    assert generate(nested, "--policy", out).err.count(said) == is_said
    assert said not in generate(nested, "--policy", out, "--decoder", "hf").err


def test_the_default_is_one_thread_where_the_run_recorded_itself(nested: Path, tmp_path: Path) -> None:
    for traces, threads in ((None, 1), ("recording", None)):
        config: dict[str, object] = {"device": "cpu", "threads": None, "traces": traces}
        out = drafting_by_times(nested, tmp_path / str(threads), config, FixedRounds(0, 2), "measured")
        policy = load_policy(out)
        assert isinstance(policy, DeployedDrafts)
        assert timed_threads(policy) == threads


def test_a_server_says_it_once(nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: Any = pytest.importorskip("flexquant_rl.agents.server.running", reason="needs the extra `serve`")

    async def stopped(app: object, served: Any, *others: object, **options: object) -> None:
        served.queue.stop(5.0)

    monkeypatch.setattr(running, "serve", stopped)
    config: dict[str, object] = {"device": "cpu", "threads": 2}
    out = drafting_by_times(nested, tmp_path / "tuned", config, FixedRounds(0, 2), "measured")
    finished = run(cli.main, "serve", nested, "--policy", out, "--port", 0)
    assert finished.code == 0, finished.err
    assert finished.err.count("drafts by the times of --threads 2 and runs with 1") == 1
