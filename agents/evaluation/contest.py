"""The final comparison of a run: every family at the same time budgets on the same test text, oracle included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from flexquant_rl.agents.evaluation.baselines import (
    TUNING_SEQUENCES,
    contestant,
    tuned_baselines,
    validation_rehearsal,
)
from flexquant_rl.agents.evaluation.budgets import (
    BestOfFamily,
    Contestant,
    Entry,
    KnobFamily,
    Outcome,
    SharingFamily,
    StaticFamily,
    TimedFamily,
)
from flexquant_rl.agents.evaluation.comparison import captured_headroom
from flexquant_rl.agents.evaluation.evaluate import Evaluator, SharedTrace, Trace, measured_speedups, summarise
from flexquant_rl.agents.evaluation.oracle import OracleConfig, token_oracle
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.policies.families import ORACLE, PPO, STATIC, UNTRAINED
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.static_front import static_front
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.training import SeedResult
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.policy import LearnedPolicy
from flexquant_rl.fq_env.prompts import spread

# The dial goes a little beyond the range that was trained: the ends of the budgets may lie there.
_DIAL_MARGIN = 4.0
_FRONT_POINTS = 4000
_NEIGHBOURS = 2
_TIMED_TOKENS = 24


@dataclass(frozen=True)
class Settings:
    """How every family meets the budgets.

    Attributes:
        entries: For each family and budget in reach, in the order of the families.
        missed: Which budgets are out of reach, and why, in words.
    """

    entries: tuple[Entry, ...]
    missed: tuple[str, ...]

    def static_at(self, time_budget: float | None) -> StaticAllocation | None:
        """The static allocation of a budget."""
        for entry in self.entries:
            if entry.family == STATIC.name and entry.time_budget == time_budget:
                assert isinstance(entry.first.policy, StaticAllocation)
                return entry.first.policy
        return None


def heuristics(prepared: Prepared) -> list[TimedFamily]:
    """The families that learn nothing by reward: static allocations, fixed widths, and the tuned baselines."""
    context = policy_context(prepared)
    widths = prepared.model.bit_widths
    return [
        static_family(prepared),
        SharingFamily(Fixed.family.name, tuple(contestant(Fixed(width), context) for width in widths)),
        *tuned_baselines(prepared, context),
    ]


def static_family(prepared: Prepared) -> StaticFamily:
    """Static allocations: the knapsack solved at the very budget, its neighbours on both fronts, the fixed widths."""
    judged = replace(prepared.profile, cost=prepared.cost)
    solved = static_front(judged, prepared.model.unit_weights, num_points=_FRONT_POINTS)
    context = policy_context(prepared)

    def candidates(budget: float) -> list[StaticAllocation]:
        found = []
        for front in (solved, prepared.front):
            share = 1 / prepared.cost.speedup(front.bit_widths)
            within = (share <= budget + 1e-9).nonzero()[:, 0]
            nearest = within[share[within].argsort(descending=True, stable=True)][:_NEIGHBOURS]
            for bit_widths in front.bit_widths[nearest]:
                mean = float(prepared.model.mean_bit_width(bit_widths))
                found.append(StaticAllocation(f"static:{mean:.3f}", bit_widths))
        fixed = [Fixed(width).bind(context) for width in prepared.model.bit_widths]
        return [*found, *(one for one in fixed if 1 / float(prepared.cost.speedup(one.bit_widths)) <= budget + 1e-9)]

    return StaticFamily(candidates)


def learned(prepared: Prepared, results: Sequence[SeedResult], best: SeedResult) -> list[TimedFamily]:
    """The family of every training seed, its knob the dial on a log scale; only the best one's steps are timed."""
    return [dial_family(prepared, PPO.name, result.policy, result.seed, timed=result is best) for result in results]


def untrained(prepared: Prepared, best: SeedResult) -> list[TimedFamily]:
    """The network of the best seed as PPO found it, cloned from static allocations; none where the run lost it."""
    if best.cloned is None:
        return []
    family = dial_family(prepared, UNTRAINED.name, best.cloned, best.seed)
    return [BestOfFamily(family.name, (family,), lambda: validation_rehearsal(prepared))]


