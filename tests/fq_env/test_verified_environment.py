"""The environments of drafts: both checkers, seeds, masks, one row like many, wrong arguments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_sb3
from toy_traces import random_traces, toy_costs

import flexquant_rl.fq_env  # noqa: F401  # registers the ids
from flexquant_rl.engine.control.traces import Traces
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.vec_env import VerifiedVecEnv
from flexquant_rl.fq_env.verified_making import VectorVerifiedEnvironment, VerifiedEnvironment, make_rounds

ID = "FlexQuant/VerifiedDecode-v0"


@pytest.fixture(scope="module")
def traces() -> Traces:
    return random_traces(np.random.default_rng(7), num_sequences=9, splits=("train", "validation", "test"))


def test_checkers(traces: Traces) -> None:
    env = gymnasium.make(ID, traces=traces, costs=toy_costs(3, 4))
    check_env(env.unwrapped, skip_render_check=True)
    check_sb3(env.unwrapped)
    assert env.unwrapped.observation_space.shape == (len(env.unwrapped.feature_names),)  # type: ignore[attr-defined]


def play(env: Any, seed: int, num_steps: int = 60) -> list[Any]:
    rng = np.random.default_rng(seed)
    seen = [env.reset(seed=seed)]
    for _ in range(num_steps):
        *step, info = env.step(int(rng.integers(4)))
        seen.append((*step, info))
        if step[2] or step[3]:
            seen.append(env.reset())
    return seen


def test_a_seed_decides_everything(traces: Traces) -> None:
    one, two = (VerifiedEnvironment(traces, toy_costs(3, 4)) for _ in range(2))
    for left, right in zip(play(one, 3), play(two, 3), strict=True):
        np.testing.assert_array_equal(left[0], right[0])
        assert str(left[1:]) == str(right[1:])


def test_an_episode_earns_its_tokens_less_its_time(traces: Traces) -> None:
    costs = toy_costs(3, 4)
    env = VerifiedEnvironment(traces, costs, split="test")
    rng = np.random.default_rng(0)
    for window, index in enumerate(traces.of_split("test")):
        _, info = env.reset(options={"window": window})
        assert info["window"] == window
        total, time_ms, is_over = 0.0, 0.0, False
        while not is_over:
            action = int(rng.choice(info["action_mask"].nonzero()[0]))
            _, reward, terminated, truncated, info = env.step(action)
            assert info["tokens_worth"] == info["num_emitted"]
            total, time_ms, is_over = total + reward, time_ms + info["latency_ms"], terminated or truncated
        assert total == pytest.approx(traces.sequences[index].num_tokens - time_ms / costs.full_ms, abs=1e-4)


def test_without_drafts_nothing_is_earned(traces: Traces) -> None:
    env = VerifiedEnvironment(traces, toy_costs(3, 4))
    env.reset(seed=0)
    is_over, steps = False, 0
    while not is_over:
        _, reward, terminated, truncated, info = env.step(0)
        assert (reward, info["num_emitted"]) == (0, 1)
        is_over, steps = terminated or truncated, steps + 1
    assert steps == traces.sequences[traces.of_split("train")[env.reset(seed=0)[1]["window"]]].num_tokens


def test_rows_of_the_vector_environment_are_environments(traces: Traces) -> None:
    costs = toy_costs(3, 4)
    batch = gymnasium.make_vec(ID, num_envs=3, traces=traces, costs=costs)
    singles = [VerifiedEnvironment(traces, costs) for _ in range(3)]
    rng = np.random.default_rng(1)
    observations, _ = batch.reset(seed=10)
    for row, env in enumerate(singles):
        np.testing.assert_array_equal(env.reset(seed=10 + row)[0], observations[row])
    restarts = 0
    for _ in range(60):
        masks = batch.unwrapped.action_masks()  # type: ignore[attr-defined]
        actions = rng.integers(4, size=3)
        observations, rewards, terminated, truncated, _ = batch.step(actions)
        for row, env in enumerate(singles):
            np.testing.assert_array_equal(env.action_masks(), masks[row])
            observation, reward, *ended, _ = env.step(int(actions[row]))
            assert (reward, *ended) == (pytest.approx(rewards[row]), terminated[row], truncated[row])
            if any(ended):
                observation, _ = env.reset()
                restarts += 1
            np.testing.assert_array_equal(observation, observations[row])
    assert restarts > 3


def test_sb3_rows_restart_and_show_masks(traces: Traces) -> None:
    rounds, task = make_rounds(traces, toy_costs(3, 4), num_rows=5)
    env = VerifiedVecEnv(rounds, task, seed=2)
    first = env.reset()
    state = env.restart_state()
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(80):
        masks = env.env_method("action_masks")
        assert np.array_equal(masks, env.action_masks())
        assert all(mask[0] for mask in masks)
        _, _, dones, infos = env.step(rng.integers(4, size=5))
        ended += int(dones.sum())
        assert all(("terminal_observation" in info) == done for info, done in zip(infos, dones, strict=True))
    assert ended > 5
    np.testing.assert_array_equal(env.restart(state), first)
    with pytest.raises(AttributeError, match="no single environments"):
        env.env_method("reset")


def test_a_masked_action_verifies(traces: Traces) -> None:
    env = VerifiedEnvironment(traces, toy_costs(3, 4))
    env.reset(seed=0)
    seen = 0
    for _ in range(200):
        can_draft = bool(env.action_masks()[1])
        _, _, terminated, truncated, info = env.step(3)
        assert (info["num_emitted"] > 0) == (not can_draft)
        seen += not can_draft
        if terminated or truncated:
            env.reset()
    assert seen > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tests"}, "split='tests' is not known"),
        ({"traces": 3}, "traces=3 must be the directory of a recording"),
        ({"traces": "nowhere"}, "no readable recording"),
        ({"costs": {}}, "must be VerifyCosts"),
        ({"costs": toy_costs(2, 4)}, "the traces have 3 levels"),
        ({"ngram_drafts": 2.5}, "ngram_drafts=2.5 must be 0 to 15, a whole number"),
        ({"ngram_drafts": "x"}, "ngram_drafts='x' must be 0 to 15"),
        ({"render_mode": "ansi"}, "no text to render"),
    ],
)
def test_wrong_arguments_are_one_line(traces: Traces, arguments: dict[str, Any], message: str) -> None:
    given = {"traces": traces, "costs": toy_costs(3, 4), **arguments}
    with pytest.raises(InputError, match=message):
        VerifiedEnvironment(**given)
    with pytest.raises(InputError, match=message):
        VectorVerifiedEnvironment(2, **given)


def test_wrong_actions_and_options_are_one_line(traces: Traces) -> None:
    env = VerifiedEnvironment(traces, toy_costs(3, 4))
    env.reset(seed=0)
    with pytest.raises(InputError, match="out of range"):
        env.step(4)
    with pytest.raises(InputError, match="reset option 'kl_weight' is not known"):
        env.reset(options={"kl_weight": 3.0})
    with pytest.raises(InputError, match="num_envs=0"):
        VectorVerifiedEnvironment(0, traces=traces, costs=toy_costs(3, 4))
