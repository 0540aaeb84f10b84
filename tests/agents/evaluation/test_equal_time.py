"""Static allocations in the time that others took: a policy that is static itself ties with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_rows import row, sequence_kl
from hypothesis import given
from hypothesis import strategies as st

from flexquant_rl.agents.evaluation import equal_time
from flexquant_rl.agents.evaluation.budgets import Contestant, Outcome
from flexquant_rl.agents.evaluation.comparison import compare, left_of_static
from flexquant_rl.agents.evaluation.equal_time import (
    Rung,
    StaticClock,
    beside_static,
    missing_rungs,
    on_validation_text,
    rung_error,
    static_between,
    static_entries,
    static_family,
)
from flexquant_rl.agents.evaluation.evaluate import Evaluator, summarise
from flexquant_rl.agents.evaluation.method import method_sentences
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.engine.control.decision import Decision, StaticAllocation
from flexquant_rl.engine.decoding.decoder import Decoder
from flexquant_rl.fq_env.config import EnvConfig


class Looking:
    """Fixed widths of a policy that has looked at the signals."""

    name = "looking"

    def __init__(self, widths: torch.Tensor) -> None:
        self._widths = widths

    def __call__(self, signals: torch.Tensor) -> Decision:
        return Decision(self._widths.expand(len(signals), -1))


def test_the_line_through_what_the_clock_says() -> None:
    modelled = [0.4, 0.6, 0.8, 1.0]
    clock = StaticClock.fit(modelled, [0.25 + 0.75 * share for share in modelled])
    assert clock is not None
    assert clock.modelled_share(0.7) == pytest.approx(0.6)
    assert clock.misfit == pytest.approx(0, abs=1e-12)
    assert clock.modelled_share(0.275) == pytest.approx(0.2), "half the fastest one's time is half its share"
    noisy = StaticClock.fit(modelled, [0.5, 0.8, 0.8, 1.1])
    assert noisy is not None
    assert noisy.misfit == pytest.approx(math.sqrt(np.mean(np.square([-0.03, 0.09, -0.09, 0.03]))))
    assert noisy.modelled_share(0.8) == pytest.approx(0.8), "static's best of what takes 0.8"


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 50)), min_size=3, max_size=9, unique_by=lambda p: p[0]))
def test_what_was_clocked_is_found_at_its_own_time(steps: list[tuple[int, int]]) -> None:
    """However the clock bends: so an allocation of another family that static has too ties with it."""
    modelled = [share / 100 for share, _ in sorted(steps)]
    measured = np.cumsum([step / 100 for _, step in steps]).tolist()
    clock = StaticClock.fit(modelled[::-1], measured[::-1])
    assert clock is not None
    for share, taken in zip(modelled, measured, strict=True):
        assert clock.modelled_share(taken) == pytest.approx(share)


def test_allocations_in_the_wrong_order_share_their_mean() -> None:
    clock = StaticClock.fit([0.4, 0.6, 0.7, 0.7, 1.0], [0.5, 0.8, 0.65, 0.75, 1.0])
    assert clock is not None
    assert clock.measured == pytest.approx((0.5, 2.2 / 3, 1.0))
    assert clock.modelled == (0.4, 0.7, 1.0)
    taken = torch.linspace(0.3, 1.2, 50).tolist()
    found = [clock.modelled_share(share) for share in taken]
    assert found == sorted(found)


def test_two_times_of_one_share_are_their_mean_and_nothing_else() -> None:
    clock = StaticClock.fit([0.4, 0.6, 0.6, 1.0], [0.5, 0.45, 0.75, 1.0])
    assert clock is not None
    assert clock.measured == pytest.approx((0.5, 0.6, 1.0))
    assert clock.modelled == (0.4, 0.6, 1.0)


@pytest.mark.parametrize(
    ("modelled", "measured"),
    [([0.5, 1.0], [0.5, 1.0]), ([0.5] * 3, [0.4, 0.5, 0.6]), ([0.4, 0.6, 1.0], [1.0, 0.8, 0.6])],
    ids=["two", "one time", "the wrong way"],
)
def test_no_line_where_the_clock_knows_nothing(modelled: list[float], measured: list[float]) -> None:
    assert StaticClock.fit(modelled, measured) is None


def judged(prepared: Prepared, policy: StaticAllocation | Looking, family: str) -> EvalRow:
    evaluator = Evaluator(prepared.model, prepared.profile, prepared.windows.test, prepared.env, cost=prepared.cost)
    trace = evaluator.run(policy)
    evaluator.close()
    return summarise(trace, policy=policy.name, family=family, reference="unquantised")


def beside(
    prepared: Prepared, rows: Sequence[EvalRow], windows: torch.Tensor, env: EnvConfig, clock: StaticClock | None
) -> list[EvalRow]:
    """With the static allocations that are needed."""
    static = static_entries(prepared, missing_rungs(rows, clock))
    return beside_static(prepared, rows, windows, env, clock, static)[0]


@pytest.mark.parametrize("time_share", [0.5, 0.6, 0.8])
def test_static_widths_of_another_family_tie(tiny_prepared: Prepared, time_share: float) -> None:
    """What stands on a rung itself is compared with that very allocation, whatever its family."""
    with on_validation_text(tiny_prepared) as measure:
        (entry,), _ = static_family(tiny_prepared).entries([time_share], measure)
    policy = entry.first.policy
    assert isinstance(policy, StaticAllocation)
    static = replace(judged(tiny_prepared, policy, "static"), time_budget=time_share)
    looking = judged(tiny_prepared, Looking(policy.bit_widths), "looking")
    windows = tiny_prepared.windows.test
    for rows in ([static, looking], [looking]):  # the rung is there already, or it has to be run
        found = beside(tiny_prepared, rows, windows, tiny_prepared.env, None)[-1]
        assert left_of_static(found) == pytest.approx(1.0, rel=1e-3)  # steps against one parallel pass
        assert found.static_kl_nats_measured is None


LADDER = [Rung(share, sequence_kl(math.exp(-10 * share))) for share in (0.4, 0.45, 0.5, 0.6)]


def test_between_two_rungs_the_logarithm_is_straight() -> None:
    for share in (0.4, 0.42, 0.45, 0.58, 0.6, 0.604):
        found = static_between(LADDER, share)
        assert found is not None
        assert found == pytest.approx(sequence_kl(math.exp(-10 * share)))
    assert static_between(LADDER, 0.39) is None
    assert static_between(LADDER, 0.61) is None
    assert static_between([], 0.5) is None
    assert static_between(LADDER[:1], 0.403) == LADDER[0].sequence_kl_nats


def test_sequences_may_fall_at_their_own_rates() -> None:
    """The mean follows its own line exactly, though the sequences go different ways, one of them from zero."""
    generator = np.random.default_rng(0)
    low, high = (Rung(share, (0.0, *generator.lognormal(-3, 1, 9).tolist())) for share in (0.5, 0.6))
    found = static_between([low, high], 0.57)
    assert found is not None
    assert math.log(np.mean(found)) == pytest.approx(0.3 * low.log_kl + 0.7 * high.log_kl)


def test_a_family_thinned_ties_with_itself() -> None:
    """However few points it has: static as such, and as a family of another name at some of its budgets."""
    static = [row("static", share, math.exp(-10 * share)) for share in (0.5, 0.55, 0.6, 0.65, 0.7)]
    for kept in (static, static[::2], static[1:2]):
        thinned = [replace(r, family="thinned", static_kl_nats=static_between(RUNGS, r.time_budget or 0)) for r in kept]
        result = compare([*static, *thinned], "thinned")
        assert result is not None
        assert result.overall.value == pytest.approx(0, abs=1e-12)
        assert len(result.by_setting) == len(kept)


RUNGS = [Rung(share, sequence_kl(math.exp(-10 * share))) for share in (0.5, 0.6, 0.7)]


def test_the_error_of_the_line_is_that_of_a_rung_left_out() -> None:
    kl = {0.5: 0.04, 0.548: 0.02, 0.596: 0.0121}
    rungs = [Rung(share, sequence_kl(nats)) for share, nats in kl.items()]
    assert rung_error(rungs) == pytest.approx(abs(math.log(0.02) - (math.log(0.04) + math.log(0.0121)) / 2))
    assert rung_error(rungs[:2]) is None
    rows = [row("static", share, nats) for share, nats in kl.items()]
    words = " ".join(method_sentences(rows, rungs))
    assert "between the nearest two of 3 allocations" in words
    assert f"within {100 * (0.0220 / 0.02 - 1):.1f}% of the line" in words
    assert "left out" not in " ".join(method_sentences(rows)), "rows stand at budgets, which are farther apart"


def test_gaps_that_nothing_is_compared_across_are_no_error() -> None:
    """A rung whose neighbour on one side is far away, because no row took a time in between."""
    near = [Rung(share, sequence_kl(math.exp(-10 * share))) for share in (0.4, 0.45, 0.5)]
    far = [Rung(share, sequence_kl(0.5)) for share in (0.9, 0.95)]
    assert rung_error([*near, *far]) == pytest.approx(0, abs=1e-9)
    assert rung_error([*near[1:], *far]) is None


def test_the_rungs_are_those_that_rows_are_compared_between(tiny_prepared: Prepared) -> None:
    """Static rows, whatever their budget, and what was run around the time of the other rows."""
    widths = torch.full((3,), 5)
    own = replace(judged(tiny_prepared, StaticAllocation("fixed:5", widths), "static"), time_budget=0.65)
    rows = [own, replace(own, family="ppo", time_share_modelled=0.72)]
    static = static_entries(tiny_prepared, missing_rungs(rows, None))
    compared, rungs = beside_static(tiny_prepared, rows, tiny_prepared.windows.test, tiny_prepared.env, None, static)
    assert {0.7, 0.75, 0.8} <= static.keys()
    run = {float(tiny_prepared.cost.time_share(one.bit_widths)) for one in static.values()}
    assert [rung.time_share for rung in rungs] == pytest.approx([own.time_share_modelled, *sorted(run)])
    assert compared[1].static_kl_nats == static_between(rungs, 0.72)


def test_the_report_says_how_noisy_the_clock_was() -> None:
    shares = {0.5: 0.6, 0.6: 0.75, 0.7: 0.8, 0.8: 0.95}
    static = [row("static", share, 0.02, time_share_measured=measured) for share, measured in shares.items()]
    clock = StaticClock.fit([*shares], [*shares.values()])
    assert clock is not None
    assert clock.misfit > 0
    words = " ".join(method_sentences(static))
    assert f"the static rows miss a straight one by {clock.misfit:.3f} (root mean square)" in words
    assert "root mean square" not in " ".join(method_sentences(static[:2]))
    assert "each other rule is a few lines of Python" in words
    assert "standard error" not in words
    timed = [replace(one, time_share_measured_error=0.0023) for one in static]
    assert "is 0.0023 (median; 0.0023 at most), and intervals" in " ".join(method_sentences(timed))
    assert "`token` looks up" not in words
    assert "`token` looks up" in " ".join(method_sentences([*static, row("token", 0.6, 0.02)]))


def test_static_is_asked_for_the_time_that_was_taken(tiny_prepared: Prepared) -> None:
    """Neither for the budget nor for more: by the table, and by the clock through the line."""
    found = replace(
        judged(tiny_prepared, StaticAllocation("low", torch.full((3,), 4)), "low"),
        time_budget=0.9,
        time_share_measured=0.85,
    )
    clock = StaticClock((0.25, 1.0), (0.001, 1.0), 0.0)
    windows, env = tiny_prepared.windows.test, tiny_prepared.env
    (compared,) = beside(tiny_prepared, [found], windows, env, clock)
    shares = [found.time_share_modelled or 0, clock.modelled_share(0.85)]
    at = [round(share / 0.05, 6) for share in shares]
    steps = {index for exact in at for index in (math.floor(exact), math.ceil(exact), math.ceil(exact) + 1)}
    nominal = sorted(round(0.05 * index, 6) for index in steps if index <= 20)
    evaluator = Evaluator(tiny_prepared.model, tiny_prepared.profile, windows, env)
    rungs = []
    with on_validation_text(tiny_prepared) as measure:
        for entry in static_family(tiny_prepared).entries(nominal, measure)[0]:
            # Token by token, as the rows are, not in the parallel pass that the rungs are made by.
            trace = evaluator.run(entry.first.policy)
            rungs.append(Rung(1 / trace.speedup, tuple(trace.output_kl_nats.double().mean(1).tolist())))
    evaluator.close()
    assert compared.static_kl_nats == pytest.approx(static_between(rungs, shares[0]), rel=1e-3)
    assert compared.static_kl_nats_measured == pytest.approx(static_between(rungs, shares[1]), rel=1e-3)


def test_static_rows_are_their_own_other_side(tiny_prepared: Prepared) -> None:
    own = row("static", 0.6, 0.02, time_share_measured=0.7)
    clock = StaticClock((0.001, 1.0), (0.001, 1.0), 0.0)
    (compared,) = beside(tiny_prepared, [own], tiny_prepared.windows.test, tiny_prepared.env, clock)
    assert compared.static_kl_nats == compared.static_kl_nats_measured == own.sequence_kl_nats


def test_what_the_clocks_error_is_worth(tiny_prepared: Prepared) -> None:
    """Where static's KL falls by a factor e in a tenth of the time, a time known to 0.002 is worth 2% of it."""
    rungs = [Rung(share, sequence_kl(math.exp(-10 * share))) for share in (0.5, 0.6, 0.7)]
    clock = StaticClock((0.001, 1.0), (0.001, 1.0), 0.0)
    timed = row("ppo", 0.6, 0.02, time_share_measured=0.62, time_share_measured_error=0.002)
    assert equal_time._log_error(rungs, timed, clock) == pytest.approx(10 * 0.002)
    at_the_end = replace(timed, time_share_measured=0.5)
    assert equal_time._log_error(rungs, at_the_end, clock) == pytest.approx(10 * 0.002)
    assert equal_time._log_error(rungs, replace(timed, time_share_measured_error=None), clock) is None
    (compared,) = beside(tiny_prepared, [timed], tiny_prepared.windows.test, tiny_prepared.env, clock)
    assert compared.static_log_error_measured is not None
    assert compared.static_log_error_measured > 0


