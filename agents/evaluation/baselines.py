"""What the learned policy has to beat, each with every parameter searched: the families that look at the text.

At each time budget the knob of a family is turned until the budget is used up, once for each combination of its other
parameters, and the combination of least KL on validation text is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from functools import cache
from itertools import pairwise, product

from flexquant_rl.agents.evaluation.budgets import BestOfFamily, Contestant, KnobFamily, Rehearsal
from flexquant_rl.agents.evaluation.equal_time import VALIDATION_SEQUENCES
from flexquant_rl.agents.evaluation.rehearsal import RecordedText
from flexquant_rl.agents.policies.entropy import EntropyThreshold
from flexquant_rl.agents.policies.families import bind_policy, family_name
from flexquant_rl.agents.policies.random_widths import RandomWidths
from flexquant_rl.agents.policies.regressor import Regressor
from flexquant_rl.agents.policies.schedule import Schedule
from flexquant_rl.agents.policies.unbound import PolicyContext, UnboundPolicy
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.fq_env.prompts import spread

_SCORED_SEQUENCES = 6
_GRID = 5
# Entropies of real text, nats.
_HIGHEST_ENTROPY_NATS = 10.0
# Spreads from a switch to a slow slope, nats, with and without hysteresis, units, and the form that never returns. A
# hysteresis of three units was nowhere better.
_SPREADS_NATS, _HYSTERESES_UNITS, _ONE_WAY = (0.5, 2.0, 6.0), (0, 1), (False, True)
# Nats for a full-width step: from where nearly every token gets the high widths to where none does.
_MULTIPLIERS = (1e-4, 1e2)
# Where a stored width and the next are too far apart, a point of the static front between them.
_BETWEEN = 0.45


def tuned_baselines(
    prepared: Prepared,
    context: PolicyContext,
    names: Collection[str],
    rehearsal: Callable[[], Rehearsal] | None = None,
) -> list[BestOfFamily]:
    """Random widths, entropy, schedule and regressor, those that are named.

    Args:
        prepared: Model, text, latencies.
        context: What policies may know of the model.
        names: Families that are wanted.
        rehearsal: That of all families; default: one of these alone.
    """
    widths = prepared.model.bit_widths
    pairs = mean_pairs(widths)
    rehearsal = rehearsal or validation_rehearsal(prepared)

    def best_of(kind: type[UnboundPolicy], knobs: Iterable[Callable[[float], UnboundPolicy]]) -> BestOfFamily:
        name = family_name_of(kind)
        members = tuple(KnobFamily(name, _bound(knob, context), grid=_GRID) for knob in knobs)
        return BestOfFamily(name, members, rehearsal)

    families = [
        best_of(RandomWidths, [_random(widths)]),
        best_of(
            EntropyThreshold,
            (
                _entropy(low, high, spread, hysteresis, one_way)
                for (low, high), spread, hysteresis, one_way in product(
                    _width_pairs(widths), _SPREADS_NATS, _HYSTERESES_UNITS, _ONE_WAY
                )
            ),
        ),
        best_of(Schedule, (_schedule(low, high, prepared.env.max_new_tokens) for low, high in pairs)),
        best_of(
            Regressor,
            (_regressor(low, high) for low, high in pairs if Regressor(0.0, low, high).added_time(context) > 0),
        ),
    ]
    return [family for family in families if family.name in names]


def validation_rehearsal(prepared: Prepared) -> Callable[[], RecordedText]:
    """The validation text that settings are found on; recorded once, when the first family asks for it."""

    @cache
    def recorded() -> RecordedText:
        windows = spread(prepared.windows.validation, VALIDATION_SEQUENCES)
        return RecordedText(
            prepared.model, prepared.profile, windows, prepared.env, prepared.cost, num_scored=_SCORED_SEQUENCES
        )

    return recorded


def contestant(policy: UnboundPolicy, context: PolicyContext) -> Contestant:
    """A policy that learns nothing, bound to the model."""
    return Contestant(family_name(policy), bind_policy(policy, context))


def family_name_of(kind: type[UnboundPolicy]) -> str:
    """The family of a class of ours."""
    return kind.family.name  # type: ignore[attr-defined,no-any-return]


def _bound(knob: Callable[[float], UnboundPolicy], context: PolicyContext) -> Callable[[float], Contestant]:
    return lambda position: contestant(knob(position), context)


def _random(widths: tuple[int, ...]) -> Callable[[float], UnboundPolicy]:
    return lambda position: RandomWidths(round(widths[0] + position * (widths[-1] - widths[0]), 4))


def _schedule(low: float, high: float, num_tokens: int) -> Callable[[float], UnboundPolicy]:
    return lambda position: Schedule(round(position * num_tokens), high=high, low=low)


def _entropy(
    low: int, high: int, spread_nats: float, hysteresis_units: int, one_way: bool
) -> Callable[[float], UnboundPolicy]:
    margin = spread_nats / 2 + 0.5  # beyond it no entropy moves anything
    highest, lowest = _HIGHEST_ENTROPY_NATS + margin, -margin
    return lambda position: EntropyThreshold(
        round(highest + position * (lowest - highest), 4), spread_nats, hysteresis_units, one_way, low, high
    )


def _regressor(low: float, high: float) -> Callable[[float], UnboundPolicy]:
    least, most = map(math.log, _MULTIPLIERS)
    return lambda position: Regressor(float(f"{math.exp(most + position * (least - most)):.5g}"), low, high)


def _width_pairs(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Stored widths next to each other, and the 4 and 8 bits of the paper or what is nearest to them."""
    paper = min(widths[:-1], key=lambda width: abs(width - 4)), widths[-1]
    return list(dict.fromkeys([*pairwise(widths), paper]))


def mean_pairs(widths: tuple[int, ...]) -> list[tuple[float, float]]:
    """Means half a stored width apart, a whole one apart, and the paper's."""
    stops: list[float] = []
    for low, high in pairwise(widths):
        stops += [float(low), round(low + _BETWEEN * (high - low), 2)]
    stops.append(float(widths[-1]))
    low, high = _width_pairs(widths)[-1]
    pairs = [*pairwise(stops), *zip(stops, stops[2:], strict=False), (float(low), float(high))]
    return list(dict.fromkeys(pairs))
