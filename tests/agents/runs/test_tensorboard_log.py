"""TensorBoard's files, read back: hyper-parameters, names of units, no tag twice, also after an interruption."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fake_session import FakeModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from toy_training import TOY_CONFIG, toy_env, toy_front, toy_training

from flexquant_rl.agents.config import PPOConfig, TrainConfig
from flexquant_rl.agents.runs.ppo import TrainingCallback, learn
from flexquant_rl.agents.runs.tensorboard_log import hyper_parameters
from flexquant_rl.fq_env.vec_env import DecodeVecEnv

SMALL = PPOConfig(num_envs=8, batch_size=32, num_epochs=2)
ROLLOUT = SMALL.num_envs * TOY_CONFIG.max_new_tokens
UPDATES = 4
CONFIG = TrainConfig(text=("a.txt", "b.txt"), ppo=SMALL)


def train(path: Path, *, stop_at: int | None = None, resume: bool = False) -> None:
    """Four updates, the network validated before the first and the fourth one and at the end."""
    model = FakeModel()
    env = toy_env(model, num_envs=SMALL.num_envs, static=toy_front(model))
    ppo, callback = toy_training(env, model, path / "checkpoint.safetensors", ppo_config=SMALL)
    if resume:
        assert isinstance(env, DecodeVecEnv)
        callback.restore(ppo, env)
    on_step = TrainingCallback._on_step

    def step(self: TrainingCallback) -> bool:
        if self.num_timesteps == stop_at:
            raise KeyboardInterrupt
        return on_step(self)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(TrainingCallback, "_on_step", step)
        learn(ppo, callback, UPDATES * ROLLOUT, path / "tensorboard", hyper_parameters(CONFIG, 7))


def read(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return events


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """`(env steps, value)` of every tag, but for clocks."""
    events = read(path)
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    train(path)
    return path


def test_every_tag_is_written_once_at_a_step(whole: Path) -> None:
    ends = [ROLLOUT * update for update in range(1, UPDATES + 1)]
    found = scalars(whole)
    for tag, points in found.items():
        expected = [0, 3 * ROLLOUT, UPDATES * ROLLOUT] if tag.startswith("validation/") else ends
        assert [env_steps for env_steps, _ in points] == expected, tag
    # One quantity, one tag: `train/` holds what no tag of ours does.
    assert {tag for tag in found if tag.startswith("train/")} == {
        "train/learning_rate",
        "train/policy_gradient_loss",
        "train/value_loss",
    }
    columns = Counter(tuple(points) for tag, points in found.items() if not tag.startswith("bits/"))
    assert max(columns.values()) == 1, "two tags hold the same numbers"


def test_units_are_named(whole: Path) -> None:
    names = {f"bits/{unit.name}" for unit in FakeModel().units}
    assert {tag for tag in scalars(whole) if tag.startswith("bits/")} == {"bits/mean", *names}


@pytest.mark.parametrize("stops", [[8], [ROLLOUT + 8], [2 * ROLLOUT, 3 * ROLLOUT + 8, UPDATES * ROLLOUT]])
def test_an_interruption_leaves_no_tag_twice(tmp_path: Path, whole: Path, stops: list[int]) -> None:
    for number, stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stop_at=stop, resume=number > 0)
    train(tmp_path, resume=True)
    assert scalars(tmp_path) == scalars(whole)
    assert len(list((tmp_path / "tensorboard").iterdir())) == len(stops) + 1


def test_hyper_parameters_are_in_the_file(whole: Path) -> None:
    data = read(whole).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info.hparams
    assert found["ppo.num_envs"].number_value == 8
    assert found["ppo.learning_rate"].number_value == pytest.approx(SMALL.learning_rate)
    assert found["seed"].number_value == 7
    assert found["text"].string_value == "a.txt b.txt"
    assert found["model"].string_value == "default"
    assert found["quantization.quantize_head"].number_value == 1  # so torch writes what is true
    experiment = read(whole).SummaryMetadata("_hparams_/experiment").plugin_data.content
    (metric,) = plugin_data_pb2.HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert metric.name.tag in scalars(whole)


def test_every_option_is_a_hyper_parameter() -> None:
    """What differs between two runs can be seen."""
    first, second = (hyper_parameters(config, 0) for config in (CONFIG, replace(CONFIG, env_steps=5)))
    assert {name for name in first if first[name] != second[name]} == {"env_steps"}
    assert {"importance_windows", "env.max_new_tokens", "quantization.group_size", "ppo.gamma"} <= first.keys()
    assert "seeds" not in first
