"""The registered environments: both checkers, determinism, pickling, bounds, and what they refuse."""

from __future__ import annotations

import math
import pickle  # noqa: TID251  # what a process pool does with an environment
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_profile, fake_windows
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from flexquant_rl.engine.bits_display import legend
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env import prompts
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.environment import Environment
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.making import DecodeEnvironment, make_environment
from flexquant_rl.fq_env.shared import forget_shared
from flexquant_rl.fq_env.stdlib_text import StdlibSplit, stdlib_text
from flexquant_rl.fq_env.task import LossyTask

IDS = ("FlexQuant/Decode-v1", "FlexQuant/MeasuredDecode-v1")
CARD = (
    "Description",
    "Action Space",
    "Observation Space",
    "Rewards",
    "Starting State",
    "Episode End",
    "Arguments",
    "Version History",
)
STEPS = 5


@pytest.fixture(scope="module")
def keywords(tiny_model_dir: Path, text_file: Path, profile_path: Path) -> dict[str, Any]:
    """Arguments of short episodes on the tiny model; the profile spares a second per environment."""
    return {
        "model": str(tiny_model_dir),
        "texts": [str(text_file)],
        "profile": str(profile_path),
        "prompt_tokens": 4,
        "max_new_tokens": STEPS,
    }


@pytest.fixture(scope="module")
def make(keywords: dict[str, Any]) -> Iterator[Callable[..., gym.Env[Any, Any]]]:
    """Builds registered environments and closes them in the end."""
    made = []

    def build(name: str = IDS[0], **options: Any) -> gym.Env[Any, Any]:
        made.append(gym.make(f"flexquant_rl.fq_env:{name}", **{**keywords, **options}))
        return made[-1]

    yield build
    for env in made:
        env.close()


@pytest.fixture(scope="module")
def env(make: Callable[..., gym.Env[Any, Any]]) -> gym.Env[Any, Any]:
    """One environment for the tests that reset it themselves."""
    return make()


def some_stdlib_text(split: StdlibSplit) -> dict[str, str]:
    """A part of it: all takes seconds, letter by letter."""
    return dict(list(stdlib_text(split).items())[:3])


def rollout(env: gym.Env[Any, Any], *, seed: int) -> list[tuple[Any, ...]]:
    """One episode with seeded random actions."""
    env.action_space.seed(seed)
    observation, info = env.reset(seed=seed)
    trace: list[tuple[Any, ...]] = [(observation, info)]
    done = False
    while not done:
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        trace.append((observation, reward, terminated, truncated, info))
        done = terminated or truncated
    return trace


def assert_same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine[0], theirs[0])
        assert mine[1:] == theirs[1:]


