"""How many env steps per second the batched environments make: of a model, reference KL included, or of a recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from numpy.typing import NDArray

from flexquant_rl.agents.config import EnvBench, TrainConfig
from flexquant_rl.agents.preparation import prepare
from flexquant_rl.engine.benches.clocks import WALL
from flexquant_rl.engine.benches.harness import Provider, Row, Track, interleave, quartiles, rows
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.traces import read_traces
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.registration import DECODE, VERIFIED_DECODE
from flexquant_rl.fq_env.task import LossyTask
from flexquant_rl.fq_env.vec_env import DecodeVecEnv, EpisodeVecEnv, VerifiedVecEnv
from flexquant_rl.fq_env.verified_making import make_rounds

_TRACE_STEPS = 1000
"""Steps of a rollout over a recording, which take no model."""


def bench_env(config: EnvBench, track: Track = iter) -> list[Row]:
    """Times whole rollouts at random actions.

    Args:
        config: Model and text, or a recording, and the size. One rollout more is not timed; restarts count, and so do
            reference passes.
        track: Wraps the loop over rollouts.

    Returns:
        One row: median and quartiles of env steps per second, and of the time of a step of the whole batch.

    Raises:
        InputError: If model, text or recording cannot be used.
    """
    env, facts = _of_model(config) if config.traces is None else _of_traces(config, config.traces)
    generator = np.random.default_rng(0)
    num_steps = facts.pop("num_steps")
    env.reset()

    def turn() -> list[float]:
        actions = [_random_actions(env, generator) for _ in range(num_steps)]

        def rollout() -> None:
            for action in actions:
                env.step(action)

        return [WALL.seconds(rollout) / len(actions)]

    provider = Provider("batched_env", turn)
    interleave([provider], config.rounds, track)
    env.close()
    lower, median, upper = quartiles([config.num_envs / seconds for seconds in provider.times_s])
    common = {
        "op": "env",
        "env_steps_per_s": round(median, 1),
        "env_steps_per_s_p25": round(lower, 1),
        "env_steps_per_s_p75": round(upper, 1),
        "num_envs": config.num_envs,
        "clock": WALL.name,
        "num_threads": torch.get_num_threads(),
    }
    return rows([provider], common | facts)


def _of_model(config: EnvBench) -> tuple[EpisodeVecEnv, dict[str, Any]]:
    """The environment of widths. At random every unit of every row draws anew at every token: the hardest case."""
    prepared = prepare(TrainConfig(model=config.model, text=config.text), None)
    session = DecodeSession(prepared.model, num_rows=config.num_envs, max_length=prepared.env.window_tokens - 1)
    episodes = Episodes(session, prepared.profile, prepared.windows.train, prepared.env)
    return DecodeVecEnv(episodes, LossyTask(prepared.model, prepared.profile, prepared.env)), {
        "env": DECODE,
        "num_steps": prepared.env.max_new_tokens,
        "reference": reference_name(prepared.model),
        "model_fingerprint": prepared.model.fingerprint,
        "device": prepared.model.device.type,
    }


def _of_traces(config: EnvBench, directory: str) -> tuple[EpisodeVecEnv, dict[str, Any]]:
    """The environment of drafts; what its steps are said to cost does not change what they take here."""
    traces = read_traces(Path(directory))
    levels, depth = len(traces.plan.draft_widths), traces.plan.depth
    costs = VerifyCosts("modelled", 1.0, 1.0, (0.5,) * levels, (1.0,) * (depth + 1))
    rounds, task = make_rounds(traces, costs, num_rows=config.num_envs)
    return VerifiedVecEnv(rounds, task), {
        "env": VERIFIED_DECODE,
        "num_steps": _TRACE_STEPS,
        "num_sequences": len(traces.of_split("train")),
        "draft_widths": list(traces.plan.draft_widths),
        "depth": depth,
        "model_fingerprint": traces.plan.fingerprint,
        "device": "cpu",
    }


def _random_actions(env: EpisodeVecEnv, generator: np.random.Generator) -> NDArray[np.int64]:
    """An action for each row, each of its choices as likely."""
    space = env.action_space
    if isinstance(space, Discrete):
        return generator.integers(space.n, size=env.num_envs)
    assert isinstance(space, MultiDiscrete)
    return generator.integers(space.nvec, size=(env.num_envs, *space.nvec.shape))
