"""How long policies take for a token on the prompts of tasks: by the clock, in turns, and by the latency table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexquant_rl.agents.commands.servable import Servable
from flexquant_rl.agents.progress import track
from flexquant_rl.agents.tasks.rows import TaskTimeRow
from flexquant_rl.engine.control.controller import make_controller
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.decoding.choice import SessionOpener, session_opener

_ROUNDS = 3
_PLAIN = ""
"""Stands for plain decoding at the largest width among the policies' names, none of which is empty."""


@dataclass(frozen=True)
class Timed:
    """A policy whose time is wanted.

    Attributes:
        servable: The policy and its model; all policies have the same one.
        kl_weight: Its dial; None without one.
        policy_sha256: As in `TaskTimeRow`.
    """

    servable: Servable
    kl_weight: float | None
    policy_sha256: str


def time_policies(
    policies: Mapping[str, Timed],
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    num_threads: int | None,
    timing_sha256: str,
) -> list[TaskTimeRow]:
    """Continues prompts greedily with each policy in turn, three times, and beside them at the largest width.

    Args:
        policies: By name.
        prompts: `[T]` int64 each; at least one, none empty.
        max_new_tokens: Tokens of each continuation; nothing ends it earlier.
        num_threads: Threads of a step.
        timing_sha256: As in `TaskTimeRow`.
    """
    model = next(iter(policies.values())).servable.model
    longest = max(map(len, prompts)) + max_new_tokens
    opener = session_opener(model, max_length=min(longest, model.max_context), num_threads=num_threads)
    names = [_PLAIN, *policies]
    took: dict[str, list[float]] = {name: [0.0] * _ROUNDS for name in names}
    tokens: dict[str, list[GeneratedToken]] = {name: [] for name in names}
    turns = [(number, prompt) for number in range(_ROUNDS) for prompt in prompts]
    for place, (number, prompt) in enumerate(track(turns, "timing policies in turns")):
        first = place % len(names)  # nobody always follows the same one
        for name in [*names[first:], *names[:first]]:
            made = _continue(opener, policies.get(name), model, prompt, max_new_tokens)
            took[name][number] += sum(token.latency_ms for token in made)
            if number == 0:
                tokens[name] += made
    per_token = {name: float(np.median(took[name])) / len(tokens[name]) for name in names}
    return [
        _row(name, timed, timing_sha256, per_token[name], per_token[_PLAIN], tokens[name])
        for name, timed in policies.items()
    ]


def _continue(
    opener: SessionOpener, timed: Timed | None, model: Any, prompt: Tensor, max_new_tokens: int
) -> list[GeneratedToken]:
    """The tokens behind the first one, which is of the prompt."""
    if timed is None:
        plain = StaticAllocation("plain", torch.full((model.num_units,), max(model.bit_widths)))
        controller = make_controller(model, plain, None)
    else:
        controller = make_controller(model, timed.servable.policy, timed.servable.profile)
    dial = 1.0 if timed is None or timed.kl_weight is None else timed.kl_weight
    runner = PolicyRunner(opener(1), controller)
    request = Request(prompt, max_new_tokens, kl_weight=dial, eos_token_ids=())
    with closing(runner.decoder):
        return list(runner.generate([request]))[1:]


def _row(
    name: str, timed: Timed, timing_sha256: str, ms: float, plain_ms: float, tokens: Sequence[GeneratedToken]
) -> TaskTimeRow:
    model, cost = timed.servable.model, timed.servable.profile.cost
    widths = torch.stack([token.bit_widths for token in tokens]).cpu()
    full_ms = float(cost.latency_ms(cost.full_width()))
    is_drafted = isinstance(timed.servable.policy, DeployedDrafts)
    return TaskTimeRow(
        policy=name,
        policy_sha256=timed.policy_sha256,
        kl_weight=timed.kl_weight,
        timing_sha256=timing_sha256,
        ms_per_token=ms,
        time_share_measured=ms / plain_ms,
        time_share_modelled=None if is_drafted else float(cost.latency_ms(widths).mean()) / full_ms,
        latency_source=cost.source,
        mean_bit_width=float(model.mean_bit_width(widths).mean()),
        num_tokens=len(tokens),
    )
