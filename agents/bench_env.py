"""How many env steps per second the batched environment makes, reference KL included."""

from __future__ import annotations

import os
import platform
import statistics
import time
from typing import Any

import numpy as np
import torch

from flexquant_rl.agents.training import Prepared
from flexquant_rl.engine.decode import DecodeSession
from flexquant_rl.fq_env.vec_env import DecodeVecEnv


def bench_env(prepared: Prepared, *, num_envs: int, rounds: int) -> dict[str, Any]:
    """Times whole rollouts at random widths: every unit of every row draws anew at every token, the hardest case.

    Args:
        prepared: Model, text and profile.
        num_envs: Rows.
        rounds: Rollouts timed, after one that is not; restarts and reference passes count.

    Returns:
        A JSON-able row with median and quartiles.
    """
    session = DecodeSession(prepared.model, num_rows=num_envs, max_length=prepared.env.window_tokens - 1)
    env = DecodeVecEnv(session, prepared.profile, prepared.windows.train, prepared.env, num_envs=num_envs)
    generator = np.random.default_rng(0)
    steps = prepared.env.max_new_tokens
    env.reset()
    rates = []
    for round_idx in range(rounds + 1):
        actions = generator.integers(len(prepared.model.bit_widths), size=(steps, num_envs, prepared.model.num_units))
        began = time.perf_counter()
        for action in actions:
            env.step(action)
        if round_idx:
            rates.append(steps * num_envs / (time.perf_counter() - began))
    env.close()
    quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else [rates[0]] * 3
    return {
        "bench": "env",
        "env_steps_per_s": statistics.median(rates),
        "env_steps_per_s_q1": quartiles[0],
        "env_steps_per_s_q3": quartiles[2],
        "num_envs": num_envs,
        "rounds": rounds,
        "reference": prepared.profile.reference,
        "model_fingerprint": prepared.model.fingerprint,
        "device": prepared.model.device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
