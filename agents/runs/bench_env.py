"""How many env steps per second the batched environment makes, reference KL included."""

from __future__ import annotations

import numpy as np
import torch

from flexquant_rl.agents.config import EnvBench, TrainConfig
from flexquant_rl.agents.preparation import prepare
from flexquant_rl.engine.benches.clocks import WALL
from flexquant_rl.engine.benches.harness import Provider, Row, Track, interleave, quartiles, rows
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.task import LossyTask
from flexquant_rl.fq_env.vec_env import DecodeVecEnv


def bench_env(config: EnvBench, track: Track = iter) -> list[Row]:
    """Times whole rollouts at random widths: every unit of every row draws anew at every token, the hardest case.

    Args:
        config: Model, text and size. One rollout more is not timed; restarts and reference passes count.
        track: Wraps the loop over rollouts.

    Returns:
        One row: median and quartiles of env steps per second, and of the time of a step of the whole batch.
    """
    prepared = prepare(TrainConfig(model=config.model, text=config.text), None)
    session = DecodeSession(prepared.model, num_rows=config.num_envs, max_length=prepared.env.window_tokens - 1)
    episodes = Episodes(session, prepared.profile, prepared.windows.train, prepared.env)
    env = DecodeVecEnv(episodes, LossyTask(prepared.model, prepared.profile, prepared.env))
    generator = np.random.default_rng(0)
    size = (prepared.env.max_new_tokens, config.num_envs, prepared.model.num_units)
    env.reset()

    def turn() -> list[float]:
        actions = generator.integers(len(prepared.model.bit_widths), size=size)

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
        "reference": reference_name(prepared.model),
        "model_fingerprint": prepared.model.fingerprint,
        "device": prepared.model.device.type,
        "num_threads": torch.get_num_threads(),
    }
    return rows([provider], common)