@pytest.mark.parametrize("check", [gymnasium_check_env, sb3_check_env], ids=["gymnasium", "sb3"])
@pytest.mark.parametrize("name", IDS)
def test_checkers_have_nothing_to_say(make: Callable[..., gym.Env[Any, Any]], name: str, check: Any) -> None:
    env = make(name)
    assert env.spec is not None
    assert env.spec.nondeterministic == ("Measured" in name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(env.unwrapped)


def test_flexquant_action_form_passes_the_checkers(make: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make(action="num_low_units", source="free", temperature=1.0, probe_every=2).unwrapped
    assert env.action_space == gym.spaces.Discrete(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(env, skip_close_check=True)
        sb3_check_env(env)


def test_flexquant_action_is_a_number(make: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make(action="num_low_units", low_width=3)
    env.reset(seed=0)
    widths = [env.step(count)[-1]["mean_bit_width"] for count in (0, np.int64(3), np.array(1))]
    assert widths[:2] == [8.0, 3.0]
    assert 3 < widths[2] < 8


@pytest.mark.parametrize("options", [{}, {"source": "free", "temperature": 1.0}], ids=["replay", "free"])
def test_two_environments_with_one_seed_agree(make: Callable[..., gym.Env[Any, Any]], options: dict[str, Any]) -> None:
    one, other = make(**options), make(**options)
    assert_same(rollout(one, seed=7), rollout(other, seed=7))
    first, second = rollout(one, seed=7), rollout(one, seed=8)
    assert first[0][1] != second[0][1]
    assert_same(first, rollout(other, seed=7))  # whatever was played before


def test_unseeded_resets_go_on_in_the_same_stream(env: gym.Env[Any, Any]) -> None:
    _, first = env.reset(seed=3)
    _, second = env.reset()
    assert first != second
    env.reset(seed=3)
    assert env.reset()[1] == second


def test_pickle_builds_the_same_environment(make: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make(split="validation").unwrapped
    twin = pickle.loads(pickle.dumps(env))
    assert isinstance(twin, DecodeEnvironment)
    assert twin.episodes.config == env.episodes.config  # type: ignore[attr-defined]
    assert_same(rollout(env, seed=1), rollout(twin, seed=1))
    twin.close()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_actions_keep_observations_in_bounds(env: gym.Env[Any, Any], data: st.DataObject) -> None:
    options = {"kl_weight": data.draw(st.floats(1e-6, 1e9), label="kl_weight")}
    observation, _ = env.reset(seed=data.draw(st.integers(0, 2**31), label="seed"), options=options)
    action = st.lists(st.integers(0, 4), min_size=3, max_size=3)
    for number in range(1, STEPS + 1):
        assert env.observation_space.contains(observation)
        observation, reward, terminated, truncated, info = env.step(np.array(data.draw(action)))
        assert np.isfinite(reward)
        assert reward == pytest.approx(info["time_saved"] - info["kl_cost"], rel=1e-5, abs=1e-5)
        assert info["time_saved"] == pytest.approx(1 - info["latency_ms"] / info["full_latency_ms"], abs=1e-6)
        assert info["kl_cost"] == pytest.approx(info["kl_weight"] * info["output_kl_nats"], rel=1e-5)
        assert info["kl_weight"] == pytest.approx(options["kl_weight"])
        assert 3 <= info["mean_bit_width"] <= 8
        assert (terminated, truncated) == (False, number == STEPS)
    assert env.observation_space.contains(observation)


def test_deterministic_latency_is_the_table_s(env: gym.Env[Any, Any], tiny_profile: Any) -> None:
    env.reset(seed=0)
    action = np.array([0, 2, 4])
    *_, info = env.step(action)
    widths = tiny_profile.cost.full_width().new_tensor([3, 5, 8])
    assert info["latency_ms"] == pytest.approx(float(tiny_profile.cost.latency_ms(widths)))
    assert info["time_saved"] == pytest.approx(1 - float(tiny_profile.cost.time_share(widths)))


def test_measured_latency_is_the_clock_s(make: Callable[..., gym.Env[Any, Any]], tiny_profile: Any) -> None:
    env = make(IDS[1])
    env.reset(seed=0)
    times = [env.step(np.array([4, 4, 4]))[-1]["latency_ms"] for _ in range(STEPS)]
    assert len(set(times)) > 1
    assert min(times) > 0.01  # the roofline says 12 microseconds; a real step through the model takes longer


def test_options_fix_window_and_dial(env: gym.Env[Any, Any]) -> None:
    one, info = env.reset(seed=0, options={"window": 5, "kl_weight": 3.0})
    assert info == {"window": 5, "kl_weight": 3.0}
    other, _ = env.reset(seed=1, options={"window": 5, "kl_weight": 3.0})
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, env.reset(options={"window": 6, "kl_weight": 3.0})[0])


def test_a_fixed_dial_is_kept(make: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make(kl_weight=12.0)
    assert [env.reset(seed=seed)[1]["kl_weight"] for seed in range(3)] == [12.0] * 3


def test_features_have_names(env: gym.Env[Any, Any]) -> None:
    names = env.unwrapped.feature_names  # type: ignore[attr-defined]
    observation, _ = env.reset(seed=0, options={"kl_weight": 42.0})
    assert (len(names),) == observation.shape == env.observation_space.shape
    assert observation[names.index("dial")] == pytest.approx(math.log10(42))
    env.step(np.array([0, 2, 4]))
    observation = env.step(np.array([1, 2, 4]))[0]
    last = [observation[names.index(f"{unit}/last_width")] * 8 for unit in ("layer.0", "layer.1", "head")]
    assert last == [4, 5, 8]


def test_rendering_shows_the_continuation(make: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make(render_mode="ansi")
    env.reset(seed=0, options={"window": 3})
    for _ in range(STEPS):
        env.step(env.action_space.sample())
    shown = env.render()
    assert isinstance(shown, str)
    text, bits = shown.rsplit("\n", 1)
    assert bits == legend((3, 4, 5, 6, 8))
    episodes = env.unwrapped.episodes  # type: ignore[attr-defined]
    assert re.sub(r"\x1b\[[0-9;]*m", "", text) == "".join(map(chr, episodes.windows[3, -STEPS - 1 :].tolist()))


def test_without_a_render_mode_nothing_is_rendered(keywords: dict[str, Any]) -> None:
    env = make_environment(**keywords)
    env.reset(seed=0)
    assert env.render() is None
    with pytest.raises(ValueError, match="render_mode='human' is not known"):
        make_environment(**keywords, render_mode="human")


def test_one_environment_plays_one_row() -> None:
    model = FakeModel()
    config = EnvConfig(prompt_tokens=3, max_new_tokens=4)
    profile, session = fake_profile(model), FakeSession(model, num_rows=2)
    episodes = Episodes(session, profile, fake_windows(1, config.window_tokens), config)
    with pytest.raises(ValueError, match="2 rows; an Environment plays one"):
        Environment(episodes, LossyTask(model, profile, config))


def test_splits_have_text_of_their_own(make: Callable[..., gym.Env[Any, Any]]) -> None:
    observations = [
        make(split=split).reset(seed=0, options={"window": 0, "kl_weight": 1.0})[0]
        for split in ("train", "validation", "test")
    ]
    assert not np.array_equal(observations[0], observations[1])
    assert not np.array_equal(observations[1], observations[2])


def test_without_a_profile_one_is_measured(make: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make(profile=None)
    profile = env.unwrapped.episodes.profile  # type: ignore[attr-defined]
    assert profile.cost.source == "roofline"
    assert (profile.sensitivity[:, :-1] > profile.sensitivity[:, 1:]).all()
    env.reset(seed=0)
    env.step(env.action_space.sample())


def test_closing_twice_is_fine(make: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make().unwrapped
    env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.step(env.action_space.sample())


def test_an_environment_that_failed_to_start_can_be_closed() -> None:
    env = DecodeEnvironment.__new__(DecodeEnvironment)
    env.close()


def test_docstring_is_gymnasium_s_card() -> None:
    assert DecodeEnvironment.__doc__ is not None
    headings = [line.strip().removeprefix("## ") for line in DecodeEnvironment.__doc__.splitlines() if "## " in line]
    assert headings == list(CARD)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"split": "valid"}, "split='valid' is not known; choose one of train, validation, test"),
        ({"max_new_tokens": 200, "prompt_tokens": 100}, "the model's context holds 128"),
        ({"texts": ["no/such/file.txt"]}, "is not a file"),
        ({"texts": "no/such/file.txt"}, "no/such/file.txt is not a file"),
        ({"profile": "no/such/profile.json"}, "run `fq profile`"),
        ({"action": "num_low_units", "low_width": 7}, "low_width=7 is not stored"),
        ({"max_new_token": 5}, "argument 'max_new_token' is not known; did you mean max_new_tokens?"),
        ({"prompt_tokens": "4"}, "prompt_tokens='4' must be an integer"),
        ({"prompt_tokens": 4.0}, "prompt_tokens=4.0 must be an integer"),
        ({"prompt_tokens": True}, "prompt_tokens=True must be an integer"),
        ({"kl_weight": "fast"}, "kl_weight='fast' must be a number or nothing"),
        ({"kl_weight_max": 10**400}, "must be a number"),
        ({"source": 3}, "source=3 must be one of replay, free"),
        ({"temperature": 1e-42}, "temperature=1e-42 is below 1e-06, where logits"),
        ({"texts": 5}, "texts=5 must be paths of text files"),
        ({"texts": [5]}, "texts=[5] must be paths of text files"),
        ({"model": 5}, "model=5 must be a path"),
        ({"profile": ["a"]}, "profile=['a'] must be a path"),
        ({"measured": "yes"}, "measured='yes' must be True or False"),
        ({"task": "lossy"}, "task='lossy' must be a class derived from LossyTask"),
        ({"split": ["train"]}, "split=['train'] is not known"),
        ({"text_field": "body"}, "--text-field body: no --text file is a .jsonl file"),
    ],
)
def test_mistakes_are_named_in_one_line(keywords: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        make_environment(**{**keywords, **options})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ([0, 9, 4], "action 9 at [1] is out of range; give one of MultiDiscrete([5 5 5])"),
        ([0, -1, 4], "action -1 at [1] is out of range"),
        ([0, 1, 2**40], "is out of range"),
        ([0, 1, 2**63], "is not of 64-bit integers"),
        ([0, 1, 2**70], "is not of 64-bit integers"),
        ([0.0, 1.0, 2.0], "action [0.0, 1.0, 2.0] is not of 64-bit integers"),
        ([True, False, True], "is not of 64-bit integers"),
        (["0", "1", "2"], "is not of 64-bit integers"),
        (None, "action None is not of 64-bit integers"),
        ([[0], [1, 2]], "is not an array"),
        ([0, 1], "the action has shape (2,), not (3,)"),
        (3, "the action has shape (), not (3,)"),
    ],
)
def test_actions_outside_the_space_are_refused(env: gym.Env[Any, Any], action: Any, says: str) -> None:
    env.reset(seed=0)
    with pytest.raises(InputError) as error:
        env.step(action)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    env.step(np.array([0, 4, 4], dtype=np.uint8))  # the episode goes on


@pytest.mark.parametrize(("action", "says"), [(4, "action 4 is out of range; give one of Discrete(4)"), (1.5, "1.5")])
def test_counts_outside_the_space_are_refused(make: Callable[..., gym.Env[Any, Any]], action: Any, says: str) -> None:
    env = make(action="num_low_units")
    env.reset(seed=0)
    with pytest.raises(InputError) as error:
        env.step(action)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("reset", "says"),
    [
        ({"seed": -1}, "seed=-1 is not one of 64 bits; use 0 to 18446744073709551615"),
        ({"seed": 2**64}, f"seed={2**64} is not one of 64 bits"),
        ({"seed": 10**5000}, "is not one of 64 bits"),
        ({"seed": 1.5}, "seed=1.5 is not an integer"),
        ({"seed": "7"}, "seed='7' is not an integer"),
        ({"seed": True}, "seed=True is not an integer"),
        (
            {"options": {"windw": 3}},
            "reset option 'windw' is not known; did you mean window? there are",
        ),
        ({"options": {3: 3}}, "reset option 3 is not known"),
        ({"options": ["window"]}, "options=['window'] is not a dictionary"),
        ({"options": {"window": 1.5}}, "window=1.5 is not an integer"),
        ({"options": {"window": None}}, "window=None is not an integer"),
        ({"options": {"kl_weight": "fast"}}, "kl_weight='fast' is not a number"),
        ({"options": {"kl_weight": 10**400}}, "is too large"),
    ],
)
def test_resets_that_cannot_be_are_refused(env: gym.Env[Any, Any], reset: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        env.reset(**reset)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, np.int64(5)])
def test_seeds_of_64_bits_are_taken(env: gym.Env[Any, Any], seed: Any) -> None:
    assert env.reset(seed=seed)[1] == env.reset(seed=int(seed))[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"action": "num_low_units"}, {"source": "free", "temperature": 1.0}, {"profile": None}],
    ids=["replay", "num_low_units", "free", "profiled"],
)
def test_the_default_dtype_changes_nothing(make: Callable[..., gym.Env[Any, Any]], options: dict[str, Any]) -> None:
    forget_shared()
    before = rollout(make(**options), seed=5)
    forget_shared()
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(rollout(make(**options), seed=5), before)
    finally:
        torch.set_default_dtype(torch.float32)
        forget_shared()


