"""The task of drafts and verification: an action verifies or drafts at a level, tokens are worth the time they save."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from flexquant_rl.engine.control.signals import SIGNAL_LIMIT
from flexquant_rl.engine.control.verified_signals import VerifiedSchema
from flexquant_rl.fq_env.task import Reward
from flexquant_rl.fq_env.trace_rounds import RoundFacts


class VerifiedTask:
    """Each step verifies what waits, or drafts one more token at one of a few levels. Nothing is lost.

    Args:
        schema: What is seen.
    """

    def __init__(self, schema: VerifiedSchema) -> None:
        self._schema = schema

    @property
    def action_space(self) -> gym.spaces.Discrete:
        """0 verifies now, 1 to L draft at level 0 to L - 1."""
        return gym.spaces.Discrete(self._schema.num_levels + 1)

    @property
    def observation_space(self) -> gym.spaces.Box:
        """See `VerifiedSchema`."""
        return gym.spaces.Box(-SIGNAL_LIMIT, SIGNAL_LIMIT, (self._schema.dim,), dtype=np.float32)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the elements of an observation, in order."""
        return self._schema.names

    def start(self, episodes: Any, rows: Tensor) -> None:
        """Nothing to learn."""

    def to_decision(self, actions: Tensor) -> Tensor:
        """Actions `[R]` are decisions."""
        return actions

    def to_actions(self, decision: Tensor) -> Tensor:
        """The same."""
        return decision

    def reward(self, facts: RoundFacts) -> Reward:
        """See `verified_reward`."""
        return verified_reward(facts.num_emitted, facts.latency_ms / facts.full_latency_ms)

    def info(self, facts: RoundFacts, reward: Reward) -> dict[str, Tensor]:
        """The terms of the reward and the facts that they come from."""
        return {
            **reward.terms,
            "num_drafted": facts.num_drafted,
            "num_accepted": facts.num_accepted,
            "num_emitted": facts.num_emitted,
            "latency_ms": facts.latency_ms.float(),
            "full_latency_ms": torch.full_like(facts.latency_ms, facts.full_latency_ms).float(),
        }

    def observation(self, signals: Tensor) -> Tensor:
        """As it is."""
        return signals


def verified_reward(num_emitted: Tensor, time_share: Tensor) -> Reward:
    """`tokens emitted - time / full-width step time`: 0 for a plain step at the largest width.

    It adds up: N tokens in time T earn `N - T / t_full`. Text that is verified at the largest width has no KL to price.

    Args:
        num_emitted: `[R]` tokens that became settled.
        time_share: `[R]` time of the step over that of a plain step at the largest width.

    Returns:
        The total, and its terms: `reward_plain`, the total; `tokens_worth`, what is emitted; `time_spent`, in
        full-width steps.
    """
    tokens_worth, time_spent = num_emitted.float(), time_share.float()
    total = tokens_worth - time_spent
    return Reward(total, {"reward_plain": total, "tokens_worth": tokens_worth, "time_spent": time_spent})
