"""At which setting each family of policies meets a time budget, found on validation text alone.

A family is a policy with one knob, or a handful of static allocations. Every family is asked for the same budgets, so
none is judged by more points than another, and nothing has to be interpolated on test text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from flexquant_rl.agents.policies.families import STATIC
from flexquant_rl.engine.control.decision import Policy, StaticAllocation
from flexquant_rl.engine.control.drafts import DraftPolicy

_GRID = 5
_MAX_STEPS = 6
_MAX_MEASURED = 4
# A pass over text each: more take longer than all else that finds a setting.
_MOST_SCORED = 8
# What is left of a budget is no loss: whatever a policy takes, it is compared in that time.
_TOLERANCE = 4e-3
_NARROWEST = 1e-4
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Contestant:
    """One policy at one setting of the dial.

    Attributes:
        family: Its family.
        policy: What decides the widths that a text is read at.
        kl_weight: The dial.
        seed: Training seed of a learned policy.
        drafts: A policy of drafts whose output is that of `policy`, its verify widths; it is what is timed.
    """

    family: str
    policy: Policy
    kl_weight: float | None = None
    seed: int | None = None
    drafts: DraftPolicy | None = None

    @staticmethod
    def of_drafts(family: str, drafts: DraftPolicy) -> Contestant:
        """A policy of drafts: nothing is lost against its verify widths, so its KL is theirs."""
        return Contestant(family, StaticAllocation(drafts.name, drafts.verify_bit_widths), drafts=drafts)

    @property
    def is_static(self) -> bool:
        """Whether every step takes the same widths, and so the time that the latency table has for them."""
        return self.drafts is None and isinstance(self.policy, StaticAllocation)

    @property
    def name(self) -> str:
        """As it appears in tables: learned policies by their family, the others by their own name."""
        return self.policy.name if self.seed is None else self.family


@dataclass(frozen=True)
class Outcome:
    """What a setting gave on validation text.

    Attributes:
        time_share: Time of all steps over that at the largest width everywhere.
        output_kl_nats: Mean over tokens, nats.
    """

    time_share: float
    output_kl_nats: float


@dataclass(frozen=True)
class Entry:
    """How a family meets a time budget: with one policy, or with two static ones that share the time.

    A policy that is given as it is has no budget.

    Attributes:
        family: The family.
        time_budget: The budget; None without one.
        first: The policy.
        second: The one that it shares the time with, if any.
        share: Share of the tokens that the second one decides, 0 to 1.
    """

    family: str
    time_budget: float | None
    first: Contestant
    second: Contestant | None = None
    share: float = 0.0

    @property
    def name(self) -> str:
        """As it appears in tables."""
        return self.first.name if self.second is None else f"{self.first.name}+{self.second.name}"

    @property
    def members(self) -> tuple[Contestant, ...]:
        """The policies that are run."""
        return (self.first,) if self.second is None else (self.first, self.second)


Measure = Callable[[Sequence[Contestant]], list[Outcome]]
"""Runs policies on validation text; static ones that are asked for together cost much less than one by one."""


class BudgetError(Exception):
    """A family does not reach a budget; says why."""


@dataclass(frozen=True)
class KnobFamily:
    """Policies with one knob that trades time for KL.

    Attributes:
        name: Name of the family.
        at: The policy at a position of the knob from 0 to 1, on whatever scale suits it. A new one at every call, as
            policies may own generators.
        seed: Training seed of a learned one.
        grid: Positions that are looked at before any budget.
    """

    name: str
    at: Callable[[float], Contestant]
    seed: int | None = None
    grid: int = _GRID

    def entries(self, budgets: Sequence[float], measure: Measure) -> tuple[list[Entry], list[str]]:
        """An entry for every budget in reach, and why the others are not.

        Args:
            budgets: Time shares.
            measure: Runs a policy on validation text.
        """
        knob = Knob(lambda position: measure([self.at(position)])[0], self.grid)
        found, missed = [], []
        for budget in budgets:
            try:
                found.append(Entry(self.name, budget, self.at(knob.meet(budget))))
            except BudgetError as error:
                seed = "" if self.seed is None else f" (seed {self.seed})"
                missed.append(f"{self.name}{seed} has no point at {budget:.3g} of full-width time: {error}")
        return found, missed


class Knob:
    """Positions from 0 to 1 and what they gave, looked up where it is known.

    Args:
        measure: What a position gives; the time is a continuous function of it, or nearly.
        grid: Positions that are looked at first, evenly spaced.
    """

    def __init__(self, measure: Callable[[float], Outcome], grid: int = _GRID) -> None:
        self._measure = measure
        positions: list[float] = torch.linspace(0, 1, grid, dtype=torch.float64).tolist()
        self.known = {position: measure(position) for position in positions}

    def meet(self, budget: float) -> float:
        """The position of least KL among those known within a budget, after a search for one that uses it up.

        Halves the interval between a position within the budget and its neighbour beyond it, near where a straight line
        meets the budget, until the rest of the budget is not worth a look or the interval is too narrow.

        Raises:
            BudgetError: If all positions of the grid are beyond the budget, or all are within it.
        """
        times = [outcome.time_share for outcome in self.known.values()]
        if min(times) > budget + _ROUNDING:
            raise BudgetError(f"its fastest setting takes {min(times):.3f}")
        if max(times) < budget - _TOLERANCE:
            raise BudgetError(f"its slowest setting takes {max(times):.3f}")
        for step in range(_MAX_STEPS):
            bracket = self._bracket(budget)
            if bracket is None:
                break
            within, beyond = bracket
            rest = budget - self.known[within].time_share
            if rest <= _TOLERANCE or abs(beyond - within) <= _NARROWEST:
                break
            # Every third step is a plain halving: where the time moves in steps, a straight line creeps.
            gap = self.known[beyond].time_share - self.known[within].time_share
            part = 0.5 if step % 3 == 2 else min(max((rest - 0.4 * _TOLERANCE) / gap, 0.05), 0.95)
            position = within + part * (beyond - within)
            self.known[position] = self._measure(position)
        fits = {p: o for p, o in self.known.items() if o.time_share <= budget + _ROUNDING}
        return min(fits, key=lambda position: (fits[position].output_kl_nats, position))

    def _bracket(self, budget: float) -> tuple[float, float] | None:
        """Neighbours within and beyond the budget, of several such pairs that which leaves least of it."""
        pairs = [(a, b) for one, other in pairwise(sorted(self.known)) for a, b in ((one, other), (other, one))]
        limit = budget + _ROUNDING
        brackets = [(a, b) for a, b in pairs if self.known[a].time_share <= limit < self.known[b].time_share]
        return max(brackets, key=lambda pair: (self.known[pair[0]].time_share, pair), default=None)


class Rehearsal(Protocol):
    """Tries settings cheaply, before they are measured."""

    def time_share(self, one: Contestant) -> float:
        """Nearly the time share that measuring would find; it may be off by something that changes slowly."""

    def output_kl_nats(self, one: Contestant) -> float:
        """Nearly the KL, good enough to choose by."""

    def rough_kl_nats(self, one: Contestant) -> float:
        """What costs next to nothing and is good enough to leave out most of many settings."""


@dataclass(frozen=True)
class BestOfFamily:
    """Policies with one knob and further parameters: at each budget the best of a grid of the latter.

    Every member meets every budget in rehearsal, and KL decides there between those that do; of many only between the
    few of least rough KL. The winner is then measured, and its knob turned until the measured time uses the budget up.

    Attributes:
        name: Name of the family.
        members: The same family at each combination of the other parameters.
        rehearsal: Makes the rehearsal, on validation text; asked once.
    """

    name: str
    members: tuple[KnobFamily, ...]
    rehearsal: Callable[[], Rehearsal]

    def entries(self, budgets: Sequence[float], measure: Measure) -> tuple[list[Entry], list[str]]:
        """See `KnobFamily.entries`."""
        rehearsal = self.rehearsal()
        tries = [_Rehearsed(member, rehearsal) for member in self.members]
        found, missed = [], []
        for budget in budgets:
            ranked = _ranked([setting for one in tries if (setting := one.rehearsed(budget)) is not None])
            entry = next((e for e in (one.owner.measured(budget, measure) for one in ranked) if e is not None), None)
            if entry is None:
                times = [outcome.time_share for one in tries for outcome in one.knob.known.values()]
                reach = (
                    f"its settings take {min(times):.3f} to {max(times):.3f}" if times else "it has no settings here"
                )
                missed.append(f"{self.name}{self._seed()} has no point at {budget:.3g} of full-width time: {reach}")
            else:
                found.append(entry)
        return found, missed

    def _seed(self) -> str:
        """The training seed of a learned policy, in words."""
        seeds = {member.seed for member in self.members} - {None}
        return f" (seed {seeds.pop()})" if len(seeds) == 1 else ""


@dataclass(frozen=True)
class _Setting:
    """A member at a position that meets a budget in rehearsal."""

    owner: _Rehearsed
    position: float

    def kl(self) -> float:
        """Rehearsed KL, nats."""
        return self.owner.rehearsal.output_kl_nats(self.owner.member.at(self.position))

    def rough_kl(self) -> float:
        """The same roughly."""
        return self.owner.rehearsal.rough_kl_nats(self.owner.member.at(self.position))


def _ranked(settings: list[_Setting]) -> list[_Setting]:
    """The best first, those that are roughly too bad last; nothing is looked up where there is nothing to choose."""
    if len(settings) <= 1:
        return settings
    if len(settings) <= _MOST_SCORED:
        return sorted(settings, key=_Setting.kl)
    roughly = sorted(settings, key=_Setting.rough_kl)
    return [*sorted(roughly[:_MOST_SCORED], key=_Setting.kl), *roughly[_MOST_SCORED:]]


class _Rehearsed:
    """One member: its knob in rehearsal, and how much longer it took when it was measured."""

    def __init__(self, member: KnobFamily, rehearsal: Rehearsal) -> None:
        self.member, self.rehearsal = member, rehearsal
        self.knob = Knob(self._try, member.grid)
        self._offset = 0.0

    def _try(self, position: float) -> Outcome:
        # Whoever takes more time has less KL: so the knob ends at the position that uses most of a budget.
        time_share = self.rehearsal.time_share(self.member.at(position))
        return Outcome(time_share, -time_share)

    def rehearsed(self, budget: float) -> _Setting | None:
        """The setting for a budget; None out of reach."""
        try:
            return _Setting(self, self.knob.meet(budget - self._offset))
        except BudgetError:
            return None

    def measured(self, budget: float, measure: Measure) -> Entry | None:
        """The setting of least measured KL within a budget; None where no setting that was tried is within it."""
        within: list[tuple[float, float]] = []
        tried: set[float] = set()
        slack = 0.0
        for _ in range(_MAX_MEASURED):
            setting = self.rehearsed(budget - slack)
            if setting is None or setting.position in tried:
                break
            tried.add(setting.position)
            (outcome,) = measure([self.member.at(setting.position)])
            self._offset = outcome.time_share - self.knob.known[setting.position].time_share
            rest = budget - outcome.time_share
            if rest >= -_ROUNDING:
                within.append((outcome.output_kl_nats, setting.position))
                if rest <= _TOLERANCE:
                    break
            # Where the time moves in steps the same aim finds the same step beyond the budget again.
            slack += 0.4 * _TOLERANCE if rest < 0 else 0.0
        return Entry(self.member.name, budget, self.member.at(min(within)[1])) if within else None


@dataclass(frozen=True)
class SharingFamily:
    """A few static policies of which two may share the time, such as fixed widths.

    Attributes:
        name: Name of the family.
        members: The policies.
    """

    name: str
    members: tuple[Contestant, ...]

    def entries(self, budgets: Sequence[float], measure: Measure) -> tuple[list[Entry], list[str]]:
        """See `KnobFamily.entries`; the two neighbours are those on the lower convex hull of time and KL."""
        outcomes = measure(self.members)
        hull = lower_hull(outcomes)
        found, missed = [], []
        for budget in budgets:
            ends = [outcomes[index].time_share for index in hull]
            if not ends or not ends[0] - _ROUNDING <= budget <= ends[-1] + _ROUNDING:
                missed.append(
                    f"{self.name} has no point at {budget:.3g} of full-width time: its members take "
                    f"{min(ends):.3f} to {max(ends):.3f}"
                )
                continue
            found.append(self._entry(budget, hull, outcomes))
        return found, missed

    def _entry(self, budget: float, hull: Sequence[int], outcomes: Sequence[Outcome]) -> Entry:
        for a, b in pairwise(hull):
            fast, slow = outcomes[a].time_share, outcomes[b].time_share
            if budget <= slow:
                share = min(max((budget - fast) / (slow - fast), 0.0), 1.0)
                if share < _ROUNDING:
                    return Entry(self.name, budget, self.members[a])
                if share > 1 - _ROUNDING:
                    return Entry(self.name, budget, self.members[b])
                return Entry(self.name, budget, self.members[a], self.members[b], share)
        return Entry(self.name, budget, self.members[hull[-1]])


def lower_hull(outcomes: Sequence[Outcome]) -> list[int]:
    """Indices of the outcomes on the lower convex hull of KL over time, fastest first, the KL falling."""
    order = sorted(range(len(outcomes)), key=lambda i: (outcomes[i].time_share, outcomes[i].output_kl_nats))
    hull: list[int] = []
    for index in order:
        point = outcomes[index]
        if hull and point.output_kl_nats >= outcomes[hull[-1]].output_kl_nats:
            continue
        while len(hull) > 1 and _is_above(outcomes[hull[-1]], outcomes[hull[-2]], point):
            hull.pop()
        hull.append(index)
    return hull


def _is_above(middle: Outcome, left: Outcome, right: Outcome) -> bool:
    """Whether a point is on or above the line between its neighbours."""
    span = right.time_share - left.time_share
    rise = (right.output_kl_nats - left.output_kl_nats) * (middle.time_share - left.time_share)
    return (middle.output_kl_nats - left.output_kl_nats) * span >= rise


@dataclass(frozen=True)
class StaticFamily:
    """The best allocation that does not look at the token, whoever proposes it.

    Attributes:
        candidates: Allocations worth a try at a budget; their outcomes decide.
        name: Name of the family.
    """

    candidates: Callable[[float], Iterable[StaticAllocation]]
    name: str = STATIC.name

    def entries(self, budgets: Sequence[float], measure: Measure) -> tuple[list[Entry], list[str]]:
        """See `KnobFamily.entries`: of the candidates within the budget the one of least KL on validation text."""
        found, missed = [], []
        proposed = [[Contestant(self.name, one) for one in self.candidates(budget)] for budget in budgets]
        outcomes = iter(measure([one for several in proposed for one in several]))
        for budget, several in zip(budgets, proposed, strict=True):
            tried = [(next(outcomes), one) for one in several]
            within = [(o.output_kl_nats, one) for o, one in tried if o.time_share <= budget + _ROUNDING]
            if not within:
                missed.append(
                    f"{self.name} has no point at {budget:.3g} of full-width time: every allocation is slower"
                )
                continue
            found.append(Entry(self.name, budget, min(within, key=lambda item: item[0])[1]))
        return found, missed


@dataclass(frozen=True)
class MissingFamily:
    """A family that was asked for and is not there.

    Attributes:
        name: Name of the family.
        reason: Why, in words.
    """

    name: str
    reason: str

    def entries(self, budgets: Sequence[float], measure: Measure) -> tuple[list[Entry], list[str]]:
        """See `KnobFamily.entries`: none, and the reason once."""
        return [], [f"{self.name} has no point at any budget: {self.reason}"]


TimedFamily = KnobFamily | BestOfFamily | SharingFamily | StaticFamily | MissingFamily
