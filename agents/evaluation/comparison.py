"""Families compared at equal time: ratios of their output KL, with intervals over documents or seeds.

A policy that is faster and worse than another proves nothing. So what counts of a policy is its KL over that of the
best static allocation in the very time that it took, by the latency table or by the clock. Test sequences differ far
more from each other than policies do, so resamples draw the same documents for both.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexquant_rl.agents.evaluation.resampling import (
    ENOUGH_SEEDS,
    Array,
    document_weights,
    mean_over_seeds,
    percentile_interval,
)
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.policies.families import STATIC, family_facts
from flexquant_rl.agents.policies.unbound import Family

Clock = Literal["modelled", "measured"]
"""Whose time is equal: that of the latency table, or that of a clock on the wall."""
_TIMES = math.log(5)
"""From here on a ratio is said as one: nobody sees what 15734% more is."""

Setting = float | str
"""A time budget; of rows without one the dial or the policy's name."""
SMALLEST_KL_NATS = 1e-12
"""A resampled KL may be exactly zero where whole sequences are; its logarithm must stay finite."""
SMALLEST_LOG_RATIO = 5e-4
"""Ratios of less are printed as 0.0%, and are none."""


@dataclass(frozen=True)
class SeedGroup:
    """The rows of one policy at one setting, one for each training seed; a single row for what is not trained."""

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
    def time_budget(self) -> float | None:
        """The budget of all rows."""
        return self.rows[0].time_budget

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
        """95% interval of the output KL over documents, nats: the mean of the seeds' bounds, as all judge one text."""
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
    """The groups of a family from slowest to fastest, those without a modelled time last.

    Training seeds at one time budget are a group, whatever their dials; so are those at one dial without a budget.
    """
    grouped: dict[tuple[str, ...], list[EvalRow]] = {}
    for index, row in enumerate(rows):
        if row.family == family:
            setting = f"dial {row.kl_weight:.6g}" if row.kl_weight is not None else ""
            setting = setting if row.time_budget is None else f"budget {row.time_budget}"
            # Only training seeds are averaged over: two rows of what is not trained are two results.
            grouped.setdefault((row.policy, setting, "" if row.seed is not None else str(index)), []).append(row)

    def slowness(group: SeedGroup) -> float:
        mean = group.mean("time_share_modelled")
        return math.inf if mean is None else -mean

    return sorted((SeedGroup(tuple(members)) for members in grouped.values()), key=slowness)


def drawable_rows(rows: Iterable[EvalRow]) -> list[EvalRow]:
    """Rows with a time, modelled or measured, and a KL that has a logarithm; the reference itself has none."""
    return [row for row in rows if has_time(row) and 0 < row.output_kl_nats < math.inf]


def has_time(row: EvalRow) -> bool:
    """Whether there is a modelled or a measured time."""
    return row.time_share_modelled is not None or row.time_share_measured is not None


def steps_unlike_static(rows: Sequence[EvalRow], family: str) -> str | None:
    """How often a family's widths are not those of static in equal time, in words without a full stop.

    None where no row of the family has a static allocation beside it.
    """
    shares = [
        (group.rows[0].time_budget, group.mean("differs_from_static"))
        for group in seed_groups([row for row in rows if row.time_budget is not None], family)
    ]
    known = sorted((budget, share) for budget, share in shares if budget is not None and share is not None)
    if not known:
        return None
    at = ", ".join(f"{100 * share:.0f}% at {budget:.3g}" for budget, share in known)
    return f"steps of {family} whose widths are not those of static at the same time budget: {at}"


def captured_headroom(static_kl: float | None, policy_kl: float | None, oracle_kl: float | None) -> float | None:
    """`(static - policy) / (static - oracle)`, all at the same time budget, nats.

    1 is the oracle, 0 the static allocation, negative worse than static. None where the oracle is not better than
    static, or where a value is missing (a family that does not reach the budget).
    """
    if static_kl is None or policy_kl is None or oracle_kl is None or not oracle_kl < static_kl:
        return None
    return (static_kl - policy_kl) / (static_kl - oracle_kl)


