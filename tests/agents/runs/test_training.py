"""The phases of a run: what they leave behind, and what a resume makes of it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from flexquant_rl.agents import preparation
from flexquant_rl.agents.config import BASELINES, Latency, PPOConfig, TrainConfig, check_config
from flexquant_rl.agents.preparation import Prepared, prepare
from flexquant_rl.agents.runs import phases, training
from flexquant_rl.agents.runs.ppo import TrainingCallback
from flexquant_rl.agents.runs.training import Validation, train_seed, with_dial_table
from flexquant_rl.engine.control.artefact import load_policy
from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.policy import LearnedPolicy, PrecisionNet
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.config import EnvConfig

CONFIG = TrainConfig(
    env_steps=96, validation_sequences=4, ppo=PPOConfig(num_envs=4, batch_size=24, num_epochs=1, learning_rate=3e-3)
)  # 4 rows of 12 tokens: two rollouts


@pytest.fixture(autouse=True)
def quick_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """How well it clones is tested elsewhere."""
    monkeypatch.setattr(training, "clone", partial(training.clone, num_steps=20))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(f"paragraph {number}: " + f"{number * 7919} " * 80 for number in range(120)))
    return str(path)


def prepare_tiny(
    model: Path, text: str, run_dir: Path | None = None, *, latency: Latency | None = "roofline", **env: float
) -> Prepared:
    config = TrainConfig(
        model=str(model),
        text=(text,),
        latency=latency,
        quantization=QuantizationConfig(group_size=32),
        env=EnvConfig(prompt_tokens=4, max_new_tokens=8, **env),  # type: ignore[arg-type]
    )
    return prepare(config, run_dir)


def test_a_resume_reads_profile_and_front(
    tiny_model_dir: Path, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_tiny(tiny_model_dir, text_file, tmp_path)
    for name in ("profile_model", "static_front"):
        monkeypatch.setattr(preparation, name, lambda *_, **__: pytest.fail("done already"))
    again = prepare_tiny(tiny_model_dir, text_file, tmp_path)
    assert torch.equal(first.profile.sensitivity, again.profile.sensitivity)
    for name, tensor in vars(first.front).items():
        assert torch.equal(tensor, getattr(again.front, name)), name
    assert again.env == first.env
    assert 0 < first.env.kl_weight_min < first.env.kl_weight_max


def test_latencies_are_measured_where_the_model_is_ones_own(
    tiny_model_dir: Path, text_file: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    measured = prepare_tiny(model, text_file, latency=None)
    assert (measured.cost.source, measured.profile.cost.source) == ("measured", "measured")
    assert measured.cost.error_p50 is not None
    modelled = prepare_tiny(model, text_file)
    assert modelled.cost.source == "roofline"
    # What `fq profile` has left beside the model is taken, unless one asks for another.
    replace(modelled.profile, num_tokens=77).save(model / "profile.json")
    assert prepare_tiny(model, text_file, latency=None).profile.num_tokens == 77
    assert prepare_tiny(model, text_file).profile.num_tokens != 77


def test_a_flipped_front_is_refused(tiny_model_dir: Path, text_file: str, tmp_path: Path) -> None:
    prepare_tiny(tiny_model_dir, text_file, tmp_path)
    path = tmp_path / "static_front.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match="static_front.safetensors: damaged, sha256 .*; delete it to have it computed"):
        prepare_tiny(tiny_model_dir, text_file, tmp_path)


def test_a_fixed_dial_is_the_whole_range(tiny_model_dir: Path, text_file: str) -> None:
    """Cloning draws dials from the range: it must be taught the one that will be used."""
    prepared = prepare_tiny(tiny_model_dir, text_file, kl_weight=777.0)
    assert (prepared.env.kl_weight_min, prepared.env.kl_weight_max) == (777.0, 777.0)
    assert prepared.dials(5).tolist() == [777.0]


def test_dials_are_spread_over_the_range(tiny_prepared: Prepared) -> None:
    dials = tiny_prepared.dials(4)
    assert dials[[0, -1]].tolist() == pytest.approx([tiny_prepared.env.kl_weight_min, tiny_prepared.env.kl_weight_max])
    torch.testing.assert_close(dials.log().diff(), dials.log().diff()[:1].expand(3))


def test_static_scores_zero_on_validation(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score is reward over the static allocation's, so that allocation itself has none."""
    validation = Validation(tiny_prepared, 8)
    net = PrecisionNet(training.policy_card(tiny_prepared).schema)
    allocation = tiny_prepared.front.allocate(validation._dials)
    monkeypatch.setattr(LearnedPolicy, "__call__", lambda self, signals: Decision(allocation))
    assert validation(net) == 0
    monkeypatch.setattr(LearnedPolicy, "__call__", lambda self, signals: Decision(torch.full_like(allocation, 3)))
    assert validation(net) < 0


