"""`fq combine` puts policies on one dial, and `fq generate` takes the rung that is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Finished, run, write_text

from flexquant_rl import cli
from flexquant_rl.agents.commands import combine
from flexquant_rl.agents.evaluation.budgets import Contestant
from flexquant_rl.agents.evaluation.wall_clock import ClockedShares
from flexquant_rl.agents.policies.knapsack import Knapsack
from flexquant_rl.agents.policies.unbound import PolicyContext
from flexquant_rl.engine.control.ladder import Ladder, Rung, read_ladder, write_ladder

SMALL = ("--env.prompt-tokens", 8, "--env.max-new-tokens", 8, "--sequences", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def combined(tiny_model_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    out = tmp_path_factory.mktemp("combined") / "out"
    policies = ("fixed:3", "fixed:8", "draft:3,length=2", "draft:3,verify=5")
    return out, run(cli.main, "combine", tiny_model_dir, out, "--policy", *policies, "--text", text, *SMALL)


def test_rungs_are_the_front_of_what_was_measured(combined: tuple[Path, Finished]) -> None:
    out, finished = combined
    found = finished.result
    every = [*found["rungs"], *found["left_out"]]
    assert sorted(rung["policy"] for rung in every) == ["draft:3,length=2", "draft:3,verify=5", "fixed:3", "fixed:8"]
    kl_nats = {rung["policy"]: rung["output_kl_nats"] for rung in every}
    assert kl_nats["draft:3,length=2"] == kl_nats["fixed:8"] < kl_nats["draft:3,verify=5"] < kl_nats["fixed:3"]
    modes = {rung["policy"]: (rung["mode"], rung["verify_width"]) for rung in every}
    assert modes["draft:3,length=2"] == ("lossless", 8)
    assert modes["draft:3,verify=5"] == ("verified", 5)
    assert modes["fixed:8"] == ("lossless", 8)
    assert modes["fixed:3"] == ("lossy", 3)
    ladder = read_ladder(out)
    assert {path.name for path in out.iterdir()} == {"ladder.json", *(rung.folder for rung in ladder.rungs)}
    inspected = run(cli.main, "inspect", out, "--json").result
    assert (inspected["kind"], len(inspected["rungs"])) == ("ladder of policies", len(ladder.rungs))


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Speeds of policies by name, in place of a clock; 1 of those that are not in it. Afterwards all asked are."""
    speeds: dict[str, float] = {}

    def shares(_prepared: object, contestants: Sequence[Contestant], _windows: object) -> ClockedShares:
        found = tuple(1 / speeds.setdefault(one.name, 1.0) for one in contestants)
        return ClockedShares(found, (0.0,) * len(found), 5)

    monkeypatch.setattr(combine, "clocked_shares", shares)
    return speeds


@pytest.mark.parametrize(("speed", "kept"), [(0.9, "fixed:8"), (1.1, "draft:3")])
def test_plain_decoding_is_a_rung_unless_something_lossless_is_faster(
    tiny_model_dir: Path, text: Path, tmp_path: Path, clocked: dict[str, float], speed: float, kept: str
) -> None:
    """Nobody asked for it."""
    clocked |= {"draft:3": speed, "fixed:4": 0.8}
    asked = ("--policy", "draft:3", "fixed:4", "--text", text, *SMALL)
    (rung,) = run(cli.main, "combine", tiny_model_dir, tmp_path / "out", *asked).result["rungs"]
    assert (rung["policy"], rung["mode"], rung["verify_width"]) == (kept, "lossless", 8)
    assert generate(tiny_model_dir, "--policy", tmp_path / "out", "--verify-width", 8).result["rung"] == rung


def test_plain_decoding_that_is_given_is_not_measured_twice(
    tiny_model_dir: Path, text: Path, tmp_path: Path, clocked: dict[str, float]
) -> None:
    exported = tmp_path / "exported"
    run(cli.main, "export", "fixed:8", exported, "--model", tiny_model_dir).result  # noqa: B018
    for place, given in enumerate(("fixed:bit_width=8", exported)):
        clocked.clear()
        asked = ("--policy", given, "--text", text, *SMALL)
        assert run(cli.main, "combine", tiny_model_dir, tmp_path / str(place), *asked).code == 0
        assert len(clocked) == 1