def test_a_profile_of_another_model_is_refused(keywords: dict[str, Any], tiny_profile: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    tiny_profile.save(path)
    path.write_text(path.read_text(encoding="utf-8").replace(tiny_profile.fingerprint, "0" * 64), encoding="utf-8")
    with pytest.raises(InputError, match="the profile is of model 000000000000"):
        make_environment(**{**keywords, "profile": str(path)})


@pytest.mark.parametrize("kl_weight", [0.0, -1.0, float("nan")])
def test_a_dial_that_prices_nothing_is_refused(env: gym.Env[Any, Any], kl_weight: float) -> None:
    with pytest.raises(InputError, match="must be positive and finite"):
        env.reset(options={"kl_weight": kl_weight})


def test_default_model_and_text(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.setattr("flexquant_rl.engine.embedded.embedded_model_path", lambda: tiny_model_dir)
    monkeypatch.setattr(prompts, "stdlib_text", some_stdlib_text)
    forget_shared()
    env = make_environment(prompt_tokens=4, max_new_tokens=3, split="test")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    env.close()
    forget_shared()  # of this part of the text


def test_an_episode_that_is_over_says_so(env: gym.Env[Any, Any]) -> None:
    plain = env.unwrapped
    plain.reset(seed=3)
    for _ in range(STEPS):
        *_, terminated, truncated, _ = plain.step(np.full(3, 2))
        if terminated or truncated:
            break
    with pytest.raises(InputError, match=r"the episode is over.*call reset\(\)"):
        plain.step(np.full(3, 2))
    plain.reset(seed=3)
    plain.step(np.full(3, 2))
