"""From a recording and costs to an environment of drafts and verification; what is registered is made here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from flexquant_rl.engine.control.traces import SplitName, Traces, read_traces
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.embedded import DEFAULT_MODEL
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import shown
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.environment import Environment, Observation
from flexquant_rl.fq_env.live_rounds import LiveRounds
from flexquant_rl.fq_env.shared import shared_model
from flexquant_rl.fq_env.trace_rounds import TraceRounds
from flexquant_rl.fq_env.trace_table import TraceTable
from flexquant_rl.fq_env.vector_environment import VectorEnvironment
from flexquant_rl.fq_env.verified import VerifiedTask


def make_rounds(
    traces: str | os.PathLike[str] | Traces,
    costs: VerifyCosts,
    *,
    split: SplitName = "train",
    num_rows: int = 1,
    model: str | os.PathLike[str] | NestedCausalLM | None = None,
    ngram_drafts: int = 0,
) -> tuple[TraceRounds | LiveRounds, VerifiedTask]:
    """Makes what every environment of drafts consists of.

    Args:
        traces: Directory of a recording, or what was read from it.
        costs: What steps cost.
        split: Sequences to play: `train`, `validation` or `test`.
        num_rows: Episodes in lockstep.
        model: The model that was recorded, or where it is; with it the rounds are decoded live.
        ngram_drafts: Drafts of a round at most that are found in the text so far, as deep as the recording; such
            rounds are verified at once. 0 looks none up.

    Raises:
        InputError: If an argument cannot be used.
    """
    if split not in get_args(SplitName):
        raise InputError(f"split={shown(split)} is not known; choose one of {', '.join(get_args(SplitName))}")
    if type(num_rows) is not int or num_rows < 1:
        raise InputError(f"num_envs={shown(num_rows)} must be an integer above 0; give one")
    if not isinstance(costs, VerifyCosts):
        raise InputError(f"costs={shown(costs)} must be VerifyCosts; make them with modelled_costs or measured_costs")
    if not isinstance(traces, Traces):
        if not isinstance(traces, (str, os.PathLike)):
            raise InputError(f"traces={shown(traces)} must be the directory of a recording; make one with `fq record`")
        traces = read_traces(Path(traces))
    rounds: TraceRounds | LiveRounds
    if model is None:
        rounds = TraceRounds(TraceTable(traces, traces.of_split(split), ngram_drafts), costs, num_rows)
    else:
        rounds = LiveRounds(_model_of(model), traces.plan, split, costs, num_rows, ngram_drafts)
    return rounds, VerifiedTask(rounds.schema)


def _model_of(model: str | os.PathLike[str] | NestedCausalLM) -> NestedCausalLM:
    if isinstance(model, NestedCausalLM):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model={shown(model)} must be a directory, a name or a nested model; give the recorded one")
    name = str(model)
    return shared_model(None if name == DEFAULT_MODEL else name)


class VerifiedEnvironment(Environment, EzPickle):
    """One greedy continuation, drafted at few bits and verified at more: when to draft, when to verify.

    ## Description
    A nested model is its own draft model. A *round* drafts tokens one after the other, each by reading the newest token
    at a draft width; then one pass at the verify width over the settled token and all drafts keeps the longest prefix
    that agrees and gains one token more. What is written is what the verify width writes alone, whatever is drafted,
    so episodes are played from a recording and need no model. With `model` they are decoded: slower by three orders of
    magnitude, and exact also where a round mixes levels.

    ## Action Space
    `Discrete(L + 1)`: 0 verifies now, 1 to L draft one token at level 0 to L - 1, the recorded draft widths, ascending.
    Where no draft is possible (the round is as deep as the recording, the continuation may not be that much longer, an
    end-of-sequence token is drafted already, or drafts were found in the text) every action verifies;
    `info["action_mask"]` and `action_masks()` say so.

    ## Observation Space
    `Box(-10, 10, (dim,), float32)`: `engine/control/verified_signals.py`, named by `feature_names`.

    ## Rewards
    Tokens emitted less the time of the step in plain steps at the largest width. Its parts are in `info`.

    ## Starting State
    The beginning of a recorded continuation; `reset(options={"window": i})` says which.

    ## Episode End
    1. Termination: the text ended with one of the model's EOS tokens.
    2. Truncation: the recording's `max_new_tokens` tokens are settled.

    ## Arguments
    `traces`, `costs`, `split`, `model`, `ngram_drafts`: as for `make_rounds`. `render_mode`: `ansi` where there is a
    model, or none.

    ## Version History
    * v0: first version.
    """

    def __init__(
        self,
        traces: str | os.PathLike[str] | Traces,
        costs: VerifyCosts,
        split: SplitName = "train",
        render_mode: str | None = None,
        model: str | os.PathLike[str] | NestedCausalLM | None = None,
        ngram_drafts: int = 0,
    ) -> None:
        EzPickle.__init__(self, traces, costs, split, render_mode, model, ngram_drafts)
        if model is None:
            _refuse_rendering(render_mode)
        self.rounds, task = make_rounds(traces, costs, split=split, model=model, ngram_drafts=ngram_drafts)
        super().__init__(self.rounds, task, render_mode=render_mode)

    def action_masks(self) -> NDArray[np.bool_]:
        """`[L + 1]`: which actions do what they say."""
        masks: NDArray[np.bool_] = self.rounds.action_masks()[0]
        return masks

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See `Environment.reset`."""
        observation, info = super().reset(seed=seed, options=options)
        return observation, {**info, "action_mask": self._mask()}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Drafts one token or verifies; InputError on an action that is none, or after the end."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, "action_mask": self._mask()}

    def _mask(self) -> NDArray[np.int8]:
        return self.action_masks().astype(np.int8)  # the type that `Discrete.sample` takes


class VectorVerifiedEnvironment(VectorEnvironment, EzPickle):
    """Several continuations at once; the vector entry point. Arguments as for `make_rounds`."""

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        *,
        traces: str | os.PathLike[str] | Traces,
        costs: VerifyCosts,
        split: SplitName = "train",
        model: str | os.PathLike[str] | NestedCausalLM | None = None,
        ngram_drafts: int = 0,
    ) -> None:
        arguments: dict[str, Any] = {
            "traces": traces,
            "costs": costs,
            "split": split,
            "model": model,
            "ngram_drafts": ngram_drafts,
        }
        EzPickle.__init__(self, num_envs, render_mode, **arguments)
        if model is None:
            _refuse_rendering(render_mode)
        self.rounds, task = make_rounds(num_rows=num_envs, **arguments)
        super().__init__(self.rounds, task, render_mode=render_mode)

    def action_masks(self) -> NDArray[np.bool_]:
        """`[R, L + 1]`: which actions do what they say."""
        return self.rounds.action_masks()


def _refuse_rendering(render_mode: str | None) -> None:
    if render_mode is not None:
        raise InputError(
            f"render_mode={shown(render_mode)}: recorded traces have no text to render; leave it out, or give a model"
        )
