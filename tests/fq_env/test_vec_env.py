"""The batched environment: SB3's conventions, and the same numbers as single environments give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from fake_session import EOS_TOKEN_ID, FakeModel, FakeSession, fake_profile, fake_windows
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor
from torch import Tensor

from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.making import make_environment, make_episodes
from flexquant_rl.fq_env.task import LossyTask, StaticAllocator
from flexquant_rl.fq_env.vec_env import DecodeVecEnv

PROMPT, STEPS = 4, 5
CONFIG = EnvConfig(prompt_tokens=PROMPT, max_new_tokens=STEPS)


def static_six(kl_weight: Tensor) -> Tensor:
    """Six bits whatever the dial."""
    return torch.full((len(kl_weight), 4), 6)


def fake_env(
    num_envs: int = 3,
    *,
    config: EnvConfig = CONFIG,
    windows: Tensor | None = None,
    static: StaticAllocator | None = None,
    eos_token_ids: tuple[int, ...] = (),
    seed: int = 0,
) -> DecodeVecEnv:
    model = FakeModel(carry=0.5)
    profile = fake_profile(model)
    windows = fake_windows(8, config.window_tokens) if windows is None else windows
    session = FakeSession(model, num_rows=num_envs)
    episodes = Episodes(session, profile, windows, config, eos_token_ids=eos_token_ids)
    return DecodeVecEnv(episodes, LossyTask(model, profile, config, static=static), seed=seed)


def random_actions(num_steps: int, num_envs: int, num_units: int = 4, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, size=(num_steps, num_envs, num_units))


def test_episodes_restart_by_themselves() -> None:
    env = fake_env(static=static_six)
    actions = random_actions(3 * STEPS, 3)
    first_step = env.episodes.schema.index("position")
    observations = env.reset()
    for number, action in enumerate(actions, 1):
        before = observations
        observations, rewards, dones, infos = env.step(action)
        assert rewards.shape == dones.shape == (3,)
        assert rewards.dtype == np.float32
        assert observations.dtype == np.float32
        assert env.observation_space.contains(observations[0])
        is_last = number % STEPS == 0
        assert dones.tolist() == [is_last] * 3
        assert (observations[:, first_step] == 0).all() == is_last
        for row, info in enumerate(infos):
            assert ("terminal_observation" in info) == is_last
            if is_last:
                assert info["TimeLimit.truncated"] is True
                assert info["terminal_observation"][first_step] == pytest.approx(np.log1p(STEPS) / 4)
                assert info["terminal_observation"].shape == observations[row].shape
                assert info["kl_weight"] == pytest.approx(
                    10 ** before[row, env.episodes.schema.index("dial")], rel=1e-4
                )
    assert number == 3 * STEPS


def test_the_last_observation_is_that_of_a_longer_episode() -> None:
    """What SB3 bootstraps from: the state that would have come next."""
    actions = random_actions(STEPS, 2)
    longer = EnvConfig(prompt_tokens=PROMPT, max_new_tokens=2 * STEPS)
    windows = fake_windows(1, longer.window_tokens)
    short = fake_env(2, windows=windows[:, : CONFIG.window_tokens], seed=1)
    long = fake_env(2, windows=windows, config=longer, seed=1)
    short.reset(), long.reset()
    for action in actions:
        (_, _, dones, infos), (expected, *_) = short.step(action), long.step(action)
    assert dones.all()
    for row in range(2):
        np.testing.assert_array_equal(infos[row]["terminal_observation"], expected[row])


@pytest.mark.parametrize("waits", [False, True])  # for a reset, where all end together
def test_eos_ends_a_row_and_restarts_it_alone(waits: bool) -> None:
    windows = fake_windows(2, CONFIG.window_tokens)
    windows[0, PROMPT + 2] = EOS_TOKEN_ID
    env = fake_env(6, windows=windows, eos_token_ids=(EOS_TOKEN_ID,), seed=3)
    env.waits_for_reset = waits
    position = env.episodes.schema.index("position")
    env.reset()
    short = (env.episodes._tokens[:, PROMPT + 2] == EOS_TOKEN_ID).numpy()
    assert 0 < short.sum() < 6, "the seed must give both kinds of row"
    actions = random_actions(2, 6)
    _, _, dones, _ = env.step(actions[0])
    assert not dones.any()
    assert not env.aligned
    observations, _, dones, infos = env.step(actions[1])
    assert dones.tolist() == short.tolist()
    assert ((observations[:, position] == 0) == short).all()
    assert not env.aligned
    for row in range(6):
        assert infos[row].get("TimeLimit.truncated") == (False if short[row] else None)
    env.close()


def test_rows_equal_single_environments(tiny_model_dir: Path, text_file: Path, profile_path: Path) -> None:
    options: dict[str, Any] = {
        "model": str(tiny_model_dir),
        "texts": [str(text_file)],
        "profile": str(profile_path),
        "prompt_tokens": PROMPT,
        "max_new_tokens": STEPS,
    }
    single = make_environment(**options)
    env = DecodeVecEnv(*make_episodes(3, **options))
    assert env.observation_space == single.observation_space
    assert env.action_space == single.action_space

    indices, dials = [4, 40, 400], [3.0, 30.0, 150.0]
    env.reset()
    rows = torch.arange(3)
    env.episodes.start(rows, torch.tensor(indices), torch.tensor(dials), torch.zeros_like(rows))
    actions = random_actions(STEPS, 3, 3)
    results = [env.step(action) for action in actions]
    for row in range(3):
        single.reset(seed=0, options={"window": indices[row], "kl_weight": dials[row]})
        for number, action in enumerate(actions):
            observation, reward, terminated, truncated, info = single.step(action[row])
            observations, rewards, dones, infos = results[number]
            batched = infos[row] if dones[row] else {"terminal_observation": observations[row], **infos[row]}
            np.testing.assert_allclose(batched["terminal_observation"], observation, rtol=1e-3, atol=1e-3)
            assert rewards[row] == pytest.approx(reward, rel=1e-3, abs=1e-3)
            assert dones[row] == (terminated or truncated)
            for name in info:
                assert infos[row][name] == pytest.approx(info[name], rel=1e-3, abs=1e-4), name
    single.close()
    env.close()


@pytest.mark.parametrize("source", ["replay", "free"])
def test_restart_repeats_the_episodes_bitwise(source: str) -> None:
    config = EnvConfig(prompt_tokens=PROMPT, max_new_tokens=STEPS, source=source, temperature=1.0)  # type: ignore[arg-type]
    actions = random_actions(3 * STEPS, 3)
    env = fake_env(config=config, seed=5)
    env.reset()
    for action in actions[:STEPS]:
        env.step(action)
    assert env.aligned
    state = json.loads(json.dumps(env.restart_state()))
    expected = [env.episodes.signals().numpy(), *(env.step(action)[0] for action in actions[STEPS:])]
    for other in (env, fake_env(config=config, seed=99)):  # also in another process, after an interruption
        observations = [other.restart(state), *(other.step(action)[0] for action in actions[STEPS:])]
        for mine, theirs in zip(observations, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_restart_state_belongs_to_the_episodes_under_way() -> None:
    env = fake_env(seed=6)
    first = env.reset()
    state = env.restart_state()
    assert env.aligned
    env.step(random_actions(1, 3)[0])
    assert not env.aligned
    assert env.restart_state() == state
    np.testing.assert_array_equal(env.restart(state), first)


def test_rows_that_wait_for_a_reset_go_on_with_the_same_episodes() -> None:
    actions = random_actions(2 * STEPS, 3)
    waiting, other = fake_env(seed=6), fake_env(seed=6)
    waiting.waits_for_reset = True
    waiting.reset(), other.reset()
    state = waiting.restart_state()
    for action in actions[:STEPS]:
        (observations, *_, dones, infos), (started, *_) = waiting.step(action), other.step(action)
    assert dones.all()
    assert not waiting.aligned  # nothing has started, and no random number is drawn
    assert waiting.restart_state() == state != other.restart_state()
    for row in range(3):
        np.testing.assert_array_equal(observations[row], infos[row]["terminal_observation"])
    np.testing.assert_array_equal(waiting.reset(), started)
    assert waiting.restart_state() == other.restart_state()
    for action in actions[STEPS : 2 * STEPS - 1]:
        np.testing.assert_array_equal(waiting.step(action)[0], other.step(action)[0])


def test_seed_decides_prompts_and_dials() -> None:
    one, other = fake_env(seed=1), fake_env(seed=2)
    assert not np.array_equal(one.reset(), other.reset())
    assert one.seed(7) == other.seed(7)
    np.testing.assert_array_equal(one.reset(), other.reset())


def test_dials_are_drawn_per_row_and_in_range() -> None:
    env = fake_env(64, config=EnvConfig(prompt_tokens=PROMPT, max_new_tokens=STEPS, kl_weight_min=5, kl_weight_max=50))
    env.reset()
    dials = env.episodes.kl_weight
    parts = (dials / 5).log10() * 64
    assert parts.floor().sort().values.tolist() == list(range(64))
    assert dials.min() >= 5 - 1e-4
    assert dials.max() <= 50 + 1e-4


def test_reward_is_the_advantage_over_static() -> None:
    """`plain - static`, the static part decoded independently."""
    model = FakeModel(carry=0.5)
    windows = fake_windows(1, CONFIG.window_tokens)
    env = fake_env(2, windows=windows, static=static_six, seed=2)
    plain = fake_env(2, windows=windows, seed=2)
    env.reset(), plain.reset()
    np.testing.assert_array_equal(env.episodes.kl_weight, plain.episodes.kl_weight)
    dials = env.episodes.kl_weight.numpy().copy()
    six, past = torch.full((4,), 6), 0.0
    for token in windows[0, :PROMPT]:
        past = float(model.own_kl_nats(token, torch.full((4,), 8))) + 0.5 * past
    time_saved = 1 - float(fake_profile(model).cost.time_share(six))
    for number, action in enumerate(random_actions(STEPS, 2)):
        (_, rewards, _, infos), (_, plain_rewards, _, _) = env.step(action), plain.step(action)
        past = float(model.own_kl_nats(windows[0, PROMPT + number], six)) + 0.5 * past
        static = time_saved - dials * past
        np.testing.assert_allclose([info["reward_plain"] for info in infos], plain_rewards)
        np.testing.assert_allclose(rewards, plain_rewards - static, rtol=1e-3, atol=1e-3)
        for info, reward in zip(infos, plain_rewards, strict=True):
            assert info["time_saved"] - info["kl_cost"] == pytest.approx(reward, abs=1e-5)


def test_flexquant_action_form() -> None:
    env = fake_env(2, config=EnvConfig(PROMPT, STEPS, action="num_low_units", low_width=3))
    env.reset()
    assert env.action_space == gym.spaces.Discrete(5)
    env.step(np.array([0, 4]))
    assert env.last_facts is not None
    assert env.last_facts.mean_bit_width.tolist() == [8.0, 3.0]


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "VecMonitor"])
def test_ppo_learns_from_it(wrap: bool) -> None:
    env = fake_env(4, static=static_six)
    wrapped = VecMonitor(env) if wrap else env
    agent = PPO("MlpPolicy", wrapped, n_steps=2 * STEPS, batch_size=20, n_epochs=1, seed=0, device="cpu")
    before = [parameter.clone() for parameter in agent.policy.parameters()]
    agent.learn(2 * STEPS * 4)
    assert agent.num_timesteps == 2 * STEPS * 4
    assert any(not torch.equal(old, new) for old, new in zip(before, agent.policy.parameters(), strict=True))
    if wrap:
        assert agent.ep_info_buffer is not None
        assert len(agent.ep_info_buffer) == 8
        assert {episode["l"] for episode in agent.ep_info_buffer} == {STEPS}


def test_rows_share_one_configuration() -> None:
    env = fake_env(3)
    assert env.get_attr("aligned", [0, 2]) == [False, False]
    assert env.get_attr("render_mode") == [None] * 3
    assert env.get_attr("feature_names", [1]) == [env.task.feature_names]
    assert env.env_is_wrapped(VecMonitor) == [False] * 3
    with pytest.raises(AttributeError, match="share one configuration"):
        env.set_attr("aligned", True)
    with pytest.raises(AttributeError, match="no single environments"):
        env.env_method("reset")


def test_stepping_without_actions_is_a_mistake() -> None:
    env = fake_env()
    env.reset()
    with pytest.raises(AssertionError, match="step_async"):
        env.step_wait()


def test_closing_closes_the_session() -> None:
    env = fake_env()
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()
