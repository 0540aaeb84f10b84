"""What static allocations reach in the time that a policy has taken: the other side of every comparison.

A setting that meets a budget on validation text misses it a little on test text, and a hundredth of the time is worth
a tenth of the KL. So a policy is compared with static in the very time that it took, by the latency table and by the
clock. Static allocations stand on rungs, a twentieth of full-width time apart; between two rungs the logarithm of
static's KL is as good as straight, and `rung_error` says how good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.budgets import Contestant, Measure, Outcome, StaticFamily
from flexquant_rl.agents.evaluation.comparison import SMALLEST_KL_NATS
from flexquant_rl.agents.evaluation.evaluate import Evaluator
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.policies.families import STATIC
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.static_front import static_front
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.agents.progress import track
from flexquant_rl.engine.control.allocation_kl import affordable_windows, allocation_kl_nats
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.prompts import spread

_FRONT_POINTS = 4000
_NEIGHBOURS = 2
VALIDATION_SEQUENCES = 24
"""Sequences of validation text that settings are found on, at most."""
# Static allocations are told apart by these, however large the model is: on three, a fixed width was 20% better than
# what they chose.
_LEAST_SEQUENCES = 8
_MIN_CLOCKED = 3
_RUNG = 0.05
# The allocation on a rung takes a little less than the rung's share.
_BEYOND = 0.005
# Of a rung that is left out: two rungs apart, and what their allocations leave of their shares.
_FARTHEST_NEIGHBOURS = 2.5 * _RUNG
_ROUNDING = 1e-9


def static_family(prepared: Prepared) -> StaticFamily:
    """Static allocations: the knapsack solved at the very budget, its neighbours on both fronts, the fixed widths."""
    judged = replace(prepared.profile, cost=prepared.cost)
    solved = static_front(judged, prepared.model.unit_weights, num_points=_FRONT_POINTS)
    context = policy_context(prepared)

    def candidates(budget: float) -> list[StaticAllocation]:
        found = []
        for front in (solved, prepared.front):
            share = prepared.cost.time_share(front.bit_widths)
            within = (share <= budget + _ROUNDING).nonzero()[:, 0]
            nearest = within[share[within].argsort(descending=True, stable=True)][:_NEIGHBOURS]
            for bit_widths in front.bit_widths[nearest]:
                mean = float(prepared.model.mean_bit_width(bit_widths))
                found.append(StaticAllocation(f"static:{mean:.3f}", bit_widths))
        fixed = [Fixed(width).bind(context) for width in prepared.model.bit_widths]
        shares = prepared.cost.time_share(torch.stack([one.bit_widths for one in fixed]))
        return [*found, *(one for one, share in zip(fixed, shares, strict=True) if share <= budget + _ROUNDING)]

    return StaticFamily(candidates)


def static_entries(prepared: Prepared, time_shares: Sequence[float]) -> dict[float, StaticAllocation]:
    """The best static allocation within each share of the time, chosen on validation text; none where out of reach."""
    if not time_shares:
        return {}
    with on_validation_text(prepared) as measure:
        entries, _ = static_family(prepared).entries(time_shares, measure)
    found = {}
    for entry in entries:
        assert isinstance(entry.first.policy, StaticAllocation)
        assert entry.time_budget is not None
        found[entry.time_budget] = entry.first.policy
    return found


@contextmanager
def on_validation_text(prepared: Prepared, num_sequences: int = VALIDATION_SEQUENCES) -> Iterator[Measure]:
    """What policies give on validation text.

    Static allocations that are asked for together are read in one pass, and on fewer windows the larger the model is:
    they differ by less than the text does, and are compared with each other only.

    Args:
        prepared: Model, text, latencies.
        num_sequences: Sequences, as far as they help.
    """
    windows = spread(prepared.windows.validation, min(num_sequences, VALIDATION_SEQUENCES))
    evaluator = Evaluator(prepared.model, prepared.profile, windows, prepared.env, cost=prepared.cost)

    def run(one: Contestant) -> Outcome:
        trace = evaluator.run(one.policy, one.kl_weight or 1.0)
        return Outcome(1 / trace.speedup, float(trace.output_kl_nats.double().mean()))

    def measure(contestants: Sequence[Contestant]) -> list[Outcome]:
        static = {
            tuple(one.policy.bit_widths.tolist()) for one in contestants if isinstance(one.policy, StaticAllocation)
        }
        known = _static_outcomes(prepared, windows, sorted(static))
        return [
            known[tuple(one.policy.bit_widths.tolist())] if isinstance(one.policy, StaticAllocation) else run(one)
            for one in contestants
        ]

    try:
        yield measure
    finally:
        evaluator.close()


def _static_outcomes(
    prepared: Prepared, windows: Tensor, allocations: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], Outcome]:
    """Outcomes of allocations that are compared with each other, all on as many windows; each is read once."""
    if not allocations:
        return {}
    model, read = prepared.model, windows[:, :-1]
    widths = torch.tensor(allocations)
    count = affordable_windows(model, widths, read.shape[1], len(read), least=_LEAST_SEQUENCES)
    keys = {one: (len(read), count, one) for one in allocations}
    known = prepared.static_kl_nats
    unknown = [one for one in allocations if keys[one] not in known]
    if unknown:
        kl = allocation_kl_nats(
            DecodeSession(model),
            spread(read, count),
            torch.tensor(unknown),
            first=prepared.env.prompt_tokens,
            prompt_width=max(model.bit_widths),
            progress=lambda layers: track(layers, "static allocations on validation text"),
        )
        known.update(zip((keys[one] for one in unknown), kl.tolist(), strict=True))
    shares = prepared.cost.time_share(widths).tolist()
    return {one: Outcome(share, known[keys[one]]) for one, share in zip(allocations, shares, strict=True)}


@dataclass(frozen=True)
class StaticClock:
    """Which static allocation takes a measured time: modelled time shares over measured ones.

    A line from point to point through the static allocations that were clocked. A straight one through all of them
    was a hundredth of the time beside the fixed widths of a 0.5 B model, which then seemed to be a tenth better than
    static, to which they belong. Where the clock calls a slower allocation the faster one, both get the mean of their
    times (isotonic regression), so the line never falls; the slower one, static's best of both, stands there.

    Attributes:
        measured: Measured shares, rising.
        modelled: The modelled share at each of them, rising.
        misfit: Root mean square of what the measured shares miss a straight line by: bends and noise together.
    """

    measured: tuple[float, ...]
    modelled: tuple[float, ...]
    misfit: float

    @staticmethod
    def fit(modelled: Sequence[float], measured: Sequence[float]) -> StaticClock | None:
        """None of fewer than three allocations, or where the clock knows no difference."""
        if len(modelled) < _MIN_CLOCKED or np.ptp(modelled) == 0:
            return None
        slope, offset = np.polyfit(modelled, measured, 1)
        if slope <= 0:
            return None
        missed = np.asarray(measured) - (offset + slope * np.asarray(modelled))
        pools = _rising(modelled, measured)
        return StaticClock(
            tuple(float(np.mean(times)) for _, times in pools),
            tuple(share for share, _ in pools),
            float(np.sqrt(np.mean(missed**2))),
        )

    def modelled_share(self, measured: float) -> float:
        """The modelled share of a static allocation that takes a measured one; beyond the ends in proportion."""
        nearest = min(max(measured, self.measured[0]), self.measured[-1])
        return float(np.interp(nearest, self.measured, self.modelled)) * measured / nearest


def _rising(modelled: Sequence[float], measured: Sequence[float]) -> list[tuple[float, list[float]]]:
    """Measured shares in the fewest groups whose means rise, each with the largest modelled share of its group."""
    by_share: dict[float, list[float]] = {}
    for share, time in sorted(zip(modelled, measured, strict=True)):
        by_share.setdefault(share, []).append(time)
    pools: list[tuple[float, list[float]]] = []
    for pool in by_share.items():
        pools.append(pool)
        while len(pools) > 1 and np.mean(pools[-2][1]) >= np.mean(pools[-1][1]):
            (_, faster), (share, slower) = pools[-2:]
            pools[-2:] = [(share, faster + slower)]
    return pools


@dataclass(frozen=True)
class Rung:
    """A static allocation on some text.

    Attributes:
        time_share: Its modelled time as a share of that at the largest width.
        sequence_kl_nats: Mean output KL of each sequence, nats.
    """

    time_share: float
    sequence_kl_nats: tuple[float, ...]

    @property
    def log_kl(self) -> float:
        """Logarithm of the mean KL."""
        return math.log(max(float(np.mean(self.sequence_kl_nats)), SMALLEST_KL_NATS))


def missing_rungs(rows: Sequence[EvalRow], clock: StaticClock | None) -> list[float]:
    """The time shares of the rungs around all rows on which no static row stands yet, rising."""
    there = {round(row.time_budget, 6) for row in rows if row.family == STATIC.name and row.time_budget is not None}
    asked = {share for row in rows for share in _shares(row, clock) if share is not None}
    return sorted(_nominal(asked) - there)


def beside_static(
    prepared: Prepared,
    rows: Sequence[EvalRow],
    windows: Tensor,
    env: EnvConfig,
    clock: StaticClock | None,
    static: Mapping[float, StaticAllocation],
) -> tuple[list[EvalRow], list[Rung]]:
    """The rows with what static reaches on the same text in the time that each of them took, and the rungs of that.

    Static rows with a budget are rungs, and their own other side. The other rungs are run.

    Args:
        prepared: Model, validation text, latencies.
        rows: Rows of test text.
        windows: `[S, window_tokens]` int64, that text.
        env: Shape of its episodes.
        clock: Finds the static allocation of a measured time; None where nothing was measured.
        static: What `static_entries` found for the `missing_rungs`, and for shares of rows where that is wanted: each
            is a rung.
    """
    shares = [_shares(row, clock) for row in rows]
    rungs = [_rung(row) for row in rows if row.family == STATIC.name]
    chosen = {tuple(one.bit_widths.tolist()): one for one in static.values()}
    rungs += _run_rungs(prepared, [*chosen.values()], windows, env)
    beside = [
        replace(
            row,
            static_kl_nats=None if modelled is None else static_between(rungs, modelled),
            static_kl_nats_measured=None if measured is None else static_between(rungs, measured),
            static_log_error_measured=None if clock is None else _log_error(rungs, row, clock),
        )
        if row.family != STATIC.name
        else replace(
            row,
            static_kl_nats=row.sequence_kl_nats,
            static_kl_nats_measured=None if row.time_share_measured is None else row.sequence_kl_nats,
        )
        for row, (modelled, measured) in zip(rows, shares, strict=True)
    ]
    return beside, rungs


def static_between(rungs: Sequence[Rung], time_share: float) -> tuple[float, ...] | None:
    """KL of each sequence, nats, under static allocations that take a time share: between the two nearest rungs.

    The mean follows the straight line of its logarithm, each sequence its own. None out of reach.
    """
    ladder = _ladder(rungs)
    if not ladder or not ladder[0].time_share - _ROUNDING <= time_share <= ladder[-1].time_share + _BEYOND:
        return None
    if len(ladder) == 1 or time_share <= ladder[0].time_share:
        return ladder[0].sequence_kl_nats
    above = next((i for i, rung in enumerate(ladder) if rung.time_share >= time_share), len(ladder) - 1)
    low, high = ladder[above - 1], ladder[above]
    part = (time_share - low.time_share) / (high.time_share - low.time_share)
    ends = [np.log(np.maximum(rung.sequence_kl_nats, SMALLEST_KL_NATS)) for rung in (low, high)]
    sequences = np.exp((1 - part) * ends[0] + part * ends[1])
    mean = math.exp((1 - part) * low.log_kl + part * high.log_kl)
    return tuple((sequences * mean / sequences.mean()).tolist())


def rung_error(rungs: Iterable[Rung]) -> float | None:
    """How far a rung is from the line between its two neighbours: the largest absolute log ratio.

    Those neighbours are twice as far apart as the rungs that rows are compared between, so that between them the error
    of a smooth curve is about a quarter. Where rungs are missing because no row was near, neighbours are farther apart,
    and say nothing. None where no rung has two neighbours.
    """
    ladder = _ladder(rungs)
    errors = []
    for low, middle, high in zip(ladder, ladder[1:], ladder[2:], strict=False):
        if high.time_share - low.time_share > _FARTHEST_NEIGHBOURS:
            continue
        part = (middle.time_share - low.time_share) / (high.time_share - low.time_share)
        errors.append(abs(middle.log_kl - (1 - part) * low.log_kl - part * high.log_kl))
    return max(errors, default=None)


def _ladder(rungs: Iterable[Rung]) -> list[Rung]:
    """Rungs of different times, rising."""
    return sorted({rung.time_share: rung for rung in rungs}.values(), key=lambda rung: rung.time_share)


def _rung(row: EvalRow) -> Rung:
    assert row.time_share_modelled is not None, "static rows have a time"
    return Rung(row.time_share_modelled, row.sequence_kl_nats)


def _log_error(rungs: Sequence[Rung], row: EvalRow, clock: StaticClock) -> float | None:
    """What the standard error of a measured time is worth in the logarithm of static's KL: half of what two change."""
    share, error = row.time_share_measured, row.time_share_measured_error
    if share is None or error is None:
        return None
    times = [clock.modelled_share(at) for at in (share - error, share, share + error)]
    around = [static_between(rungs, at) for at in times if at <= 1]
    logs = [math.log(max(float(np.mean(kl)), SMALLEST_KL_NATS)) for kl in around if kl is not None]
    # At an end of the ladder, and at full width, one side alone is known.
    return abs(logs[-1] - logs[0]) / (len(logs) - 1) if len(logs) > 1 else None


