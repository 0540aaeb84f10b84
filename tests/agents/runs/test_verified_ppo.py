"""PPO on traces whose acceptance a visible signal decides: the bound can be reached, and almost is."""

from __future__ import annotations

import numpy as np
from toy_traces import toy_costs, visible_traces

from flexquant_rl.agents.config import VerifiedPPOConfig
from flexquant_rl.agents.evaluation.drafting import Played, clairvoyant, context_of, play
from flexquant_rl.agents.runs.verified_ppo import build_verified_ppo, drafting_net
from flexquant_rl.engine.control.drafting_rules import FixedRounds
from flexquant_rl.fq_env.trace_table import TraceTable
from flexquant_rl.fq_env.vec_env import VerifiedVecEnv
from flexquant_rl.fq_env.verified_making import make_rounds

DEPTH = 3
TOKENS = 40


def earned(played: Played) -> float:
    """What the environment pays in all: tokens less time."""
    return float((played.num_tokens - played.time_steps).sum())


def test_ppo_reaches_95_percent_of_the_optimum() -> None:
    costs = toy_costs(2, DEPTH)
    traces = visible_traces(np.random.default_rng(0), num_sequences=40, depth=DEPTH, max_new_tokens=TOKENS)
    unseen = visible_traces(np.random.default_rng(1), num_sequences=40, depth=DEPTH, max_new_tokens=TOKENS)
    rounds, task = make_rounds(traces, costs, num_rows=128)
    ppo = build_verified_ppo(VerifiedVecEnv(rounds, task, seed=0), VerifiedPPOConfig(), seed=0)
    ppo.learn(80_000)
    table = TraceTable(unseen, range(40))
    bound = earned(clairvoyant(table, costs))
    context = context_of(table, costs)
    fixed = max(earned(play(table, costs, rule.bind(context))) for rule in FixedRounds.grid(context.schema))
    assert fixed < 0.7 * bound, "a fixed length is almost as good: the toy shows nothing"
    learned = earned(play(table, costs, drafting_net(ppo, rounds.schema).policy()))
    assert 0.95 * bound <= learned <= bound + 1e-6
