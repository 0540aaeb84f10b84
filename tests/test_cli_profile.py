"""Profiles as an option of commands: their latencies count, their threads must match, and a run keeps its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import TINY_EPISODES, TINY_RUN, Finished, run, tree, write_text
from small_runs import make_quick, no_clock

from flexquant_rl import cli, train
from flexquant_rl.agents.evaluation.wall_clock import ClockedShares
from flexquant_rl.engine.checkpoint import load_model, save_checkpoint
from flexquant_rl.engine.control import runner
from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig

FOUR_BIT_SPEEDUP = (1 + 3) / (1 + 1.5)  # by `measured_profile`


@dataclass(frozen=True)
class Inputs:
    """A plain model with text, a measured profile and an exported policy of it whose own profile is a roofline."""

    model: Path
    text: Path
    profile: Path
    policy: Path


def measured_profile(model: NestedCausalLM, *, num_threads: int = 1) -> Profile:
    """Three units of b / 8 ms at width b, and a fixed millisecond."""
    decoder, _ = default_decoder(model)
    widths = torch.tensor(model.bit_widths, dtype=torch.float64)
    cost = replace(
        roofline_cost(model),
        source="measured",
        fixed_ms=1.0,
        unit_ms=(widths / 8).expand(model.num_units, -1).clone(),
        decoder=decoder,
        num_threads=num_threads,
        error_p50=0.01,
        error_p95=0.02,
    )
    return Profile(cost, sensitivities(model), model.bit_widths, model.fingerprint, 9, "unquantised")


def sensitivities(model: NestedCausalLM) -> torch.Tensor:
    rising = torch.tensor([0.5, 0.1, 0.03, 0.01, 0.0])
    return rising * torch.linspace(1, 2, model.num_units)[:, None]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> NestedCausalLM:
    return load_model(str(tiny_model_dir), QuantizationConfig())


@pytest.fixture(scope="module")
def inputs(tiny_model_dir: Path, model: NestedCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    measured_profile(model).save(folder / "profile.json")
    schema = SignalSchema(model.num_units, model.bit_widths)
    torch.manual_seed(1)
    net = PrecisionNet(schema)
    torch.nn.init.normal_(net.width_head.weight, std=3.0)  # so that what it sees decides
    names = tuple(unit.name for unit in model.units)
    config = {"quantization": asdict(QuantizationConfig())}
    card = PolicyCard(schema, model.fingerprint, names, (DialPoint(30.0, 1.5, 0.05, 5.0),), config)
    carried = replace(measured_profile(model), cost=roofline_cost(model))
    save_policy(LearnedPolicy(net, card), carried, folder / "policy")
    return Inputs(tiny_model_dir, write_text(folder / "text.txt"), folder / "profile.json", folder / "policy")


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)


def evaluate(inputs: Inputs, *options: object, policies: tuple[object, ...] = ("fixed:4",)) -> Finished:
    arguments = ("--text", inputs.text, *TINY_EPISODES, "--sequences", 2, "--dials", 1, "--policy", *policies)
    return run(cli.main, "evaluate", inputs.model, *arguments, *options)


class TestEvaluate:
    def test_latencies_of_the_profile_count(self, inputs: Inputs) -> None:
        plain = evaluate(inputs, "--latency", "roofline").result
        measured = evaluate(inputs, "--profile", inputs.profile).result
        assert (plain["latency_source"], measured["latency_source"]) == ("roofline", "measured")
        assert measured["rows"][0]["speedup_modelled"] == pytest.approx(FOUR_BIT_SPEEDUP)
        assert plain["rows"][0]["speedup_modelled"] != pytest.approx(FOUR_BIT_SPEEDUP, rel=0.05)
        assert measured["rows"][0]["output_kl_nats"] == plain["rows"][0]["output_kl_nats"]

    def test_a_policy_goes_on_seeing_the_profile_that_it_carries(self, inputs: Inputs) -> None:
        policies = ("fixed:4", inputs.policy)
        plain = evaluate(inputs, "--env.kl-weight", 30, policies=policies).result["rows"]
        options = ("--profile", inputs.profile, "--env.kl-weight", 30)
        measured = evaluate(inputs, *options, policies=policies).result["rows"]
        assert measured[0]["speedup_modelled"] == pytest.approx(FOUR_BIT_SPEEDUP)
        assert 3 < plain[1]["mean_bit_width"] < 8
        for field in ("mean_bit_width", "output_kl_nats", "kl_weight"):
            assert measured[1][field] == plain[1][field]
        assert measured[1]["speedup_modelled"] != plain[1]["speedup_modelled"]

    def test_rows_name_the_reference_that_was_there(
        self, inputs: Inputs, model: NestedCausalLM, tmp_path: Path
    ) -> None:
        """The policy's profile knows another than a checkpoint that holds no unquantised weights."""
        save_checkpoint(model, tmp_path / "nested")
        nested = replace(inputs, model=tmp_path / "nested")
        assert evaluate(inputs, policies=(inputs.policy,)).result["reference"] == "unquantised"
        assert evaluate(nested, policies=(inputs.policy,)).result["reference"] == "8-bit"


