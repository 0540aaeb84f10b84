"""Rows of oracles and of choices in flight: on everyone's text, and how much of the headroom is captured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation_rows import row

from flexquant_rl.agents.evaluation import contest
from flexquant_rl.agents.evaluation.contest import Settings
from flexquant_rl.agents.evaluation.equal_time import static_family
from flexquant_rl.agents.evaluation.references import headroom, oracle_budget, oracle_rows, relative_error_rows
from flexquant_rl.agents.evaluation.report import write_report
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.preparation import Prepared

BUDGET = 0.6
ORACLE = row("oracle", BUDGET, 0.005)


def learned_row(kl: float, seed: int = 0, budget: float = BUDGET) -> EvalRow:
    return row("ppo", budget, kl, seed=seed)


@pytest.mark.parametrize(("kl", "share"), [(0.015, 0.5), (0.025, 0.0), (0.005, 1.0), (0.045, -1.0)])
def test_headroom_by_hand(kl: float, share: float) -> None:
    assert headroom([ORACLE, learned_row(kl)]) == pytest.approx(share, abs=1e-9)


def test_headroom_is_the_mean_over_seeds_at_the_oracles_budget() -> None:
    rows = [ORACLE, learned_row(0.015), learned_row(0.025, seed=1)]
    assert headroom(rows) == pytest.approx(0.25)
    others = [row("fixed", BUDGET, 0.001), row("static", 0.7, 0.001), learned_row(0.001, budget=0.7)]
    assert headroom([*rows, *others]) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "rows",
    [
        [learned_row(0.015)],  # no oracle
        [ORACLE],  # nothing learned
        [ORACLE, learned_row(0.015, budget=0.7)],  # never at the oracle's budget
        [replace(ORACLE, static_kl_nats=None), learned_row(0.015)],  # static never takes the oracle's time
        [row("oracle", BUDGET, 0.05), learned_row(0.015)],  # an oracle worse than static
    ],
)
def test_no_headroom_without_both_ends(rows: list[EvalRow]) -> None:
    assert headroom(rows) is None


@pytest.mark.parametrize("stronger_first", [True, False])
def test_headroom_is_that_of_the_stronger_oracle(stronger_first: bool) -> None:
    oracles = [ORACLE, row("oracle-unit", BUDGET, 0.015)]
    rows = [*(oracles if stronger_first else oracles[::-1]), learned_row(0.015)]
    assert headroom(rows) == pytest.approx(0.5)
    by_units = [replace(one, family="oracle-unit" if one is ORACLE else "oracle") for one in oracles]
    assert headroom([*by_units, learned_row(0.015)]) == pytest.approx(0.5)


def settings_at(prepared: Prepared, *budgets: float) -> Settings:
    return contest.tune(prepared, [static_family(prepared)], budgets, 4)


def test_oracle_rows_are_on_the_same_text(tiny_prepared: Prepared) -> None:
    budget = 0.6
    token, unit = oracle_rows(tiny_prepared, 2, budget, 8, settings_at(tiny_prepared, budget))
    assert (token.policy, unit.policy) == ("oracle:token", "oracle:unit")
    # Two families: rows of one are told apart by their budget, and these have the same.
    assert (token.family, unit.family) == ("oracle", "oracle-unit")
    for result in (token, unit):
        assert (result.num_sequences, result.time_budget) == (2, budget)
        assert result.time_share_measured is None
        assert result.differs_from_static is not None
        assert 0 < result.output_kl_nats < math.inf
        assert result.time_share_modelled is not None
        assert budget - 0.02 < result.time_share_modelled <= budget + 1e-6


@pytest.mark.parametrize(
    ("asked", "budget"),
    [
        ((0.5, 0.6, 0.7, 0.8), 0.6),
        ((0.9, 0.55), 0.55),
        ((0.01, 0.99), 0.99),  # nothing is as fast as the one that is nearer
    ],
)
def test_oracles_take_an_asked_budget(tiny_prepared: Prepared, asked: tuple[float, ...], budget: float) -> None:
    assert oracle_budget(tiny_prepared, asked) == budget


def test_relative_error_rows_say_that_nothing_here_serves_them(tiny_prepared: Prepared, tmp_path: Path) -> None:
    budgets = (0.1, 0.7)  # the first is out of reach
    (result,) = relative_error_rows(tiny_prepared, 4, budgets, settings_at(tiny_prepared, *budgets))
    assert (result.family, result.time_budget, result.num_sequences) == ("relative-error", 0.7, 4)
    assert result.time_share_measured is None
    assert result.time_share_modelled == pytest.approx(0.7, abs=0.06)
    assert result.differs_from_static is not None
    for rows, is_said in (([result], True), ([learned_row(0.01)], False)):
        write_report(tmp_path, rows=rows, sentences=[], facts={})
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert ("`relative-error` chooses a unit's width within the pass" in text) == is_said