def _shares(row: EvalRow, clock: StaticClock | None) -> tuple[float | None, float | None]:
    """Modelled shares that static is asked for: those of equal modelled and of equal measured time."""
    measured = None
    if row.time_share_measured is not None and clock is not None:
        measured = min(clock.modelled_share(row.time_share_measured), 1.0)
    return row.time_share_modelled, measured


def _nominal(shares: Iterable[float]) -> set[float]:
    """The rungs around some shares, one more above: the allocation on a rung may take less than a share below it."""
    at = [share / _RUNG for share in shares]
    around = [(math.floor(exact + _ROUNDING), math.ceil(exact - _ROUNDING)) for exact in at]
    steps = {index for low, high in around for index in (low, high, high + 1)}
    return {round(index * _RUNG, 6) for index in steps if 0 < index * _RUNG <= 1 + _ROUNDING}


def _run_rungs(prepared: Prepared, policies: Sequence[StaticAllocation], windows: Tensor, env: EnvConfig) -> list[Rung]:
    if not policies:
        return []
    evaluator = Evaluator(prepared.model, prepared.profile, windows, env, cost=prepared.cost)
    traces = evaluator.run_static(policies, progress=lambda layers: track(layers, "static in equal time"))
    evaluator.close()
    return [Rung(1 / trace.speedup, tuple(trace.output_kl_nats.double().mean(1).tolist())) for trace in traces]