def test_a_validation_that_others_have_used_scores_alike(tiny_prepared: Prepared, tmp_path: Path) -> None:
    """One for the whole run: the static allocation is decoded once, and no score knows what was scored before."""
    shared = Validation(tiny_prepared, CONFIG.validation_sequences)
    first = train_seed(CONFIG, tiny_prepared, 1, tmp_path / "1", None, shared)
    reward = shared._static_reward
    second = train_seed(CONFIG, tiny_prepared, 2, tmp_path / "2", None, shared)
    assert shared._static_reward is reward
    assert second.curve != first.curve
    alone = train_seed(CONFIG, tiny_prepared, 2, tmp_path / "3")
    assert second.curve == alone.curve
    assert_equal_policies(second.policy, alone.policy)
    shared.close()


def test_a_run_that_has_ended_decodes_no_static_allocation(
    tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Evaluator, "run", lambda *_: pytest.fail("nothing is scored"))
    Validation(tiny_prepared, 8).close()


def assert_equal_policies(a: LearnedPolicy, b: LearnedPolicy) -> None:
    for name, tensor in a.net.state_dict().items():
        assert torch.equal(tensor, b.net.state_dict()[name]), name


def test_a_seed_is_trained_once(tiny_prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train_seed(CONFIG, tiny_prepared, 1, tmp_path)
    files = ["checkpoint.safetensors", "cloned.safetensors", "policy", "tensorboard"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert result.best_score >= result.cloned_score
    assert (result.env_steps_per_s or 0) > 0
    saved = load_policy(tmp_path / "policy", model_fingerprint=tiny_prepared.model.fingerprint)
    assert_equal_policies(saved, result.policy)
    assert saved.card.config["seeds"] == CONFIG.seeds
    monkeypatch.setattr(training, "build_ppo", lambda *_, **__: pytest.fail("trained already"))
    again = train_seed(CONFIG, tiny_prepared, 1, tmp_path)
    assert_equal_policies(again.policy, result.policy)
    assert again.curve == result.curve
    assert [env_steps for env_steps, _ in result.curve] == [0, 96]
    assert result.chosen == max(result.curve, key=lambda point: point[1])
    assert result.cloned_score <= result.best_score >= result.last_score > -math.inf
    assert again.env_steps_per_s == result.env_steps_per_s
    assert again.cloned is not None
    assert result.cloned is not None
    assert_equal_policies(again.cloned, result.cloned)
    assert Validation(tiny_prepared, CONFIG.validation_sequences)(result.cloned.net) == result.cloned_score
    path = tmp_path / "cloned.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="cloned.safetensors: .*delete it to have the run evaluated without"):
        train_seed(CONFIG, tiny_prepared, 1, tmp_path)
    path.unlink()
    assert train_seed(CONFIG, tiny_prepared, 1, tmp_path).cloned is None


def test_an_unproven_policy_does_not_count(
    tiny_prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity fails, or the process dies before it is checked: a resume does not take what lies there."""
    expected = train_seed(CONFIG, tiny_prepared, 1, tmp_path / "whole")
    check_parity = training.check_parity

    def fail(*_: object) -> None:
        raise RuntimeError("1 of 3000 widths differ")

    monkeypatch.setattr(training, "check_parity", fail)
    with pytest.raises(RuntimeError, match="widths differ"):
        train_seed(CONFIG, tiny_prepared, 1, tmp_path / "failed")
    assert not (tmp_path / "failed" / "policy").exists()
    monkeypatch.setattr(training, "check_parity", check_parity)
    result = train_seed(CONFIG, tiny_prepared, 1, tmp_path / "failed")
    assert (tmp_path / "failed" / "policy" / "policy.json").is_file()
    assert_equal_policies(result.policy, expected.policy)


@pytest.mark.parametrize("stop_at", [12, 60])
def test_a_seed_resumes_to_the_same_policy(
    tiny_prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """On a real model: interrupted in the first or second rollout, then continued."""
    expected = train_seed(CONFIG, tiny_prepared, 1, tmp_path / "whole")
    on_step = TrainingCallback._on_step

    def interrupt(callback: TrainingCallback) -> bool:
        if callback.num_timesteps == stop_at:
            raise KeyboardInterrupt
        return on_step(callback)

    monkeypatch.setattr(TrainingCallback, "_on_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_seed(CONFIG, tiny_prepared, 1, tmp_path / "resumed")
    monkeypatch.setattr(TrainingCallback, "_on_step", on_step)
    torch.manual_seed(77)
    monkeypatch.setattr(training, "clone", lambda *_, **__: pytest.fail("cloned already"))
    result = train_seed(CONFIG, tiny_prepared, 1, tmp_path / "resumed")
    assert_equal_policies(result.policy, expected.policy)
    assert result.curve == expected.curve
    whole, resumed = (tmp_path / name / "checkpoint.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_dial_table(tiny_prepared: Prepared) -> None:
    card = training.policy_card(tiny_prepared)
    torch.manual_seed(0)
    policy = with_dial_table(LearnedPolicy(PrecisionNet(card.schema), card), tiny_prepared, 4, 3)
    assert [point.kl_weight for point in policy.card.dial] == pytest.approx(tiny_prepared.dials(3).tolist())
    for point in policy.card.dial:
        assert point.speedup_modelled >= 1
        assert point.output_kl_nats >= 0
        assert 3 <= point.mean_bit_width <= 8
    assert policy.card.setting_for_speed(max(point.speedup_modelled for point in policy.card.dial)).kl_weight > 0
    with pytest.raises(InputError, match="speed 99"):
        policy.card.setting_for_speed(99.0)


def test_oracles_take_no_negative_number_of_samples() -> None:
    with pytest.raises(InputError, match="oracle_samples=-1 must not be negative; 0 leaves the oracles out"):
        check_config(TrainConfig(oracle_samples=-1))
    check_config(TrainConfig(oracle_samples=0))


@pytest.mark.parametrize("names", [("random", "entropi"), ("static",), ("",)])
def test_baselines_are_known(names: tuple[str, ...]) -> None:
    choices = "choose from --baselines random entropy schedule token relative-error regressor untrained"
    with pytest.raises(InputError, match=f"baselines='{names[-1]}' is unknown; {choices}"):
        check_config(TrainConfig(baselines=names))
    check_config(TrainConfig(baselines=()))
    check_config(TrainConfig(baselines=BASELINES))


@pytest.mark.parametrize("windows", [-1, 3])
def test_too_few_windows_teach_no_importance(windows: int) -> None:
    with pytest.raises(InputError, match=f"importance_windows={windows} must be at least 10"):
        check_config(TrainConfig(importance_windows=windows))
    check_config(TrainConfig(importance_windows=0))


@pytest.mark.parametrize("budgets", [(), (0.5, 0.0), (1.5,), (math.nan,)])
def test_budgets_are_shares(budgets: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"time_budgets='.*' must be shares of full-width time"):
        check_config(TrainConfig(time_budgets=budgets))
    check_config(TrainConfig(time_budgets=(0.5, 1.0)))


def test_training_never_opens_test_text(
    tiny_model_dir: Path, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training profiles, solves, learns and exports; the evaluation alone opens the test split, and only then."""
    monkeypatch.setattr(
        phases, "compete_at_budgets", lambda prepared, *_: pytest.fail(str(sorted(prepared.windows.opened)))
    )
    config = replace(
        CONFIG,
        model=str(tiny_model_dir),
        text=(text_file,),
        seeds=1,
        num_dials=2,
        latency="roofline",
        quantization=QuantizationConfig(group_size=32),
        env=EnvConfig(prompt_tokens=4, max_new_tokens=8),
    )
    trained = phases.train_run(config, tmp_path / "run")
    assert trained.policy_dir.is_dir()
    assert trained.prepared.windows.opened == {"train", "validation"}
    with pytest.raises(pytest.fail.Exception, match=r"\['train', 'validation'\]"):
        phases.evaluate_run(config, trained, tmp_path / "run")
    assert len(trained.prepared.windows.test)


def test_latencies_come_from_one_place() -> None:
    with pytest.raises(InputError, match="--latency roofline .* and --profile p.json brings its own .*; leave one"):
        check_config(TrainConfig(latency="roofline", profile="p.json"))
    with pytest.raises(InputError, match="latency=guessed is not known; choose one of measured, roofline"):
        check_config(TrainConfig(latency="guessed"))  # type: ignore[arg-type]
    check_config(TrainConfig(profile="p.json"))
    check_config(TrainConfig(latency="measured"))


def test_budgets_that_nothing_reaches(tiny_prepared: Prepared) -> None:
    fastest = float(tiny_prepared.cost.time_share(tiny_prepared.front.bit_widths).min())
    preparation.check_budgets(TrainConfig(time_budgets=(fastest / 2, (1 + fastest) / 2)), tiny_prepared)
    with pytest.raises(InputError, match=r"out of reach: the fastest allocation takes 0\.\d+ .*; give e.g. --time-bud"):
        preparation.check_budgets(TrainConfig(time_budgets=(fastest / 2,)), tiny_prepared)
