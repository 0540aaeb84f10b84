"""Fronts of policies and their comparison at equal modelled speed, with intervals over test sequences and seeds.

A policy that is faster and worse than another proves nothing, so every comparison interpolates both fronts at the same
speeds. Test sequences differ far more from each other than policies do, so resamples draw the same ones for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.policies.families import family_facts, static_families
from flexquant_rl.agents.policies.unbound import Family

# Resamples of a front's point may be exactly zero where whole sequences are; their logarithm must stay finite.
_SMALLEST_KL_NATS = 1e-12

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SeedGroup:
    """The rows of one policy at one dial, one for each training seed; a single row for what is not trained."""

    rows: tuple[EvalRow, ...]

    @property
    def family(self) -> str:
        """The family of all rows."""
        return self.rows[0].family

    @property
    def policy(self) -> str:
        """The policy of all rows."""
        return self.rows[0].policy

    @property
    def kl_weight(self) -> float | None:
        """The dial of all rows."""
        return self.rows[0].kl_weight

    @property
    def num_seeds(self) -> int:
        """Rows with a training seed."""
        return sum(row.seed is not None for row in self.rows)

    def mean(self, field: str) -> float | None:
        """Mean of a field over the seeds that have it; None where none has."""
        values = self._values(field)
        return float(np.mean(values)) if values else None

    def sd(self, field: str) -> float | None:
        """Standard deviation of a field over seeds (n - 1); None for fewer than two."""
        values = self._values(field)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def kl_interval(self) -> tuple[float, float]:
        """95% interval of the output KL over sequences, nats: the mean of the seeds' bounds, as all judge one text."""
        low, high = self.mean("output_kl_low"), self.mean("output_kl_high")
        assert low is not None
        assert high is not None
        return low, high

    def _values(self, field: str) -> list[float]:
        return [value for row in self.rows if (value := getattr(row, field)) is not None]


def families(rows: Iterable[EvalRow]) -> dict[str, Family]:
    """The families of some rows by name, in the order of tables and legends."""
    return family_facts(row.family for row in rows)


def seed_groups(rows: Iterable[EvalRow], family: str) -> list[SeedGroup]:
    """The groups of a family from slowest to fastest by modelled speedup, those without one last."""
    grouped: dict[tuple[str, ...], list[EvalRow]] = {}
    for index, row in enumerate(rows):
        if row.family == family:
            dial = "" if row.kl_weight is None else f"{row.kl_weight:.6g}"
            # Only training seeds are averaged over: two rows of what is not trained are two results.
            grouped.setdefault((row.policy, dial, "" if row.seed is not None else str(index)), []).append(row)

    def speed(group: SeedGroup) -> float:
        mean = group.mean("speedup_modelled")
        return math.inf if mean is None else mean

    return sorted((SeedGroup(tuple(members)) for members in grouped.values()), key=speed)


def drawable_rows(rows: Iterable[EvalRow]) -> list[EvalRow]:
    """Rows with a modelled speedup and a KL that has a logarithm; the reference itself has none."""
    return [row for row in rows if row.speedup_modelled is not None and 0 < row.output_kl_nats < math.inf]


def pareto_front(rows: Iterable[EvalRow]) -> list[EvalRow]:
    """The rows that no other one beats in both modelled speedup and output KL, slowest first.

    Takes only `drawable_rows`. Speedup and KL both rise strictly along the result.
    """
    front: list[EvalRow] = []
    for row in sorted(drawable_rows(rows), key=lambda row: (-(row.speedup_modelled or 0.0), row.output_kl_nats)):
        if not front or row.output_kl_nats < front[-1].output_kl_nats:
            front.append(row)
    return front[::-1]


