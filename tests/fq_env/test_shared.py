"""Models, texts and profiles are made once in a process, and anew when what decides them has changed."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from flexquant_rl.engine.control.profile import num_profile_windows
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env import shared
from flexquant_rl.fq_env.making import DecodeEnvironment, VectorDecodeEnvironment, make_environment
from flexquant_rl.fq_env.shared import Shelf, forget_shared, shared_model, shared_profile, shared_windows


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the slow functions in the order of their calls."""
    forget_shared()
    made: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(shared, name)
        return lambda *args, **kwargs: made.append(name) or original(*args, **kwargs)

    for name in ("load_model", "load_windows", "profile_model"):
        monkeypatch.setattr(shared, name, counted(name))
    yield made
    forget_shared()


@pytest.fixture
def options(tiny_model_dir: Path, text_file: Path) -> dict[str, Any]:
    """Short episodes on the tiny model, which is profiled."""
    return {"model": str(tiny_model_dir), "texts": [str(text_file)], "prompt_tokens": 4, "max_new_tokens": 3}


def test_making_twice_costs_once(calls: list[str], options: dict[str, Any]) -> None:
    name = "flexquant_rl.fq_env:FlexQuant/Decode-v1"
    one = gym.make(name, **options)
    assert sorted(calls) == ["load_model", "load_windows", "profile_model"]
    two = gym.make(name, **options, split="test", kl_weight=3.0)
    batch = gym.make_vec(name, num_envs=2, **options)
    measured = gym.make("FlexQuant/MeasuredDecode-v1", **options)
    assert len(calls) == 3
    assert isinstance(one.unwrapped, DecodeEnvironment)
    assert isinstance(two.unwrapped, DecodeEnvironment)
    assert isinstance(batch, VectorDecodeEnvironment)
    assert one.unwrapped.episodes.model is two.unwrapped.episodes.model is batch.episodes.model
    assert one.unwrapped.episodes.profile is two.unwrapped.episodes.profile is batch.episodes.profile
    one.close()
    two.reset(seed=0)  # what they share is not closed with one of them
    for env in (two, batch, measured):
        env.close()


def test_other_episodes_are_profiled_on_windows_of_their_own(calls: list[str], options: dict[str, Any]) -> None:
    make_environment(**options).close()
    make_environment(**{**options, "max_new_tokens": 5}).close()
    assert sorted(calls) == ["load_model", "load_windows", "load_windows", "profile_model", "profile_model"]


def test_the_profile_sees_all_of_the_text(calls: list[str], options: dict[str, Any]) -> None:
    model = shared_model(options["model"])
    windows = shared_windows(model, 8, [Path(text) for text in options["texts"]])
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "profile_model", lambda model, read, cost: seen.append(read))
        shared_profile(model, windows)
    assert len(seen[0]) == num_profile_windows(model, 7) == 12 < len(windows.train)
    assert seen[0][[0, -1]].tolist() == windows.train[[0, -1], :-1].tolist()


def test_a_model_or_text_that_is_written_anew_is_read_anew(
    calls: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(options["model"], model)
    shutil.copy(options["texts"][0], text)
    first = shared_model(str(model))
    assert shared_model(str(model)) is first
    assert shared_model(os.path.relpath(model)) is not None
    windows = shared_windows(first, 8, [text])
    assert shared_windows(first, 8, [text]) is windows
    text.write_text(text.read_text(encoding="utf-8") + "\n\nmore", encoding="utf-8")
    assert shared_windows(first, 8, [text]) is not windows
    os.utime(model / "config.json", ns=(1, 1))
    assert shared_model(str(model)) is not first


def test_a_failure_is_not_kept(calls: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    model = shared_model(options["model"])
    text = tmp_path / "later.txt"
    with pytest.raises(InputError, match="is not a file"):
        shared_windows(model, 8, [text])
    shutil.copy(options["texts"][0], text)
    assert len(shared_windows(model, 8, [text]).train)


def test_a_shelf_keeps_the_last_few() -> None:
    shelf: Shelf[list[int]] = Shelf(2)
    made: list[int] = []

    def get(key: int) -> list[int]:
        return shelf.get(key, lambda: [made.append(key) or key])  # type: ignore[func-returns-value]

    one = get(1)
    assert get(1) is one
    get(2)
    get(1)
    get(3)  # 2 was asked for longest ago
    assert get(1) is one
    assert made == [1, 2, 3]
    get(2)
    assert made == [1, 2, 3, 2]
    shelf.clear()
    assert get(1) is not one


def test_threads_that_ask_at_once_share_one_result() -> None:
    shelf: Shelf[object] = Shelf(2)
    barrier, results = threading.Barrier(4), []

    def ask() -> None:
        barrier.wait()
        results.append(shelf.get("key", object))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(map(id, results))) == 1
