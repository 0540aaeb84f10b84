"""The final comparison of a run: every policy on the same test text, learned and not, with the oracle beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from flexquant_rl.agents.evaluation.comparison import captured_headroom, interpolated_kl
from flexquant_rl.agents.evaluation.evaluate import Evaluator, Trace, measured_speedups, summarise
from flexquant_rl.agents.evaluation.oracle import OracleConfig, token_oracle
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.policies.entropy import EntropyThreshold
from flexquant_rl.agents.policies.families import ORACLE, PPO, bind_policy, family_name
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.knapsack import Knapsack
from flexquant_rl.agents.policies.random_widths import RandomWidths
from flexquant_rl.agents.policies.unbound import PolicyContext, UnboundPolicy
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.training import SeedResult
from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.policy import LearnedPolicy
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.prompts import spread

RANDOM_MEANS = (3.5, 4.5, 5.5)
ENTROPY_THRESHOLDS_NATS = (0.5, 1.5, 2.5, 3.5)
_TIMED_TOKENS = 24
_KNAPSACK_POINTS = 12


@dataclass(frozen=True)
class Contestant:
    """One policy at one setting of the dial."""

    family: str
    policy: Policy
    kl_weight: float | None = None
    seed: int | None = None
    timed: bool = True

    @property
    def name(self) -> str:
        """As it appears in tables: learned policies by their family, the others by their own name."""
        return self.policy.name if self.seed is None else self.family


def heuristics(prepared: Prepared) -> list[Contestant]:
    """The policies that learn nothing: fixed widths, the static knapsack along its front, random mixes, entropy."""
    context = policy_context(prepared)
    widths = prepared.model.bit_widths
    low_width = EntropyThreshold.low_width if EntropyThreshold.low_width in widths else widths[0]
    # Rounded, as the names of the rows give them.
    means = dict.fromkeys(float(f"{mean:.3g}") for mean in spread(prepared.front.mean_bit_width, _KNAPSACK_POINTS))
    policies: list[UnboundPolicy] = [
        *(Fixed(width) for width in widths),
        *(Knapsack(mean) for mean in means),
        *(RandomWidths(mean) for mean in RANDOM_MEANS if widths[0] <= mean <= widths[-1]),
        *(EntropyThreshold(threshold, low_width=low_width) for threshold in ENTROPY_THRESHOLDS_NATS),
    ]
    return [contestant(policy, context) for policy in policies]


def contestant(policy: UnboundPolicy, context: PolicyContext) -> Contestant:
    """A policy that learns nothing, bound to the model."""
    return Contestant(family_name(policy), bind_policy(policy, context))


def learned(prepared: Prepared, results: Sequence[SeedResult], num_dials: int, best: SeedResult) -> list[Contestant]:
    """Every trained policy at every setting of the dial; only the best one's steps are timed."""
    return [
        Contestant(PPO.name, result.policy, dial, result.seed, timed=result is best)
        for result in results
        for dial in prepared.dials(num_dials).tolist()
    ]


def compete(prepared: Prepared, contestants: Sequence[Contestant], num_sequences: int) -> list[EvalRow]:
    """Runs everyone on the same test windows and times one sequence of each at batch size 1."""
    windows = test_windows(prepared, num_sequences)
    traces = _replay(prepared, contestants, windows, prepared.env, "evaluating")
    return _rows(prepared, contestants, traces, _time(prepared, contestants, windows[0]))


def compete_long(
    prepared: Prepared, contestants: Sequence[Contestant], windows: Tensor, max_new_tokens: int
) -> list[EvalRow]:
    """The same on long continuations, beyond what the policies were trained to decode. Nothing is timed.

    Args:
        prepared: Model and profile.
        contestants: The policies.
        windows: `[S, prompt_tokens + max_new_tokens + 1]` int64.
        max_new_tokens: Tokens to decode.
    """
    env = replace(prepared.env, max_new_tokens=max_new_tokens)
    traces = _replay(prepared, contestants, windows, env, f"evaluating {max_new_tokens} tokens")
    return _rows(prepared, contestants, traces, [None] * len(contestants))