def interpolated_kl(rows: Iterable[EvalRow], speedup: float) -> float | None:
    """Output KL of a front at a modelled speedup, nats.

    Between neighbouring points of the Pareto front the KL is linear in the time of a token: what one gets by running a
    share of the sequences at one point and the rest at the other. So a sparse front (fixed widths) is not credited with
    points that nothing reaches, as a line in log KL would do.

    Args:
        rows: All points of one front.
        speedup: Modelled, over the largest width everywhere.

    Returns:
        None outside the front's range of speeds.
    """
    front = pareto_front(rows)
    speeds = _speeds(front)
    if not front or not speeds[0] <= speedup <= speeds[-1]:
        return None
    return float(np.interp(-1 / speedup, -1 / speeds, [row.output_kl_nats for row in front]))


def captured_headroom(static_kl: float | None, policy_kl: float | None, oracle_kl: float | None) -> float | None:
    """`(static - policy) / (static - oracle)`, all at the same speed, nats.

    1 is the oracle, 0 the static allocation, negative worse than static. None where the oracle is not better than
    static, or where a value is missing (a front that does not reach the speed).
    """
    if static_kl is None or policy_kl is None or oracle_kl is None or not oracle_kl < static_kl:
        return None
    return (static_kl - policy_kl) / (static_kl - oracle_kl)


def best_static_front(rows: Iterable[EvalRow], speedup: float) -> list[EvalRow]:
    """The front of the static family with the least KL at a modelled speedup; empty where none reaches that speed.

    Families are not pooled: a point of one that nothing beats outright may still be above the line of the other, and a
    baseline must never get worse because more of it was evaluated.
    """
    rows = list(rows)
    fronts = [pareto_front(row for row in rows if row.family == family) for family in static_families()]
    reached = [(kl, index) for index, front in enumerate(fronts) if (kl := interpolated_kl(front, speedup)) is not None]
    return fronts[min(reached)[1]] if reached else []


def log_ratio_to_static(
    group: SeedGroup, rows: Iterable[EvalRow], *, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float] | None:
    """Log of a policy's KL over that of the best static front at the same modelled speed, with its 95% interval.

    Each training seed is compared at its own speed, then averaged. Resamples draw test sequences, the same for both,
    and training seeds where there are several.

    Args:
        group: The policy at one dial.
        rows: Holds the static ones; `sequence_kl_nats` must be of the same sequences.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        `(log ratio, low, high)`; None where no seed is at a speed of the static front.

    Raises:
        ValueError: If the rows differ in their number of test sequences.
    """
    rows = list(rows)
    pairs = [(row, best_static_front(rows, row.speedup_modelled or 0.0)) for row in drawable_rows(group.rows)]
    pairs = [(row, front) for row, front in pairs if front]
    if not pairs:
        return None
    generator = np.random.default_rng(seed)
    num_sequences = _num_sequences([part for row, front in pairs for part in ([row], front)])
    weights = _resampling_weights(num_sequences, num_resamples, generator)
    log_ratios = [
        _mean_log_kl([row], at := _speeds([row]), weights) - _mean_log_kl(front, at, weights) for row, front in pairs
    ]
    return _mean_and_interval(np.stack(log_ratios), generator)