def test_nothing_is_as_fast(tiny_prepared: Prepared) -> None:
    (compared,) = beside(tiny_prepared, [row("ppo", 0.01, 0.02)], tiny_prepared.windows.test, tiny_prepared.env, None)
    assert compared.static_kl_nats is None
    assert compare([compared], "ppo") is None


def test_a_controller_is_charged_and_fixed_widths_are_not(tiny_prepared: Prepared) -> None:
    full_ms = float(tiny_prepared.cost.latency_ms(tiny_prepared.cost.full_width()))
    charging = replace(tiny_prepared, cost=replace(tiny_prepared.cost, controller_ms=0.1 * full_ms))
    widths = torch.full((3,), 4)
    static = judged(charging, StaticAllocation("static", widths), "x")
    looking = judged(charging, Looking(widths), "x")
    assert static.time_share_modelled == pytest.approx(float(tiny_prepared.cost.time_share(widths)))
    assert looking.time_share_modelled == pytest.approx(0.1 + (static.time_share_modelled or 0))
    with on_validation_text(charging) as measure:
        fixed, looks = measure([Contestant("x", one) for one in (StaticAllocation("s", widths), Looking(widths))])
    assert looks.time_share - fixed.time_share == pytest.approx(0.1)


def test_an_allocation_is_run_once(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[list[int]]] = []
    original = equal_time.allocation_kl_nats

    def counted(decoder: Decoder, windows: torch.Tensor, allocations: torch.Tensor, **keywords: Any) -> torch.Tensor:
        asked.append(allocations.tolist())
        return original(decoder, windows, allocations, **keywords)

    monkeypatch.setattr(equal_time, "allocation_kl_nats", counted)
    prepared = replace(tiny_prepared)  # which knows nothing yet

    def ask(*widths: int, num_sequences: int = 8) -> list[Outcome]:
        with on_validation_text(prepared, num_sequences) as measure:
            return measure([Contestant("x", StaticAllocation(str(width), torch.full((3,), width))) for width in widths])

    first = ask(4, 4)
    assert asked == [[[4, 4, 4]]]
    assert first[0] == first[1]
    both = ask(5, 4)
    assert asked[1:] == [[[5, 5, 5]]]
    assert both[1] == first[0]
    assert ask(4, 5) == both[::-1]
    assert len(asked) == 2
    other = ask(4, 5, num_sequences=3)  # other text
    assert asked[2:] == [[[4, 4, 4], [5, 5, 5]]]
    assert other[0].output_kl_nats != both[1].output_kl_nats
    fresh = replace(prepared)
    with on_validation_text(fresh, 8) as measure:
        alone = measure([Contestant("x", StaticAllocation("5", torch.full((3,), 5)))])
    assert alone[0].output_kl_nats == pytest.approx(both[0].output_kl_nats)
    assert len(asked) == 4