def dial_family(
    prepared: Prepared, name: str, policy: LearnedPolicy, seed: int | None, *, timed: bool = True
) -> KnobFamily:
    """A learned policy at all settings of its dial, from a little below the trained range to a little above."""
    margin = 1.0 if prepared.env.kl_weight is not None else _DIAL_MARGIN
    low, high = math.log(prepared.env.kl_weight_min / margin), math.log(prepared.env.kl_weight_max * margin)

    def at(position: float) -> Contestant:
        return Contestant(name, policy, math.exp(low + position * (high - low)), seed, timed)

    return KnobFamily(name, at, seed)


def tune(prepared: Prepared, families: Sequence[TimedFamily], budgets: Sequence[float], num_sequences: int) -> Settings:
    """Finds the setting of every family at every budget on validation text.

    Args:
        prepared: Model, text, latencies.
        families: The families.
        budgets: Shares of the time at the largest width everywhere.
        num_sequences: Sequences of validation text, as far as they help.
    """
    windows = spread(prepared.windows.validation, min(num_sequences, TUNING_SEQUENCES))
    evaluator = Evaluator(prepared.model, prepared.profile, windows, prepared.env, cost=prepared.cost)

    def measure(one: Contestant) -> Outcome:
        if isinstance(one.policy, StaticAllocation):
            widths = one.policy.bit_widths
            return Outcome(1 / float(prepared.cost.speedup(widths)), evaluator.static_kl_nats(widths))
        trace = evaluator.run(one.policy, one.kl_weight or 1.0)
        return Outcome(1 / trace.speedup, float(trace.output_kl_nats.double().mean()))

    entries: list[Entry] = []
    missed: list[str] = []
    for family in track(families, "meeting the time budgets"):
        found, reasons = family.entries(budgets, measure)
        entries += found
        missed += reasons
    evaluator.close()
    return Settings(tuple(entries), tuple(missed))


def compete(prepared: Prepared, contestants: Sequence[Contestant], num_sequences: int) -> list[EvalRow]:
    """Runs single policies on the same test windows and times one sequence of each at batch size 1."""
    windows, documents = test_windows(prepared, num_sequences)
    traces = _traces(prepared, contestants, windows)
    speedups = _time(prepared, contestants, windows[0])
    return [
        summarise(
            trace,
            policy=contestant.name,
            family=contestant.family,
            reference=reference_name(prepared.model),
            seed=contestant.seed,
            kl_weight=contestant.kl_weight,
            speedup_measured=speedup,
            documents=documents,
        )
        for contestant, trace, speedup in zip(contestants, traces, speedups, strict=True)
    ]


def compete_at_budgets(prepared: Prepared, settings: Settings, num_sequences: int) -> list[EvalRow]:
    """Runs every family at the settings that were found, on the same test windows, each policy once."""
    windows, documents = test_windows(prepared, num_sequences)
    members = _members(settings.entries)
    traces = dict(zip(members, _traces(prepared, [*members.values()], windows), strict=True))
    speedups = dict(zip(members, _time(prepared, [*members.values()], windows[0]), strict=True))
    return _rows(prepared, settings, traces, speedups, documents)


def compete_long(
    prepared: Prepared, settings: Settings, windows: Tensor, documents: Sequence[int], max_new_tokens: int
) -> list[EvalRow]:
    """The same on long continuations, beyond what the policies were trained to decode. Nothing is timed.

    Args:
        prepared: Model and profile.
        settings: What is run.
        windows: `[S, prompt_tokens + max_new_tokens + 1]` int64.
        documents: The document of each window.
        max_new_tokens: Tokens to decode.
    """
    longer = replace(prepared, env=replace(prepared.env, max_new_tokens=max_new_tokens))
    members = _members(settings.entries)
    traces = dict(zip(members, _traces(longer, [*members.values()], windows), strict=True))
    return _rows(longer, settings, traces, {}, documents)


_Key = tuple[object, ...]


def _members(entries: Sequence[Entry]) -> dict[_Key, Contestant]:
    """The distinct policies of some entries: an allocation that serves several budgets is run once."""
    return {_key(member): member for entry in entries for member in entry.members}


def _key(one: Contestant) -> _Key:
    if isinstance(one.policy, StaticAllocation):
        return tuple(one.policy.bit_widths.tolist())
    return one.family, one.seed, one.kl_weight, one.policy.name


def _traces(prepared: Prepared, contestants: Sequence[Contestant], windows: Tensor) -> list[Trace]:
    evaluator = Evaluator(prepared.model, prepared.profile, windows, prepared.env, cost=prepared.cost)
    label = f"evaluating {prepared.env.max_new_tokens} tokens"
    traces = [evaluator.run(one.policy, one.kl_weight or 1.0) for one in track(contestants, label)]
    evaluator.close()
    return traces