@dataclass(frozen=True)
class Comparison:
    """Output KL of family a against family b, averaged over a range of equal modelled speeds.

    All ratios are natural logarithms of KL of a over KL of b: negative where a is better.

    Attributes:
        family_a: The one that is judged.
        family_b: What it is judged against.
        log_ratio: Mean over speeds and seeds.
        log_ratio_low: Lower end of its 95% interval; None where there are fewer than two test sequences.
        log_ratio_high: Upper end.
        seed_log_ratios: `(seed, log ratio)` of each training seed; empty where neither family is trained.
        speedup_low: Slowest common modelled speedup.
        speedup_high: Fastest one.
        num_sequences: Test sequences.
    """

    family_a: str
    family_b: str
    log_ratio: float
    log_ratio_low: float | None
    log_ratio_high: float | None
    seed_log_ratios: tuple[tuple[int, float], ...]
    speedup_low: float
    speedup_high: float
    num_sequences: int

    @property
    def is_significant(self) -> bool:
        """Whether the 95% interval is on one side of zero."""
        if self.log_ratio_low is None or self.log_ratio_high is None:
            return False
        return self.log_ratio_low > 0 or self.log_ratio_high < 0

    def sentence(self) -> str:
        """The result in words, for reports and terminals, without a full stop."""
        change, details = _change(self.log_ratio), self._details()
        if self.log_ratio_low is not None and not self.is_significant:
            return (
                f"no significant difference between {self.family_a} and {self.family_b} at equal modelled speed: "
                f"{change} output KL ({details})"
            )
        if self.log_ratio <= 0:
            return f"{self.family_a} has {change} output KL than {self.family_b} at equal modelled speed ({details})"
        return f"{self.family_a} does not beat {self.family_b}: {change} output KL at equal modelled speed ({details})"

    def _details(self) -> str:
        parts = [f"{self._interval()}; {self.speedup_low:.2f}x to {self.speedup_high:.2f}x"]
        if len(self.seed_log_ratios) == 1:
            parts.append("1 seed")
        elif self.seed_log_ratios:
            parts.append(f"{len(self.seed_log_ratios)} seeds: {_changes([ratio for _, ratio in self.seed_log_ratios])}")
        return "; ".join(parts)

    def _interval(self) -> str:
        if self.log_ratio_low is None or self.log_ratio_high is None:
            return "no interval from one test sequence"
        if not self.is_significant:
            return f"95% CI {_change(self.log_ratio_low)} to {_change(self.log_ratio_high)}"
        low, high = sorted((self.log_ratio_low, self.log_ratio_high), key=abs)
        return f"95% CI {_percent(low)}-{_percent(high)}%"


