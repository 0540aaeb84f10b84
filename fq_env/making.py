"""From a model and some text to an environment; what is registered with Gymnasium is made here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from gymnasium.utils import EzPickle

from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.choice import session_opener
from flexquant_rl.engine.decoding.decoder import DecoderModel
from flexquant_rl.engine.decoding.options import DecoderName
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import shown
from flexquant_rl.fq_env.arguments import check_names, check_texts
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.environment import Environment
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.prompts import Split
from flexquant_rl.fq_env.shared import shared_model, shared_profile, shared_windows
from flexquant_rl.fq_env.task import LossyTask, Task
from flexquant_rl.fq_env.vector_environment import VectorEnvironment

TaskMaker = Callable[[DecoderModel, Profile, EnvConfig], Task]
"""Makes the task of a model; a class derived from `LossyTask` is one."""


def _use_one_thread() -> None:
    """OpenMP's threads do not survive a fork, and whoever waits for them waits for ever."""
    torch.set_num_threads(1)


# Gymnasium's asynchronous vector environments fork by default.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_use_one_thread)


def make_episodes(
    num_rows: int = 1,
    *,
    model: str | None = None,
    texts: Sequence[str] = (),
    split: Split = "train",
    profile: str | None = None,
    measured: bool = False,
    task: TaskMaker = LossyTask,
    text_field: str | None = None,
    **config: Any,
) -> tuple[Episodes, Task]:
    """Makes what every environment consists of. Model, text and profile are made once in a process and shared.

    Args:
        num_rows: Episodes in lockstep.
        model: Hugging Face directory, hub name, nested checkpoint or .gguf file; default: the embedded model.
        texts: Text files; default: standard-library modules that the embedded model has not seen.
        split: `train`, `validation` or `test`.
        profile: A `profile.json`; default: sensitivities measured here, latency by the bytes read.
        measured: Take latencies from the clock, with the fastest decoder. One row only.
        task: Makes the task.
        text_field: Field of the rows of `.jsonl` files that is the text; default: their chats, else all their strings.
        **config: Fields of `EnvConfig`.

    Raises:
        InputError: If an argument cannot be used, or not with the others.
    """
    names = [field.name for field in fields(EnvConfig)]
    check_names("argument", config, names)
    env_config = EnvConfig(**config)
    env_config.validate()
    _check_types(num_rows=num_rows, model=model, profile=profile, measured=measured, task=task, text_field=text_field)
    if split not in get_args(Split):
        raise InputError(f"split={shown(split)} is not known; choose one of {', '.join(get_args(Split))}")
    paths = [*map(Path, check_texts(texts))]
    nested = shared_model(None if model is None else str(model))
    windows = shared_windows(nested, env_config.window_tokens, paths, text_field)
    if profile is not None:
        loaded = Profile.load(Path(profile))
        loaded.check(nested)
    else:
        loaded = shared_profile(nested, windows)
    # Timed steps are those of the fastest decoder; the deterministic environment stays with the reference one.
    decoder: DecoderName = "auto" if measured else "hf"
    episodes = Episodes(
        session_opener(nested, max_length=env_config.window_tokens - 1, decoder=decoder)(num_rows),
        loaded,
        windows.split(split),
        env_config,
        eos_token_ids=nested.eos_token_ids,
        measured=measured,
        tokenizer=nested.tokenizer,
    )
    return episodes, task(nested, loaded, env_config)


def _check_types(*, num_rows: Any, measured: Any, task: Any, text_field: Any, **paths: Any) -> None:
    """Raises InputError on an argument of `make_episodes` of a type that it does not take."""
    rules = [
        ("num_envs", num_rows, type(num_rows) is int and num_rows > 0, "an integer above 0"),
        ("measured", measured, isinstance(measured, bool), "True or False"),
        ("task", task, callable(task), "a class derived from LossyTask, or what makes a task"),
        ("text_field", text_field, text_field is None or isinstance(text_field, str), "the name of a field"),
    ]
    rules += [
        (name, path, path is None or isinstance(path, (str, os.PathLike)), "a path") for name, path in paths.items()
    ]
    for name, value, holds, wanted in rules:
        if not holds:
            raise InputError(f"{name}={shown(value)} must be {wanted}; give one")


