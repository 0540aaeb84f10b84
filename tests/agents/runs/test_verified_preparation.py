"""Where a verified run takes its costs from: a profile that fits, or the clock, and a line that says which and why."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexquant_rl.agents.config import TrainConfig, VerifiedConfig
from flexquant_rl.agents.runs import verified_preparation
from flexquant_rl.agents.runs.clock_check import warn_of_clock
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.draft_timer import profiled_drafts
from flexquant_rl.engine.control.draft_times import DraftTimes
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig

COSTS = VerifyCosts("measured", 2.0, 2.0, (0.8, 1.0, 1.2, 1.4), (2.1, 2.2, 2.3, 2.4), 0.1, 0.05)
TIMES = DraftTimes((3, 4, 5, 6), 8, COSTS)
WANTED = VerifiedConfig(widths=(5, 3), depth=2)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> NestedCausalLM:
    return load_model(str(tiny_model_dir), QuantizationConfig())


@pytest.fixture
def profile(model: NestedCausalLM) -> Profile:
    decoder, _ = default_decoder(model)
    cost = replace(roofline_cost(model), source="measured", decoder=decoder, num_threads=1)
    zeros = torch.zeros(model.num_units, len(model.bit_widths))
    return Profile(cost, zeros, model.bit_widths, model.fingerprint, 9, "unquantised", TIMES)


def costs_of(config: TrainConfig, model: NestedCausalLM, run_dir: Path) -> VerifyCosts | None:
    return verified_preparation._profiled_costs(config, model, run_dir)


def test_levels_and_lengths_are_those_of_the_run(model: NestedCausalLM, profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.json")
    config = TrainConfig(task="verified", profile=str(tmp_path / "p.json"), verified=WANTED)
    found = costs_of(config, model, tmp_path / "run")
    assert found == replace(COSTS, draft_ms=(0.8, 1.2), verify_ms=(2.1, 2.2, 2.3))


def test_one_beside_the_model_counts_where_it_fits(
    model: NestedCausalLM, profile: Profile, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = TrainConfig(task="verified", model=str(home), verified=WANTED)
    assert costs_of(config, model, tmp_path / "run") is None
    assert capsys.readouterr().err == ""
    profile.save(home / "profile.json")
    assert costs_of(config, model, tmp_path / "run") is not None
    assert f"those of {home / 'profile.json'}" in capsys.readouterr().err
    assert costs_of(replace(config, latency="measured"), model, tmp_path / "run") is None
    replace(profile, drafts=None).save(home / "profile.json")
    assert costs_of(config, model, tmp_path / "run") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"drafts and passes are timed here, as {home / 'profile.json'} does not do: the profile has")


def test_one_that_is_named_must_fit(model: NestedCausalLM, profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    config = TrainConfig(task="verified", profile=str(path), verified=WANTED)
    wider = DraftTimes((4, 5, 6), 8, replace(COSTS, draft_ms=COSTS.draft_ms[1:]))
    two_threads = replace(profile, cost=replace(profile.cost, num_threads=2))
    foreign = replace(profile, fingerprint="e" * 64, cost=replace(profile.cost, fingerprint="e" * 64))
    for own, given, said in (
        (WANTED, replace(profile, drafts=None), "no times of drafts; run `fq profile` again"),
        (WANTED, replace(profile, drafts=wider), "no time of a draft at 3 bits; draft at some of 4, 5, 6"),
        (WANTED, two_threads, "give --threads 2"),
        (WANTED, foreign, f"of model {'e' * 12}"),
        (
            replace(WANTED, verify_width=6),
            profile,
            "times passes at 8 bits, and those of this run are at 6; verify at 8 bits",
        ),
        (replace(WANTED, depth=4), profile, "up to 3 drafts, and this run has up to 4; run `fq profile --depth 4`"),
    ):
        given.save(path)
        with pytest.raises(InputError) as caught:
            costs_of(replace(config, verified=own), model, tmp_path / "run")
        assert str(caught.value).startswith(f"{path}: ")
        assert said in str(caught.value)
        assert str(caught.value).endswith("or leave --profile out to have drafts timed here")


def test_the_decoder_that_was_recorded(model: NestedCausalLM, profile: Profile) -> None:
    decoder, _ = default_decoder(model)
    other = {"lean": "hf", "hf": "lean"}[decoder]
    assert profile.draft_times(model, decoder) == TIMES
    with pytest.raises(InputError, match=f"of the {decoder} decoder, and the recording of the {other} one"):
        profile.draft_times(model, other)


def test_every_stored_width_drafts_for_the_largest(model: NestedCausalLM) -> None:
    times = profiled_drafts(model, depth=2)
    assert times is not None
    assert (times.draft_widths, times.verify_width, times.depth) == ((3, 4, 5, 6), 8, 2)
    assert times.costs.controller_ms > 0
    assert times.shares()["pass_share_by_tokens"].keys() == {"1", "2", "3"}
    assert DraftTimes.from_dict(times.to_dict()) == times


@pytest.mark.parametrize(("round_ms", "said"), [(2.3, False), (1.8, False), (2.7, True), (1.4, True)])
def test_a_clock_that_disagrees_with_itself(round_ms: float, said: bool, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_clock(replace(COSTS, verify_ms=(round_ms, 3.0)), "wait")
    printed = capsys.readouterr().err
    assert ("a step took" in printed) == said == ("unreliable: wait" in printed)