def compare_at_equal_speed(
    rows: Sequence[EvalRow],
    family_a: str,
    family_b: str,
    *,
    num_speeds: int = 33,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Comparison | None:
    """Compares two families on the range of modelled speeds that all their fronts cover.

    Each training seed has its own front. Resamples draw test sequences, the same for both families, and training seeds
    where there are several: the interval is that of a new training judged on new text. Which points make up a front is
    decided once, on all sequences, and speeds are not resampled.

    Args:
        rows: Rows of any families; `sequence_kl_nats` of the two must be of the same sequences.
        family_a: The one that is judged.
        family_b: What it is judged against.
        num_speeds: Speeds, evenly spaced over the common range.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        None where a family has no front or no speed is common to all fronts.

    Raises:
        ValueError: If the rows differ in their number of test sequences, or if the families have several training seeds
            each and none in common.
    """
    fronts_a, fronts_b = _fronts_by_seed(rows, family_a), _fronts_by_seed(rows, family_b)
    if not fronts_a or not fronts_b:
        return None
    fronts = [*fronts_a.values(), *fronts_b.values()]
    low = max(float(_speeds(front)[0]) for front in fronts)
    high = min(float(_speeds(front)[-1]) for front in fronts)
    if low > high:
        return None
    num_sequences = _num_sequences(fronts)
    speeds = np.linspace(low, high, num_speeds)
    generator = np.random.default_rng(seed)
    weights = _resampling_weights(num_sequences, num_resamples, generator)
    log_ratios = _paired_by_seed(
        {key: _mean_log_kl(front, speeds, weights) for key, front in fronts_a.items()},
        {key: _mean_log_kl(front, speeds, weights) for key, front in fronts_b.items()},
    )
    mean, *interval = _mean_and_interval(np.stack([*log_ratios.values()]), generator)
    return Comparison(
        family_a=family_a,
        family_b=family_b,
        log_ratio=mean,
        log_ratio_low=interval[0] if num_sequences > 1 else None,
        log_ratio_high=interval[1] if num_sequences > 1 else None,
        seed_log_ratios=tuple((key, float(ratio[0])) for key, ratio in log_ratios.items() if key is not None),
        speedup_low=low,
        speedup_high=high,
        num_sequences=num_sequences,
    )


def _change(log_ratio: float) -> str:
    """`7.1% less` or `2.3% more`."""
    return f"{_percent(log_ratio)}% {'more' if log_ratio > 0 else 'less'}"


def _changes(log_ratios: Sequence[float]) -> str:
    """`7.1, 6.4, 8.0% less` where all point the same way, else each with its own direction."""
    if len({ratio > 0 for ratio in log_ratios}) == 1:
        return ", ".join([*map(_percent, log_ratios[:-1]), _change(log_ratios[-1])])
    return ", ".join(map(_change, log_ratios))


def _percent(log_ratio: float) -> str:
    percent = 100 * abs(math.expm1(log_ratio))
    return f"{percent:.0f}" if percent >= 100 else f"{percent:.1f}"


def _speeds(front: Sequence[EvalRow]) -> Array:
    return np.array([row.speedup_modelled for row in front], dtype=np.float64)


def _fronts_by_seed(rows: Sequence[EvalRow], family: str) -> dict[int | None, list[EvalRow]]:
    members = [row for row in rows if row.family == family]
    seeds = sorted({row.seed for row in members}, key=lambda seed: -1 if seed is None else seed)
    fronts = {seed: pareto_front(row for row in members if row.seed == seed) for seed in seeds}
    return {seed: front for seed, front in fronts.items() if front}


def _num_sequences(fronts: Iterable[Sequence[EvalRow]]) -> int:
    found = {(row.policy, len(row.sequence_kl_nats)) for front in fronts for row in front}
    counts = {count for _, count in found}
    if len(counts) != 1 or 0 in counts:
        listing = ", ".join(f"{policy} has {count}" for policy, count in sorted(found))
        raise ValueError(f"policies must be judged on the same test sequences, but {listing}; evaluate them together")
    return counts.pop()


def _resampling_weights(num_sequences: int, num_resamples: int, generator: np.random.Generator) -> Array:
    """Shares of the sequences in each bootstrap resample, `[1 + R, n]`; row 0 takes every sequence once."""
    draws = generator.multinomial(num_sequences, np.full(num_sequences, 1 / num_sequences), size=num_resamples)
    return np.concatenate([np.ones((1, num_sequences)), draws]) / num_sequences


def _mean_and_interval(log_ratios: Array, generator: np.random.Generator) -> tuple[float, float, float]:
    """Mean over seeds of `[S, 1 + R]`, column 0 being the data itself, and the 95% interval over resampled seeds."""
    num_seeds, num_columns = log_ratios.shape
    picks = generator.integers(num_seeds, size=(num_columns - 1, num_seeds))
    resampled = np.take_along_axis(log_ratios[:, 1:].T, picks, axis=1).mean(-1)  # [R]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(log_ratios[:, 0].mean()), float(low), float(high)


def _mean_log_kl(front: Sequence[EvalRow], speeds: Array, weights: Array) -> Array:
    """Log KL of a front, averaged over speeds `[G]`, for each weighting of the sequences `[B, n]` -> `[B]`."""
    # Interpolation is linear in the KL of the points, so their shares at each speed are found once.
    shares = np.stack([np.interp(-1 / speeds, -1 / _speeds(front), point) for point in np.eye(len(front))])  # [P, G]
    sequence_kl = np.array([row.sequence_kl_nats for row in front], dtype=np.float64)  # [P, n]
    log_kl: Array = np.log(np.maximum(weights @ sequence_kl.T @ shares, _SMALLEST_KL_NATS))
    return np.asarray(log_kl.mean(-1), dtype=np.float64)


def _paired_by_seed(a: Mapping[int | None, Array], b: Mapping[int | None, Array]) -> dict[int | None, Array]:
    """Differences a - b of equal seeds; a family with one front is paired with every seed of the other."""
    if len(b) == 1 and (len(a) > 1 or None in b):
        only = next(iter(b.values()))
        return {seed: values - only for seed, values in a.items()}
    if len(a) == 1:
        only = next(iter(a.values()))
        return {seed: only - values for seed, values in b.items()}
    common = [seed for seed in a if seed in b]
    if not common:
        raise ValueError(f"no training seed in common: {sorted(map(str, a))} and {sorted(map(str, b))}; train the same")
    return {seed: a[seed] - b[seed] for seed in common}