def test_what_is_bound_once_is_not_bound_again(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A knapsack takes its time."""
    solved: list[str] = []
    bind = Knapsack.bind

    def counted(self: Knapsack, context: PolicyContext) -> Any:
        solved.append(str(self))
        return bind(self, context)

    monkeypatch.setattr(Knapsack, "bind", counted)
    asked = ("--policy", "knapsack:4.5", "fixed:8", "--text", text, *SMALL)
    assert run(cli.main, "combine", tiny_model_dir, tmp_path / "out", *asked).code == 0
    assert len(solved) == 1


@pytest.fixture(scope="module")
def ladder(combined: tuple[Path, Finished], tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder with speeds that no clock decides."""
    fingerprint = read_ladder(combined[0]).model_fingerprint
    out = tmp_path_factory.mktemp("ladder") / "out"
    rungs = []
    for place, (name, mode, verify, speed, kl_nats) in enumerate(
        (
            ("draft:3,length=2", "lossless", 8, 1.2, 0.001),
            ("draft:3,verify=5", "verified", 5, 1.4, 0.01),
            ("fixed:3", "lossy", None, 1.8, 0.2),
        )
    ):
        run(cli.main, "export", name, out / f"{place:02d}", "--model", tiny_model_dir).result  # noqa: B018
        mode_known: Any = mode
        rungs.append(Rung(f"{place:02d}", name, mode_known, verify, None, speed, kl_nats))
    write_ladder(out, Ladder(fingerprint, "unquantised", 16, tuple(rungs)))
    return out


def generate(model: Path, *options: object) -> Finished:
    return run(cli.main, "generate", model, "--prompt", "abc abe", "--max-new-tokens", 6, *options)


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ((), "draft:3,length=2"),
        (("--speed", 1.1), "draft:3,length=2"),
        (("--speed", 1.3), "draft:3,verify=5"),
        (("--speed", 1.8), "fixed:3"),
        (("--verify-width", 5), "draft:3,verify=5"),
    ],
)
def test_generate_takes_the_rung(tiny_model_dir: Path, ladder: Path, options: tuple[object, ...], policy: str) -> None:
    finished = generate(tiny_model_dir, "--policy", ladder, *options)
    assert finished.result["rung"]["policy"] == policy
    assert f"{policy}, " in finished.err
    named = generate(tiny_model_dir, "--policy", policy)
    assert finished.out.splitlines()[0] == named.out.splitlines()[0], "the text is that of the policy itself"


def test_bad_input_is_one_line(tiny_model_dir: Path, ladder: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ladder, broken)
    shutil.rmtree(broken / "01")
    other = tmp_path / "other"
    shutil.copytree(ladder, other)
    data = json.loads((other / "ladder.json").read_text())
    (other / "ladder.json").write_text(json.dumps(data | {"version": 7}))
    combine = ("combine", tiny_model_dir)
    for arguments, words in (
        (("generate", tiny_model_dir, "--policy", ladder, "--prompt", "a", "--speed", 3), "beyond 1.80"),
        (("generate", tiny_model_dir, "--policy", ladder, "--prompt", "a", "--speed=-1"), "speed -1 must be positive"),
        (("generate", tiny_model_dir, "--policy", ladder, "--prompt", "a", "--speed", "nan"), "speed nan must be"),
        (("generate", tiny_model_dir, "--policy", ladder, "--prompt", "a", "--verify-width", 6), "choose one of 5, 8"),
        (("generate", tiny_model_dir, "--policy", ladder, "--prompt", "a", "--kl-weight", 6), "give --speed instead"),
        (("generate", tiny_model_dir, "--policy", broken, "--prompt", "a", "--speed", 1.3), "no readable policy"),
        (("generate", tiny_model_dir, "--policy", other, "--prompt", "a"), "version 7"),
        ((*combine, tmp_path / "x"), "--policy names no policy"),
        ((*combine, ladder, "--policy", "fixed:4"), "is not empty"),
        ((*combine, tmp_path / "x", "--policy", "random:4.5", "--text", text, *SMALL), "decides at every token"),
        ((*combine, tmp_path / "x", "--policy", "fixed:7", "--text", text, *SMALL), "7"),
    ):
        finished = run(cli.main, *arguments)
        assert finished.code == 2, arguments
        assert words in finished.err.splitlines()[-1]
        assert not (tmp_path / "x").exists()