class DecodeEnvironment(Environment, EzPickle):
    """One sequence through one model, with a bit-width per unit chosen anew for every token.

    ## Description
    A language model reads or writes a text token by token. Before each token an agent chooses how many bits of every
    unit's weights are read. Fewer bits are faster, and move the output distribution away from the full-precision
    model's; keys and values written at few bits also disturb all later tokens of the episode.

    ## Action Space
    `MultiDiscrete([num_widths] * num_units)`: index into the stored widths (default 3, 4, 5, 6, 8) for each unit,
    decoder layers first, the lm_head last. With `action="num_low_units"`: `Discrete(num_units + 1)`, how many units,
    least sensitive first, run at `low_width`.

    ## Observation Space
    `Box(-10, 10, (num_global + num_units * num_per_unit,), float32)`: the signals of `engine/control/signals.py`, all
    known before the step. `feature_names` names every element. Global: entropies, top-1 probability and margin,
    surprisal of the token to be read, KL between the last two outputs, last probe, mean width, position, the dial, and
    a projection of the input embedding. Per unit: profiled sensitivity and time saved at each width, relative residual
    update, crest, last width, depth.

    ## Rewards
    `1 - latency_ms / full_latency_ms - kl_weight * output_kl_nats`: the share of time saved against a step at the
    largest width everywhere, less the priced KL(reference || quantised) on the same prefix. An episode of N tokens
    earns N less its time in full-width steps less its priced KL. The parts are in `info`: `time_saved`, `kl_cost`,
    `latency_ms`, `full_latency_ms`, `output_kl_nats`, `mean_bit_width`, `kl_weight`.

    ## Starting State
    A prompt drawn from the split's text and read at the largest width; a dial drawn log-uniformly unless fixed.

    ## Episode End
    1. Termination: the next token is one of the model's EOS tokens.
    2. Truncation: `max_new_tokens` steps.

    ## Arguments
    `model`: a Hugging Face directory, hub name, nested checkpoint or .gguf file (default: the embedded model).
    `texts`: files (default: held-out standard-library modules). `split`: `train`, `validation` or `test`. `profile`: a
    `profile.json` (default: measured, once in a process). `task`: what makes the task (default: the lossy one above).
    `render_mode`: `ansi` or none. `text_field`: the field of `.jsonl` rows that is the text. Any field of `EnvConfig`
    by name.
    `reset(options={"window": i, "kl_weight": x})` fixes the prompt or the dial.

    ## Version History
    `FlexQuant/Decode-v1` takes latency from the profile's table and is deterministic; `FlexQuant/MeasuredDecode-v1`
    times each step with the wall clock and is not.
    * v1: a step earns the share of time saved; in v0 it earned its speedup less 1. The terms in `info` follow.
    * v0: first version. Before the first release the action of `num_low_units` became `Discrete(num_units + 1)`, from
      `MultiDiscrete([num_units + 1])`, and any of several EOS tokens ends an episode; what the other actions give is as
      it was.
    """

    def __init__(
        self,
        model: str | None = None,
        texts: Sequence[str] = (),
        split: Split = "train",
        profile: str | None = None,
        measured: bool = False,
        task: TaskMaker = LossyTask,
        render_mode: str | None = None,
        text_field: str | None = None,
        **config: Any,
    ) -> None:
        EzPickle.__init__(self, model, texts, split, profile, measured, task, render_mode, text_field, **config)
        episodes, made_task = make_episodes(
            model=model,
            texts=texts,
            split=split,
            profile=profile,
            measured=measured,
            task=task,
            text_field=text_field,
            **config,
        )
        super().__init__(episodes, made_task, render_mode=render_mode)


class VectorDecodeEnvironment(VectorEnvironment, EzPickle):
    """Several sequences of `DecodeEnvironment` through one pass per step; the vector entry point of both ids.

    Args:
        num_envs: Rows.
        render_mode: `ansi` or none.
        **options: As for `make_episodes`.

    Raises:
        InputError: As `make_episodes`; also if several rows are to be timed by the clock.
    """

    def __init__(self, num_envs: int = 1, render_mode: str | None = None, **options: Any) -> None:
        EzPickle.__init__(self, num_envs, render_mode, **options)
        episodes, task = make_episodes(num_envs, **options)
        super().__init__(episodes, task, render_mode=render_mode)


def make_environment(
    model: str | None = None,
    texts: Sequence[str] = (),
    *,
    split: Split = "train",
    profile: str | None = None,
    measured: bool = False,
    task: TaskMaker = LossyTask,
    render_mode: str | None = None,
    text_field: str | None = None,
    **config: Any,
) -> DecodeEnvironment:
    """Makes the environment that `gymnasium.make("FlexQuant/Decode-v1")` wraps; arguments as for `make_episodes`."""
    return DecodeEnvironment(model, texts, split, profile, measured, task, render_mode, text_field, **config)