@dataclass(frozen=True)
class LogRatio:
    """Natural logarithm of the KL of one family over that of another: negative where the first is better.

    Attributes:
        value: The mean over training seeds.
        low: Lower end of its 95% interval; None where one document gives none.
        high: Upper end.
        num_seeds: Training seeds behind it; 0 where neither family is trained.
    """

    value: float
    low: float | None
    high: float | None
    num_seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is on one side of zero; an end that is printed as 0.0% is not."""
        return (
            self.low is not None
            and self.high is not None
            and (self.low >= SMALLEST_LOG_RATIO or self.high <= -SMALLEST_LOG_RATIO)
        )

    def words(self) -> str:
        """E.g. `7.1% less (95% interval 9.0% less to 5.2% less, which excludes zero)`."""
        if self.low is None or self.high is None:
            return f"{_change(self.value)} (one document gives no interval)"
        if self.num_seeds >= ENOUGH_SEEDS:
            verdict = "significant" if self.excludes_zero else "not significant"
        else:
            verdict = "excludes zero" if self.excludes_zero else "includes zero"
        return f"{_change(self.value)} (95% interval {_change(self.low)} to {_change(self.high)}, {verdict})"


@dataclass(frozen=True)
class Comparison:
    """Output KL of family a against family b in equal time, at the settings that both have.

    Attributes:
        family_a: The one that is judged.
        family_b: What it is judged against.
        clock: Whose time is equal.
        by_setting: The settings, time budgets ascending where they have them, and the ratio at each.
        overall: The mean of the logarithms over settings: the geometric mean of the ratios.
        seed_log_ratios: `(seed, log ratio)` of each training seed, overall; empty where neither family is trained.
        num_documents: Documents of the test text.
    """

    family_a: str
    family_b: str
    clock: Clock
    by_setting: tuple[tuple[Setting, LogRatio], ...]
    overall: LogRatio
    seed_log_ratios: tuple[tuple[int, float], ...]
    num_documents: int

    def sentence(self) -> str:
        """The result over all settings in words, for reports and terminals, without a full stop."""
        settings = [setting for setting, _ in self.by_setting]
        parts = [f"geometric mean over {len(settings)} {_range(settings)}"] if len(settings) > 1 else []
        if len(self.seed_log_ratios) == 1:
            parts.append("1 seed")
        elif self.seed_log_ratios:
            parts.append(f"{len(self.seed_log_ratios)} seeds: {_changes([ratio for _, ratio in self.seed_log_ratios])}")
        return "; ".join(
            [
                f"output KL of {self.family_a} against {self.family_b} at equal {self.clock} time: "
                f"{self.overall.words()}",
                *parts,
            ]
        )

    def setting_sentence(self) -> str:
        """The result at each setting in words, without a full stop."""
        parts = [f"at {_name(setting)} {ratio.words()}" for setting, ratio in self.by_setting]
        return f"{self.family_a} against {self.family_b} at equal {self.clock} time, one by one: {'; '.join(parts)}"


def compare(
    rows: Sequence[EvalRow],
    family_a: str,
    family_b: str = STATIC.name,
    *,
    clock: Clock = "modelled",
    budgets: Sequence[float] | None = None,
) -> Comparison | None:
    """Compares two families in equal time, at the settings at which every training seed of both has a row.

    Static needs no rows: what it reaches in the time of a row stands in the row. Two other families are compared by
    what each of them leaves of static's KL.

    Below `ENOUGH_SEEDS` training seeds the interval is that of the mean over these very seeds on other documents, from
    that number on that of other seeds on other documents.

    Args:
        rows: Rows of any families; those of the two must be of the same sequences.
        family_a: The one that is judged.
        family_b: What it is judged against.
        clock: Whose time is equal.
        budgets: Time budgets to compare at, where both have rows; default: all settings.

    Returns:
        None where the families have no setting in common, or nothing was timed.

    Raises:
        ValueError: If the rows differ in their test sequences, or if the families have several training seeds each and
            none in common.
    """
    a, b = (_by_seed(rows, family, clock) for family in (family_a, family_b))
    a, b = (b if family_a == STATIC.name else a), (a if family_b == STATIC.name else b)
    if not a or not b:
        return None
    common = set.intersection(*(set(found) for found in (*a.values(), *b.values())))
    chosen = sorted(common if budgets is None else common & set(budgets), key=_order)
    if not chosen:
        return None
    used = [found[setting] for found in (*a.values(), *b.values()) for setting in chosen]
    documents = _documents(used)
    weights = document_weights(documents)
    pairs = _paired_by_seed(a, b)
    seeds = [seed for seed in pairs if seed is not None]

    def left(row: EvalRow, family: str) -> Array:
        # Static against itself: nothing, whatever row stands for it.
        draws_seeds = row.seed is not None and len(seeds) >= ENOUGH_SEEDS
        return np.zeros(len(weights)) if family == STATIC.name else _log_left(row, weights, clock, draws_seeds)

    # [S, G, 1 + R]: column 0 is the text itself.
    logs = np.stack(
        [[left(one[g], family_a) - left(other[g], family_b) for g in chosen] for one, other in pairs.values()]
    )
    num_documents = len(set(documents))

    def ratio(values: Array) -> LogRatio:
        return _log_ratio(values, len(seeds), num_documents)

    return Comparison(
        family_a=family_a,
        family_b=family_b,
        clock=clock,
        by_setting=tuple((setting, ratio(logs[:, index])) for index, setting in enumerate(chosen)),
        overall=ratio(logs.mean(1)),
        seed_log_ratios=tuple((seed, float(values[0])) for seed, values in zip(seeds, logs.mean(1), strict=False)),
        num_documents=num_documents,
    )


def compare_by_both_clocks(
    rows: Sequence[EvalRow], family_a: str, families_b: Sequence[str], *, budgets: Sequence[float] | None = None
) -> list[Comparison]:
    """A family against others in equal modelled and in equal measured time, where both have rows; as `compare`."""
    clocks: tuple[Clock, ...] = ("modelled", "measured")
    found = [
        compare(rows, family_a, family_b, clock=clock, budgets=budgets) for family_b in families_b for clock in clocks
    ]
    return [comparison for comparison in found if comparison is not None]


def ratios_to_static(rows: Sequence[EvalRow], family: str, clock: Clock = "modelled") -> dict[Setting, LogRatio]:
    """The ratio of a family to static in equal time at each of its settings; empty for static itself."""
    comparison = None if family == STATIC.name else compare(rows, family, clock=clock)
    return {} if comparison is None else dict(comparison.by_setting)


def left_of_static(row: EvalRow, clock: Clock = "modelled") -> float | None:
    """The KL of a row over that of static in equal time; None where static has none."""
    side = row.static_kl_nats if clock == "modelled" else row.static_kl_nats_measured
    return None if side is None else row.output_kl_nats / max(float(np.mean(side)), SMALLEST_KL_NATS)


def _log_ratio(values: Array, num_seeds: int, num_documents: int) -> LogRatio:
    """Of `[S, 1 + R]` log ratios: the mean over seeds, and the interval that the number of seeds allows."""
    means = mean_over_seeds(values)
    low, high = percentile_interval(means[1:]) if num_documents > 1 else (None, None)
    return LogRatio(float(means[0]), low, high, num_seeds)


def _change(log_ratio: float) -> str:
    """`7.1% less`, `2.3% more` or `12.5 times as much`."""
    if log_ratio >= _TIMES:
        return f"{math.exp(log_ratio):.3g} times as much"
    if log_ratio == 0:
        return "0.0% more"
    return f"{_percent(log_ratio)}% {'more' if log_ratio > 0 else 'less'}"


def _changes(log_ratios: Sequence[float]) -> str:
    """`7.1, 6.4, 8.0% less` where all point the same way, else each with its own direction."""
    if len({ratio > 0 for ratio in log_ratios}) == 1 and max(log_ratios) < _TIMES:
        return ", ".join([*map(_percent, log_ratios[:-1]), _change(log_ratios[-1])])
    return ", ".join(map(_change, log_ratios))


def _percent(log_ratio: float) -> str:
    percent = 100 * abs(math.expm1(log_ratio))
    return f"{percent:.0f}" if percent >= 100 else f"{percent:.1f}"


def setting_of(row: EvalRow) -> Setting:
    """What tells the rows of one policy apart: the time budget, else the dial, else the name."""
    if row.time_budget is not None:
        return row.time_budget
    return row.policy if row.kl_weight is None else f"dial {row.kl_weight:.6g}"


def _order(setting: Setting) -> tuple[bool, float, str]:
    """Budgets by size, then names as they are."""
    return (False, setting, "") if isinstance(setting, float) else (True, 0.0, str(setting))


def _name(setting: Setting) -> str:
    return setting if isinstance(setting, str) else f"{setting:.3g}"


def _range(settings: Sequence[Setting]) -> str:
    budgets = [setting for setting in settings if not isinstance(setting, str)]
    if len(budgets) < len(settings):
        return "settings"
    return f"time budgets from {budgets[0]:.3g} to {budgets[-1]:.3g}"


def _by_seed(rows: Sequence[EvalRow], family: str, clock: Clock) -> dict[int | None, dict[Setting, EvalRow]]:
    """The rows of a family that static has an other side of, by training seed and setting."""
    found: dict[int | None, dict[Setting, EvalRow]] = {}
    for row in rows:
        if row.family == family and left_of_static(row, clock) is not None:
            found.setdefault(row.seed, {})[setting_of(row)] = row
    return dict(sorted(found.items(), key=lambda item: -1 if item[0] is None else item[0]))


def _documents(rows: Iterable[EvalRow]) -> tuple[int, ...]:
    found = {(row.policy, row.sequence_documents) for row in rows}
    documents = {owners for _, owners in found}
    if len(documents) != 1 or () in documents:
        listing = ", ".join(f"{policy} has {len(owners)}" for policy, owners in sorted(found))
        raise ValueError(f"policies must be judged on the same test sequences, but {listing}; evaluate them together")
    return documents.pop()


def _log_left(row: EvalRow, weights: Array, clock: Clock, draws_seeds: bool) -> Array:
    """Log of what a row leaves of static's KL, under each weighting of the sequences, `[1 + R, n]` -> `[1 + R]`.

    By the clock each resample draws the clock's error too.
    """
    side = row.static_kl_nats if clock == "modelled" else row.static_kl_nats_measured
    own, static = (weights @ np.array(kl, dtype=np.float64) for kl in (row.sequence_kl_nats, side))
    logs = (np.log(np.maximum(kl, SMALLEST_KL_NATS)) for kl in (own, static))
    left = np.asarray(np.subtract(*logs), dtype=np.float64)
    if clock == "measured" and row.static_log_error_measured is not None:
        # The static allocations beside a row are those of all rows at its setting; the row was timed by itself. How far
        # seeds are apart has that in it already, where seeds are drawn.
        timed_as = [f"static {setting_of(row)}"]
        timed_as += [] if draws_seeds else [f"{row.family} {row.policy} {row.seed} {row.kl_weight}"]
        for timed in timed_as:
            generator = np.random.default_rng((zlib.crc32(timed.encode()), 2))
            left[1:] += row.static_log_error_measured * generator.standard_normal(len(left) - 1)
    return left


_Rows = Mapping[Setting, EvalRow]


def _paired_by_seed(
    a: Mapping[int | None, _Rows], b: Mapping[int | None, _Rows]
) -> dict[int | None, tuple[_Rows, _Rows]]:
    """Equal seeds of both; a family that has one training, or none, is paired with every seed of the other."""
    if len(b) == 1 and (len(a) > 1 or None in b):
        only = next(iter(b.values()))
        return {seed: (found, only) for seed, found in a.items()}
    if len(a) == 1:
        only = next(iter(a.values()))
        return {seed: (only, found) for seed, found in b.items()}
    common = [seed for seed in a if seed in b]
    if not common:
        raise ValueError(f"no training seed in common: {sorted(map(str, a))} and {sorted(map(str, b))}; train the same")
    return {seed: (a[seed], b[seed]) for seed in common}