def _rows(
    prepared: Prepared,
    settings: Settings,
    traces: dict[_Key, Trace],
    speedups: dict[_Key, float | None],
    documents: Sequence[int],
) -> list[EvalRow]:
    rows = []
    for entry in settings.entries:
        keys = [_key(member) for member in entry.members]
        static = settings.static_at(entry.time_budget)
        times = [1 / speedup for key in keys if (speedup := speedups.get(key)) is not None]
        # Time shares mix as the tokens do.
        time = None if len(times) < len(keys) else (1 - entry.share) * times[0] + entry.share * times[-1]
        rows.append(
            summarise(
                traces[keys[0]] if len(keys) == 1 else SharedTrace(traces[keys[0]], traces[keys[1]], entry.share),
                policy=entry.name,
                family=entry.family,
                reference=reference_name(prepared.model),
                seed=entry.first.seed,
                kl_weight=entry.first.kl_weight,
                time_budget=entry.time_budget,
                speedup_measured=None if time is None else 1 / time,
                static_widths=None if static is None else static.bit_widths,
                documents=documents,
            )
        )
    return rows


def test_windows(prepared: Prepared, num_sequences: int) -> tuple[Tensor, list[int]]:
    """`[S, window_tokens]`, evenly spaced over the test split, and the document of each."""
    documents = spread(prepared.windows.documents("test"), num_sequences).tolist()
    return spread(prepared.windows.test, num_sequences), documents


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


def oracle_time_share(prepared: Prepared, config: OracleConfig) -> float:
    """The share of full-width time that the oracle will take; known before any text is read."""
    low, high = _oracle_allocations(prepared)
    tokens = prepared.env.max_new_tokens
    share_high = round(config.share_high * tokens) / tokens
    shares = [1 / float(prepared.cost.speedup(widths)) for widths in (low, high)]
    return (1 - share_high) * shares[0] + share_high * shares[1]


def oracle_row(prepared: Prepared, num_sequences: int, config: OracleConfig, settings: Settings) -> EvalRow:
    """The token oracle between the static allocations of about 4 and 5 bits, on the same test windows as everyone."""
    windows, documents = test_windows(prepared, num_sequences)
    low, high = _oracle_allocations(prepared)
    trace = token_oracle(
        prepared.model,
        replace(prepared.profile, cost=prepared.cost),
        windows,
        low,
        high,
        prepared.env,
        config,
        progress=lambda sequences: track(sequences, "oracle"),
    )
    budget = oracle_time_share(prepared, config)
    static = settings.static_at(budget)
    return summarise(
        trace,
        policy=f"{ORACLE.name}:token",
        family=ORACLE.name,
        reference=reference_name(prepared.model),
        time_budget=budget,
        static_widths=None if static is None else static.bit_widths,
        documents=documents,
    )


def _oracle_allocations(prepared: Prepared) -> tuple[Tensor, Tensor]:
    return prepared.front.nearest(4.0), prepared.front.nearest(5.0)


def headroom(rows: Sequence[EvalRow]) -> float | None:
    """Share of the way from static to oracle that the learned policies go, all at the oracle's time share.

    The mean over training seeds; None without an oracle, or where a family has no row at its budget.
    """
    oracles = [row for row in rows if row.family == ORACLE.name]
    if not oracles or oracles[0].time_budget is None:
        return None
    at_budget = [row for row in rows if row.time_budget == oracles[0].time_budget]
    static = next((row.output_kl_nats for row in at_budget if row.family == STATIC.name), None)
    shares = [
        captured_headroom(static, row.output_kl_nats, oracles[0].output_kl_nats)
        for row in at_budget
        if row.family == PPO.name
    ]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def showcase(prepared: Prepared, policy: LearnedPolicy, kl_weight: float) -> tuple[Trace, list[str]]:
    """One test sequence under the learned policy, for the picture: its trace and the tokens that its steps read."""
    windows = test_windows(prepared, 2)[0][:1]
    evaluator = Evaluator(prepared.model, prepared.profile, windows, prepared.env, cost=prepared.cost)
    trace = evaluator.run(policy, kl_weight)
    evaluator.close()
    first = prepared.env.prompt_tokens
    tokens = [str(prepared.model.tokenizer.decode([token])) for token in windows[0, first:-1].tolist()]
    return trace, tokens
