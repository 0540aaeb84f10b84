"""Runs that take seconds: small arguments of `train.py`, and what is cut short beside them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from flexquant_rl.agents.evaluation import wall_clock
from flexquant_rl.agents.evaluation.wall_clock import ClockedShares
from flexquant_rl.agents.runs import verified_ppo, verified_run
from flexquant_rl.agents.runs.imitation import clone
from flexquant_rl.engine.model import NestedCausalLM

# 64 env steps in all.
TINY_LEARNING = (
    *("--verified.live-prompts", 1, "--env-steps", 64, "--verified.ppo.num-envs", 4, "--verified.ppo.rollout-steps", 8),
    *("--verified.ppo.batch-size", 16, "--verified.ppo.num-epochs", 1),
)
# On 96 tokens, 12 of each sequence.
TINY_RECORDING = (
    *("--verified.tokens", 96, "--verified.widths", 3, 5, "--verified.depth", 2),
    *("--verified.prompt-tokens", 8, "--verified.max-new-tokens", 12, *TINY_LEARNING),
)
TINY_DRAFTS = ("--task", "verified", *TINY_RECORDING)


def no_clock(*arguments: Any, **_: object) -> ClockedShares:
    """In place of `measured_time_shares`: every policy takes as long as the largest width."""
    count = len(arguments[4])
    return ClockedShares((1.0,) * count, (0.0,) * count, 5)


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes long and what no later phase builds on: most of the cloning, clocks and pictures."""
    monkeypatch.setattr("flexquant_rl.agents.runs.training.clone", partial(clone, num_steps=10))
    monkeypatch.setattr(
        "flexquant_rl.agents.evaluation.contest.measured_time_shares",
        no_clock,
    )
    for name in ("plot_pareto", "plot_bits", "plot_learning_curve"):
        monkeypatch.setattr(f"flexquant_rl.agents.runs.phases.{name}", lambda *_, **__: None)


def make_drafts_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights choose EOS soon; here it is a token like the others. What takes seconds is cut short."""
    monkeypatch.setattr(NestedCausalLM, "eos_token_ids", ())
    monkeypatch.setattr(verified_ppo, "_CLONE_STEPS", 20)
    monkeypatch.setattr(wall_clock, "_TIMING_S_EACH", 0.0)


def leave_out_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clock and picture take seconds, and say nothing of what is kept."""
    monkeypatch.setattr(verified_run, "plot_drafts", lambda *_, **__: None)
    monkeypatch.setattr(verified_run, "measured_time_shares", no_clock)