@pytest.fixture(scope="module")
def trained(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A finished run with a measured profile whose file is gone since."""
    folder = tmp_path_factory.mktemp("trained")
    given = shutil.copyfile(inputs.profile, folder / "given.json")
    options = ("--profile", given, "--text", inputs.text, "--run", folder / "run", "--seeds", 1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_quick(monkeypatch)
        finished = run(train.main, "--model", inputs.model, *options, *TINY_RUN)
    given.unlink()
    return folder / "run", finished


class TestTrain:
    def test_trains_and_compares_by_the_profile(self, trained: tuple[Path, Finished], inputs: Inputs) -> None:
        run_dir, finished = trained
        assert finished.result["latency_source"] == "measured"
        shared = [row for row in finished.result["rows"] if row["policy"].startswith("fixed:4+")]
        assert shared, "a budget between two fixed widths"
        for row in shared:
            # The time of a mix follows from its mean width where every bit takes the same time.
            assert row["time_share_modelled"] == pytest.approx(row["time_budget"])
            assert row["speedup_modelled"] < FOUR_BIT_SPEEDUP
        assert "profiling" not in finished.err, "the sensitivities are the profile's too"
        assert "| profile source | measured |" in (run_dir / "report.md").read_text()
        assert (run_dir / "profile.json").read_bytes() == inputs.profile.read_bytes()

    def test_what_is_exported_says_so(self, trained: tuple[Path, Finished], inputs: Inputs, tmp_path: Path) -> None:
        assert run(cli.main, "export", trained[0], tmp_path / "policy").code == 0
        assert (tmp_path / "policy" / "profile.json").read_bytes() == inputs.profile.read_bytes()
        config = json.loads((tmp_path / "policy" / "policy.json").read_text())["config"]
        assert Path(config["profile"]).name == "given.json"
        result = evaluate(inputs, policies=("fixed:4", tmp_path / "policy")).result
        assert result["latency_source"] == "measured"
        assert result["rows"][0]["speedup_modelled"] == pytest.approx(FOUR_BIT_SPEEDUP)

    def test_a_resume_needs_only_what_the_run_has_kept(
        self, trained: tuple[Path, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_quick(monkeypatch)
        run_dir = shutil.copytree(trained[0], tmp_path / "run")
        (run_dir / "static_front.safetensors").unlink()
        shutil.rmtree(run_dir / "policy")
        finished = run(train.main, "--resume", run_dir)
        assert finished.result["rows"] == trained[1].result["rows"]
        for name in ("static_front.safetensors", "policy/policy.json"):
            assert (run_dir / name).read_bytes() == (trained[0] / name).read_bytes()

    def test_a_resume_refuses_another_profile(
        self, trained: tuple[Path, Finished], inputs: Inputs, model: NestedCausalLM, tmp_path: Path
    ) -> None:
        finished = run(train.main, "--resume", trained[0], "--profile", inputs.profile)
        assert finished.error == (
            f"--resume continues a run as it was started, but profile={inputs.profile} was given too; leave it out"
        )
        run_dir = shutil.copytree(trained[0], tmp_path / "run")
        profile = measured_profile(model)
        replace(profile, cost=replace(profile.cost, fixed_ms=2.0)).save(run_dir / "profile.json")
        assert run(train.main, "--resume", run_dir).error == (
            f"{run_dir / 'profile.json'} is not the profile that this run was started with; put that one back, or "
            "start a new run"
        )


def other_model(profile: Profile) -> Profile:
    cost = replace(profile.cost, fingerprint="e" * 64)
    return replace(profile, fingerprint="e" * 64, cost=cost)


def torn(profile: Profile) -> Profile:
    return replace(profile, sensitivity=profile.sensitivity[1:])


def not_finite(profile: Profile) -> Profile:
    return replace(profile, sensitivity=profile.sensitivity / 0)


def other_device(profile: Profile) -> Profile:
    return replace(profile, cost=replace(profile.cost, device="cuda"))


def two_threads(profile: Profile) -> Profile:
    return replace(profile, cost=replace(profile.cost, num_threads=2))


MISTAKES: dict[str, tuple[Callable[[Profile], Profile], str, str]] = {
    "another model": (other_model, f"of model {'e' * 12}", "run `fq profile` on this model"),
    "torn": (torn, "not finite ones of 3 units at widths [3, 4, 5, 6, 8]", "run `fq profile` again"),
    "not finite": (not_finite, "not finite ones of 3 units", "run `fq profile` again"),
    "another device": (other_device, "measured on cuda", "; run `fq profile` again"),
    "two threads": (two_threads, "2 threads", "give --threads 2 or run `fq profile` again"),
}


class TestMistakes:
    def check(self, inputs: Inputs, profile: Path, value: str, fix: str, tmp_path: Path) -> None:
        options = ("--text", inputs.text, "--run", tmp_path / "new" / "run", *TINY_RUN, "--profile", profile)
        before = tree(tmp_path)
        for finished in (
            evaluate(inputs, "--profile", profile),
            run(train.main, "--model", inputs.model, *options),
        ):
            assert value in finished.error
            assert fix in finished.error
            assert tree(tmp_path) == before, "no half run is left behind"

    @pytest.mark.parametrize("name", MISTAKES)
    def test_a_profile_that_does_not_fit(
        self, name: str, inputs: Inputs, model: NestedCausalLM, tmp_path: Path
    ) -> None:
        damage, value, fix = MISTAKES[name]
        damage(measured_profile(model)).save(tmp_path / "profile.json")
        self.check(inputs, tmp_path / "profile.json", value, fix, tmp_path)

    @pytest.mark.parametrize(
        ("content", "value"),
        [("{", "no readable profile"), ("[]", "profile version None"), ('{"version": 1}', "profile version 1")],
        ids=str,
    )
    def test_a_file_that_is_no_profile(self, content: str, value: str, inputs: Inputs, tmp_path: Path) -> None:
        (tmp_path / "profile.json").write_text(content)
        self.check(inputs, tmp_path / "profile.json", value, "run `fq profile`", tmp_path)

    def test_no_file(self, inputs: Inputs, tmp_path: Path) -> None:
        self.check(inputs, tmp_path / "nothing.json", "nothing.json: no readable profile", "fq profile", tmp_path)

    def test_threads(self, inputs: Inputs, tmp_path: Path) -> None:
        fix = "give e.g. --threads 1"
        generation = ("--policy", inputs.policy, "--prompt", "abc")
        for main, arguments in (
            (cli.main, ("profile", inputs.model, "--out", tmp_path / "p.json")),
            (cli.main, ("generate", inputs.model, *generation)),
            (cli.main, ("evaluate", inputs.model)),
            (cli.main, ("bench", "decode")),
            (train.main, ("--model", inputs.model, "--run", tmp_path / "run")),
        ):
            error = run(main, *arguments, "--threads", 100_000).error
            assert error.startswith("threads=100000 must be within 1..")
            assert error.endswith(fix)
        finished = run(cli.main, "profile", inputs.model, "--source", "roofline", "--threads", 1, "--out", "p.json")
        assert finished.error.endswith(
            "--threads 1 is for measured steps and --source roofline times none; leave it out"
        )
        finished = run(cli.main, "profile", inputs.model, "--source", "roofline", "--depth", 4, "--out", "p.json")
        assert finished.error.startswith("--depth 4 is for measured steps")
        finished = run(cli.main, "profile", inputs.model, "--depth", 16, "--out", tmp_path / "p.json")
        assert finished.error == "--depth 16 must be 1 to 15 drafts of a round, or 0 to time none"
        assert tree(tmp_path) == {}


@pytest.mark.usefixtures("two_processors")
class TestThreads:
    def test_profile_and_evaluation(self, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def one_millisecond(step: Callable[[], object], device: torch.device) -> float:
            step()
            return 1.0

        path = tmp_path / "profile.json"
        with monkeypatch.context() as patch:
            patch.setattr(runner, "clock_ms", one_millisecond)
            options = ("--text", inputs.text, "--steps", 40, "--threads", 2, "--out", path)
            result = run(cli.main, "profile", inputs.model, *options).result
        cost = Profile.load(path).cost
        assert (result["decoder"], result["num_threads"]) == (cost.decoder, cost.num_threads) == (cost.decoder, 2)
        assert "2 threads" in evaluate(inputs, "--profile", path).error
        seen: list[int | None] = []

        def spy(*args: Any, num_threads: int | None, **_: object) -> ClockedShares:
            seen.append(num_threads)
            return no_clock(*args)

        profile = Profile.load(path)  # at one time for all widths there is nothing to choose
        unit_ms = profile.cost.unit_ms + torch.tensor(profile.bit_widths, dtype=torch.float64)
        replace(profile, cost=replace(profile.cost, unit_ms=unit_ms)).save(path)
        monkeypatch.setattr("flexquant_rl.agents.evaluation.contest.measured_time_shares", spy)
        assert evaluate(inputs, "--profile", path, "--threads", 2).result["latency_source"] == "measured"
        assert seen == [2]

    def test_generated_text_is_the_same(self, inputs: Inputs) -> None:
        arguments = ("--policy", inputs.policy, "--prompt", "abc abc", "--max-new-tokens", 5)
        texts = [
            run(cli.main, "generate", inputs.model, *arguments, "--threads", n).out.splitlines()[:-1] for n in (1, 2)
        ]
        assert texts[0] == texts[1] != []


class TestDefaultModel:
    """`default` means the embedded model everywhere; here a tiny one stands in for it."""

    @pytest.fixture(autouse=True)
    def _embedded(self, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flexquant_rl.engine.embedded.embedded_model_path", lambda: inputs.model)
        monkeypatch.chdir(tmp_path)

    def test_commands(self, inputs: Inputs, tmp_path: Path) -> None:
        embedded = replace(inputs, model=Path("default"))
        assert evaluate(embedded).result["rows"] != []
        assert run(cli.main, "quantize", "default", "nested").code == 0
        generation = ("--policy", inputs.policy, "--prompt", "abc", "--max-new-tokens", 2)
        assert run(cli.main, "generate", "default", *generation).result["num_tokens"] == 2
        before = tree(inputs.model)
        profiling = ("--text", inputs.text, "--source", "roofline")
        assert run(cli.main, "profile", "default", *profiling).result["profile"] == "profile.json"
        assert Profile.load(tmp_path / "profile.json").num_tokens > 0
        assert tree(inputs.model) == before, "nothing is written into the package"

    def test_training(self, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
        make_quick(monkeypatch)
        options = ("--model", "default", "--text", inputs.text, "--seeds", 1)
        run_dir = Path(run(train.main, *options, *TINY_RUN).result["run_dir"])
        assert run_dir.name.startswith(f"{inputs.model.name}-")
        assert f"| model | {inputs.model.name} (embedded) |" in (run_dir / "report.md").read_text()