def _replay(
    prepared: Prepared, contestants: Sequence[Contestant], windows: Tensor, env: EnvConfig, label: str
) -> list[Trace]:
    evaluator = Evaluator(prepared.model, prepared.profile, windows, env, cost=prepared.cost)
    traces = [evaluator.run(contestant.policy, contestant.kl_weight or 1.0) for contestant in track(contestants, label)]
    evaluator.close()
    return traces


def _rows(
    prepared: Prepared, contestants: Sequence[Contestant], traces: Sequence[Trace], speedups: Sequence[float | None]
) -> list[EvalRow]:
    return [
        summarise(
            trace,
            policy=contestant.name,
            family=contestant.family,
            reference=reference_name(prepared.model),
            seed=contestant.seed,
            kl_weight=contestant.kl_weight,
            speedup_measured=speedup,
        )
        for contestant, trace, speedup in zip(contestants, traces, speedups, strict=True)
    ]


def test_windows(prepared: Prepared, num_sequences: int) -> Tensor:
    """`[S, window_tokens]`, evenly spaced over the test split."""
    return spread(prepared.windows.test, num_sequences)


def _time(prepared: Prepared, contestants: Sequence[Contestant], window: Tensor) -> list[float | None]:
    say("timing single steps")
    env = replace(prepared.env, max_new_tokens=min(_TIMED_TOKENS, prepared.env.max_new_tokens))
    timed = [index for index, contestant in enumerate(contestants) if contestant.timed]
    pairs = [(contestants[index].policy, contestants[index].kl_weight or 1.0) for index in timed]
    measured = measured_speedups(
        prepared.model,
        prepared.profile,
        window[: env.window_tokens],
        env,
        pairs,
        num_threads=prepared.num_threads,
        progress=lambda rounds: track(rounds, "timing"),
    )
    speedups: list[float | None] = [None] * len(contestants)
    for index, value in zip(timed, measured, strict=True):
        speedups[index] = value
    return speedups


def oracle_row(prepared: Prepared, num_sequences: int, config: OracleConfig) -> EvalRow:
    """The token oracle between the static allocations of about 4 and 5 bits, on the same test windows as everyone."""
    windows = test_windows(prepared, num_sequences)
    trace = token_oracle(
        prepared.model,
        prepared.profile,
        windows,
        prepared.front.nearest(4.0),
        prepared.front.nearest(5.0),
        prepared.env,
        config,
        progress=lambda sequences: track(sequences, "oracle"),
    )
    return summarise(trace, policy=f"{ORACLE.name}:token", family=ORACLE.name, reference=reference_name(prepared.model))


def headroom(rows: Sequence[EvalRow]) -> float | None:
    """Share of the way from static to oracle that the learned policies go at the oracle's speed.

    The mean over training seeds; None without an oracle or where a front does not reach its speed.
    """
    oracles = [row for row in rows if row.family == ORACLE.name]
    if not oracles or oracles[0].speedup_modelled is None:
        return None
    speed = oracles[0].speedup_modelled
    static = interpolated_kl([row for row in rows if row.family == Knapsack.family.name], speed)
    seeds = sorted({row.seed for row in rows if row.family == PPO.name and row.seed is not None})
    shares = [
        captured_headroom(
            static,
            interpolated_kl([row for row in rows if row.family == PPO.name and row.seed == seed], speed),
            oracles[0].output_kl_nats,
        )
        for seed in seeds
    ]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def showcase(prepared: Prepared, policy: LearnedPolicy, kl_weight: float) -> tuple[Trace, list[str]]:
    """One test sequence under the learned policy, for the picture: its trace and the tokens that its steps read."""
    windows = test_windows(prepared, 2)[:1]
    evaluator = Evaluator(prepared.model, prepared.profile, windows, prepared.env, cost=prepared.cost)
    trace = evaluator.run(policy, kl_weight)
    evaluator.close()
    first = prepared.env.prompt_tokens
    tokens = [str(prepared.model.tokenizer.decode([token])) for token in windows[0, first:-1].tolist()]
    return trace, tokens
