"""The vector environment against Gymnasium's own: the same rows, restarts and infos, through one pass per step."""

from __future__ import annotations

import pickle  # noqa: TID251  # what a process pool does with an environment
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from fake_session import EOS_TOKEN_ID, FakeModel, FakeSession, fake_profile, fake_windows
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from flexquant_rl.engine.bits_display import legend
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.environment import Environment
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.making import VectorDecodeEnvironment
from flexquant_rl.fq_env.task import LossyTask
from flexquant_rl.fq_env.vector_environment import VectorEnvironment

ID = "flexquant_rl.fq_env:FlexQuant/Decode-v1"
ROWS, STEPS = 3, 5


@pytest.fixture(scope="module")
def keywords(tiny_model_dir: Path, text_file: Path, profile_path: Path) -> dict[str, Any]:
    """Arguments of short episodes on the tiny model."""
    return {
        "model": str(tiny_model_dir),
        "texts": [str(text_file)],
        "profile": str(profile_path),
        "prompt_tokens": 4,
        "max_new_tokens": STEPS,
    }


@pytest.fixture
def make(keywords: dict[str, Any]) -> Iterator[Callable[..., VectorEnv[Any, Any, Any]]]:
    """Builds registered vector environments and closes them in the end."""
    made = []

    def build(num_envs: int = ROWS, **options: Any) -> VectorEnv[Any, Any, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.append(gym.make_vec(ID, num_envs=num_envs, **{**keywords, **options}))
        return made[-1]

    yield build
    for env in made:
        env.close()


def fake_windows_with_eos(config: EnvConfig) -> torch.Tensor:
    """Eight windows; half of them end after two steps."""
    windows = fake_windows(8, config.window_tokens)
    windows[::2, config.prompt_tokens + 2] = EOS_TOKEN_ID
    return windows


def fake_parts(num_rows: int, config: EnvConfig) -> tuple[Episodes, LossyTask]:
    model = FakeModel(carry=0.5)
    session, profile = FakeSession(model, num_rows=num_rows), fake_profile(model)
    episodes = Episodes(session, profile, fake_windows_with_eos(config), config, eos_token_ids=(EOS_TOKEN_ID, 29))
    return episodes, LossyTask(model, profile, config)


def assert_infos_agree(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same entries for the same rows; what stands where there is no entry does not matter."""
    assert mine.keys() == theirs.keys()
    for name, values in theirs.items():
        if name.startswith("_"):
            np.testing.assert_array_equal(mine[name], values, err_msg=name)
        elif isinstance(values, dict):
            assert_infos_agree(mine[name], values)
        else:
            has_entry = theirs[f"_{name}"]
            assert mine[name].dtype == values.dtype, name
            for one, other in zip(mine[name][has_entry], values[has_entry], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("source", ["replay", "free"])
@pytest.mark.parametrize("action", ["bit_widths", "num_low_units"])
def test_it_is_gymnasiums_own_in_one_pass(source: Any, action: Any) -> None:
    """Step by step what `SyncVectorEnv` gives with single environments that restart in the same step."""
    config = EnvConfig(prompt_tokens=4, max_new_tokens=STEPS, source=source, temperature=1.0, action=action)
    ours = VectorEnvironment(*fake_parts(6, config))
    theirs = SyncVectorEnv(
        [lambda: Environment(*fake_parts(1, config)) for _ in range(6)], autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert ours.metadata == theirs.metadata
    for name in ("action_space", "observation_space", "single_action_space", "single_observation_space"):
        assert getattr(ours, name) == getattr(theirs, name), name
    ours.action_space.seed(0)
    one, other = ours.reset(seed=7), theirs.reset(seed=7)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-5)
    assert_infos_agree(one[1], other[1])
    ends = []
    for _ in range(4 * STEPS):
        actions = ours.action_space.sample()
        one, other = ours.step(actions), theirs.step(actions)
        assert one[0].dtype == other[0].dtype
        np.testing.assert_allclose(one[0], other[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one[1], other[1], rtol=1e-4, atol=1e-4)
        assert one[1].dtype == other[1].dtype
        for mine, his in zip(one[2:4], other[2:4], strict=True):
            np.testing.assert_array_equal(mine, his)
            assert mine.dtype == his.dtype
        assert_infos_agree(one[4], other[4])
        ends.append(one[2] | one[3])
    if source == "replay":
        assert any(0 < end.sum() < 6 for end in ends), "some rows must end alone"


def test_rows_equal_single_environments(
    make: Callable[..., VectorEnv[Any, Any, Any]], keywords: dict[str, Any]
) -> None:
    """On a real model, row i is the environment of seed + i."""
    env = make()
    observations, infos = env.reset(seed=10)
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(STEPS)]
    results = [env.step(action) for action in actions]
    assert results[-1][3].all()
    for row in range(ROWS):
        single = gym.make(ID, **keywords)
        observation, info = single.reset(seed=10 + row)
        np.testing.assert_allclose(observations[row], observation, rtol=1e-3, atol=1e-3)
        assert {name: infos[name][row] for name in info} == info
        for action, (batched, rewards, _, _, _) in zip(actions, results, strict=True):
            observation, reward, _, truncated, _ = single.step(action[row])
            assert rewards[row] == pytest.approx(reward, rel=1e-3, abs=1e-3)
            last = results[-1][4]["final_obs"][row] if truncated else batched[row]
            np.testing.assert_allclose(last, observation, rtol=1e-3, atol=1e-3)
        single.close()


def test_it_is_registered(make: Callable[..., VectorEnv[Any, Any, Any]]) -> None:
    env = make()
    assert isinstance(env, VectorDecodeEnvironment)
    assert env.num_envs == ROWS
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.metadata["render_modes"] == ["ansi"]
    assert env.spec is not None
    named = make(vectorization_mode="vector_entry_point")
    assert isinstance(named, VectorDecodeEnvironment)
    assert isinstance(make(vectorization_mode="sync"), SyncVectorEnv)
    assert env.single_action_space == named.single_action_space


def test_two_with_one_seed_agree(make: Callable[..., VectorEnv[Any, Any, Any]]) -> None:
    one, other = make(source="free", temperature=1.0), make(source="free", temperature=1.0)
    for seed in (4, [9, 4, 2]):
        first, second = one.reset(seed=seed), other.reset(seed=seed)  # type: ignore[arg-type]
        np.testing.assert_array_equal(first[0], second[0])
        for _ in range(STEPS + 1):
            actions = one.action_space.sample()
            first, second = one.step(actions), other.step(actions)
            for mine, theirs in zip(first[:4], second[:4], strict=True):
                np.testing.assert_array_equal(mine, theirs)
    assert not np.array_equal(one.reset(seed=1)[0], one.reset(seed=2)[0])


def test_seeds_are_given_row_by_row() -> None:
    env = VectorEnvironment(*fake_parts(3, EnvConfig(prompt_tokens=4, max_new_tokens=STEPS)))
    _, started = env.reset(seed=5)
    _, shifted = env.reset(seed=[6, 5, 5])
    for name in ("window", "kl_weight"):
        assert shifted[name].tolist() == [started[name][1], started[name][0], started[name][0]]
    _, going_on = env.reset(seed=[None, 5, None])
    assert going_on["kl_weight"][1] == started["kl_weight"][0]
    assert going_on["kl_weight"][0] != shifted["kl_weight"][0]
    with pytest.raises(ValueError, match="2 seeds were given for 3 rows"):
        env.reset(seed=[1, 2])


def test_options_fix_window_and_dial_for_all_rows_or_each() -> None:
    env = VectorEnvironment(*fake_parts(3, EnvConfig(prompt_tokens=4, max_new_tokens=STEPS)))
    _, infos = env.reset(seed=0, options={"window": [1, 3, 9], "kl_weight": 30.0})
    assert infos["window"].tolist() == [1, 3, 1], "windows are counted around"
    assert infos["kl_weight"].tolist() == [30.0] * 3
    with pytest.raises(InputError, match="kl_weight=-1"):
        env.reset(options={"kl_weight": [1.0, -1.0, 1.0]})


def test_a_mask_restarts_some_rows() -> None:
    env = VectorEnvironment(*fake_parts(3, EnvConfig(prompt_tokens=4, max_new_tokens=STEPS)))
    position = env.feature_names.index("position")
    env.reset(seed=0, options={"window": 1})
    before = env.step(env.action_space.sample())[0]
    mask = np.array([False, True, False])
    after, infos = env.reset(options={"reset_mask": mask})
    assert (after[:, position] == 0).tolist() == mask.tolist()
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert infos["_window"].tolist() == mask.tolist()
    for wrong in (np.array([True, False]), np.zeros(3, dtype=bool), [1, 0, 0]):
        with pytest.raises(ValueError, match="must be 3 booleans"):
            env.reset(options={"reset_mask": wrong})


def test_what_rows_cannot_do_is_refused_in_one_line() -> None:
    env = VectorEnvironment(*fake_parts(3, EnvConfig(prompt_tokens=4, max_new_tokens=STEPS)))
    env.reset(seed=0)
    low = np.zeros((3, 4), dtype=np.int64)
    high = low + np.eye(3, 4, dtype=np.int64) * 5
    mistakes: list[tuple[str, Callable[[], object]]] = [
        ("action 5 at [0, 0] is out of range", lambda: env.step(high)),
        ("the action has shape (2, 4), not (3, 4)", lambda: env.step(low[:2])),
        ("is not of 64-bit integers", lambda: env.step(low.astype(np.float32))),
        ("reset option 'mask' is not known", lambda: env.reset(options={"mask": [True] * 3})),
        ("window=[1, 2] is not one for each of 3 rows", lambda: env.reset(options={"window": [1, 2]})),
        ("window=1.5 is not an integer", lambda: env.reset(options={"window": 1.5})),
        ("is not a number", lambda: env.reset(options={"kl_weight": ["a", "b", "c"]})),
        ("seed='abc' is not an integer", lambda: env.reset(seed="abc")),  # type: ignore[arg-type]
        ("is not one of 64 bits", lambda: env.reset(seed=2**64 - 1)),  # the second row's is one too many
        ("is not one of 64 bits", lambda: env.reset(seed=[0, -1, 0])),
        ("must be 3 booleans", lambda: env.reset(options={"reset_mask": [[True], [True, False]]})),
    ]
    for says, mistake in mistakes:
        with pytest.raises(InputError) as error:
            mistake()
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_gymnasiums_wrappers_understand_it(make: Callable[..., VectorEnv[Any, Any, Any]]) -> None:
    env = RecordEpisodeStatistics(make())
    env.reset(seed=0)
    rewards = []
    for _ in range(2 * STEPS):
        _, reward, _, truncated, infos = env.step(env.action_space.sample())
        rewards.append(reward)
    assert truncated.all()
    np.testing.assert_allclose(infos["episode"]["r"], np.sum(rewards[STEPS:], axis=0), rtol=1e-4, atol=1e-4)
    assert infos["episode"]["l"].tolist() == [STEPS] * ROWS


def test_features_have_names(make: Callable[..., VectorEnv[Any, Any, Any]]) -> None:
    env = make()
    names = env.unwrapped.feature_names  # type: ignore[attr-defined]
    assert (len(names),) == env.single_observation_space.shape
    observations, infos = env.reset(seed=0)
    np.testing.assert_allclose(observations[:, names.index("dial")], np.log10(infos["kl_weight"]), rtol=1e-5)


def test_rendering_shows_every_row(make: Callable[..., VectorEnv[Any, Any, Any]]) -> None:
    env = make(render_mode="ansi")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    shown = env.render()
    assert shown is not None
    assert len(shown) == ROWS
    assert all(text.endswith(legend((3, 4, 5, 6, 8))) for text in shown)  # type: ignore[union-attr]
    assert make().render() is None


def test_pickle_builds_the_same_environment(make: Callable[..., VectorEnv[Any, Any, Any]]) -> None:
    env = make(num_envs=2, split="test")
    twin = pickle.loads(pickle.dumps(env.unwrapped))
    assert twin.num_envs == 2
    np.testing.assert_array_equal(twin.reset(seed=3)[0], env.reset(seed=3)[0])
    twin.close()


def test_closing_frees_the_session(make: Callable[..., VectorEnv[Any, Any, Any]]) -> None:
    env = make()
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.reset(seed=0)
    VectorDecodeEnvironment.__new__(VectorDecodeEnvironment).close()


def test_several_rows_are_not_timed(keywords: dict[str, Any]) -> None:
    name = "flexquant_rl.fq_env:FlexQuant/MeasuredDecode-v1"
    with pytest.raises(InputError, match="a pass over several rows takes the time of none of them") as error:
        gym.make_vec(name, num_envs=2, **keywords)
    assert "\n" not in str(error.value)
    alone = gym.make_vec(name, num_envs=1, **keywords)
    side_by_side = gym.make_vec(name, num_envs=2, vectorization_mode="sync", **keywords)
    for env in (alone, side_by_side):
        env.reset(seed=0)
        assert (env.step(env.action_space.sample())[4]["latency_ms"] > 0.01).all()
        env.close()
