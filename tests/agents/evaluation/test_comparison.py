"""Comparisons at equal time budgets: known ratios, pairing, seeds and words; the intervals behind them."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from evaluation_rows import BUDGETS, evaluation, row, static_kl

from flexquant_rl.agents.evaluation.comparison import (
    Comparison,
    LogRatio,
    captured_headroom,
    compare,
    compare_by_both_clocks,
    ratios_to_static,
)
from flexquant_rl.agents.evaluation.method import method_sentences
from flexquant_rl.agents.evaluation.resampling import document_weights, percentile_interval, seed_weights
from flexquant_rl.agents.evaluation.rows import EvalRow


@pytest.mark.parametrize(
    ("static", "policy", "oracle", "expected"),
    [(0.4, 0.3, 0.2, 0.5), (0.4, 0.4, 0.2, 0.0), (0.4, 0.5, 0.2, -0.5), (0.4, 0.3, 0.4, None), (None, 0.3, 0.2, None)],
)
def test_captured_headroom(static: float | None, policy: float, oracle: float, expected: float | None) -> None:
    assert captured_headroom(static, policy, oracle) == (expected if expected is None else pytest.approx(expected))


def compared(rows: list[EvalRow], a: str = "ppo", b: str = "static") -> Comparison:
    """A comparison that must exist."""
    result = compare(rows, a, b)
    assert result is not None
    return result


def test_a_known_ratio_is_found() -> None:
    result = compared(evaluation(factor=0.9, noise=0.02))
    assert math.exp(result.overall.value) == pytest.approx(0.9, abs=0.01)
    assert result.overall.low is not None
    assert result.overall.high is not None
    assert result.overall.low < result.overall.value < result.overall.high < 0
    assert [budget for budget, _ in result.by_setting] == [*BUDGETS]
    # The geometric mean of the ratios over budgets.
    assert np.mean([ratio.value for _, ratio in result.by_setting]) == pytest.approx(result.overall.value)
    assert [seed for seed, _ in result.seed_log_ratios] == [0, 1, 2]
    assert np.mean([ratio for _, ratio in result.seed_log_ratios]) == pytest.approx(result.overall.value)
    assert re.fullmatch(
        r"output KL of ppo against static at equal modelled time: \d+\.\d% less "
        r"\(95% interval \d+\.\d% less to \d+\.\d% less, excludes zero\); "
        r"geometric mean over 4 time budgets from 0\.5 to 0\.8; "
        r"3 seeds: (\d+\.\d, ){2}\d+\.\d% less",
        result.sentence(),
    )
    assert len(re.findall(r"at 0\.\d \d+\.\d% less \(95% interval", result.setting_sentence())) == 4


def test_equal_policies_have_a_ratio_of_exactly_one() -> None:
    rows = [r for r in evaluation() if r.family == "static"]
    twins = [replace(r, family="twin", policy="twin") for r in rows]
    result = compared([*rows, *twins], "twin", "static")
    assert [(ratio.value, ratio.low, ratio.high) for _, ratio in result.by_setting] == [(0.0, 0.0, 0.0)] * 4
    assert (result.overall.value, result.overall.excludes_zero) == (0.0, False)
    assert "0.0% more (95% interval 0.0% more to 0.0% more, includes zero)" in result.sentence()


def test_a_large_ratio_is_said_as_one() -> None:
    result = compared(evaluation(factor=12.0, noise=0.0))
    assert ": 12 times as much (95% interval 12 times as much to 12 times as much, excludes zero)" in result.sentence()
    assert "3 seeds: 12 times as much, 12 times as much, 12 times as much" in result.sentence()
    assert ": 400% more " in compared(evaluation(factor=4.999, noise=0.0)).sentence()


def test_pairing_removes_what_documents_share() -> None:
    # Documents differ by a factor of several, yet two families with one ratio everywhere leave nothing to doubt.
    overall = compared(evaluation(factor=0.97, noise=0.0)).overall
    assert [overall.value, overall.low, overall.high] == pytest.approx([math.log(0.97)] * 3)


def test_comparison_is_antisymmetric_and_repeatable() -> None:
    rows = evaluation(noise=0.1)
    forth, back = compared(rows), compared(rows, "static", "ppo")
    assert back.overall.value == pytest.approx(-forth.overall.value)
    assert back.overall.low == pytest.approx(-(forth.overall.high or 0))
    assert forth == compared(rows)


def test_both_clocks_against_every_other_family() -> None:
    """In the order of the families; what was not timed has no measured comparison, and who has no rows none at all."""
    rows = [
        replace(r, static_kl_nats_measured=r.static_kl_nats) if r.family in ("ppo", "random", "static") else r
        for r in evaluation()
    ]
    found = compare_by_both_clocks(rows, "ppo", ("static", "random", "fixed", "schedule"), budgets=BUDGETS[:2])
    assert [(one.family_b, one.clock) for one in found] == [
        ("static", "modelled"),
        ("static", "measured"),
        ("random", "modelled"),
        ("random", "measured"),
        ("fixed", "modelled"),
    ]
    assert {budget for one in found for budget, _ in one.by_setting} == set(BUDGETS[:2])
    assert found[3].sentence().startswith("output KL of ppo against random at equal measured time: 54.9% less")


def test_intervals_by_the_clock_have_its_error_in_them() -> None:
    """A policy 5% better on every text is not sure to be better where each clocked time is worth 3% of the KL."""
    rows = [
        replace(r, static_kl_nats_measured=r.static_kl_nats, static_log_error_measured=0.03)
        for r in evaluation(factor=0.95, noise=0.0, seeds=1)
    ]
    exact, noisy = (compare(rows, "ppo", clock=clock, budgets=BUDGETS[:1]) for clock in ("modelled", "measured"))
    assert exact is not None
    assert noisy is not None
    assert exact.overall.excludes_zero
    assert exact.overall.value == pytest.approx(noisy.overall.value)
    assert not noisy.overall.excludes_zero
    assert noisy.overall.low is not None
    assert noisy.overall.low == pytest.approx(math.log(0.95) - 1.96 * 0.03 * math.sqrt(2), abs=0.01)
    # Rows are timed one by one: over four budgets the errors are half as large.
    every = compare(rows, "ppo", clock="measured", budgets=BUDGETS[:4])
    assert every is not None
    assert every.overall.low == pytest.approx(math.log(0.95) - 1.96 * 0.03 * math.sqrt(2) / 2, abs=0.01)
    assert compare(rows, "ppo", clock="measured") == compare(rows, "ppo", clock="measured")
    # Between two families static's own times make no difference.
    other = [*rows, *(replace(r, family="token", policy="token", seed=None) for r in rows if r.family == "ppo")]
    against = compare(other, "ppo", "token", clock="measured", budgets=BUDGETS[:1])
    assert against is not None
    assert against.overall.value == 0
    assert against.overall.low == pytest.approx(-1.96 * 0.03 * math.sqrt(2), abs=0.01)


def test_few_seeds_are_not_called_significant() -> None:
    for seeds in (1, 2, 4):
        rows = evaluation(factor=0.5, seeds=seeds)
        words = " ".join([compared(rows).sentence(), compared(rows).setting_sentence(), *method_sentences(rows)])
        assert "significant" not in words
        assert "excludes zero" in words
    assert ", significant)" in compared(evaluation(factor=0.5, seeds=5)).sentence()
    rows = [r for r in evaluation() if r.family == "static"]
    for seed, factor in enumerate((0.7, 0.9, 1.0, 1.1, 1.4)):
        rows += [row("ppo", b, factor * static_kl(b), policy="ppo", seed=seed) for b in BUDGETS]
    assert ", not significant)" in compared(rows).sentence()


def test_from_five_seeds_on_they_are_drawn_as_well_as_documents() -> None:
    """Seeds that differ widen the interval; seeds that agree leave it that of other documents."""
    rows = [r for r in evaluation() if r.family == "static"]
    factors = (0.7, 0.8, 0.9, 1.0, 1.1)
    for seed, factor in enumerate(factors):
        rows += [row("ppo", b, factor * static_kl(b), policy="ppo", seed=seed) for b in BUDGETS]
    overall = compared(rows).overall
    logs = np.log(factors)
    assert overall.value == pytest.approx(logs.mean())
    wanted = percentile_interval(seed_weights(5)[1:] @ logs)
    assert [overall.low, overall.high] == pytest.approx(list(wanted))
    assert "draw the 5 training seeds too" in " ".join(method_sentences(rows))
    agreeing = evaluation(noise=0.1, seeds=1)
    clones = [replace(r, seed=seed) for r in agreeing if r.family == "ppo" for seed in range(5)]
    one, five = (
        compared(found).overall for found in (agreeing, [*clones, *(r for r in agreeing if r.family == "static")])
    )
    assert one.low is not None
    assert [five.low, five.high] == pytest.approx([one.low, one.high])
    assert one.high != one.low


def test_the_mean_of_few_seeds_is_as_uncertain_as_they_let_one_expect() -> None:
    """The variance of resampled means is that of a mean: the variance of the seeds (n - 1) over their number."""
    values = np.random.default_rng(3).normal(0, 1, 5)
    means = seed_weights(5, num_resamples=200_000)[1:] @ values
    assert means.var() == pytest.approx(values.var(ddof=1) / 5, rel=0.02)


def test_equal_seeds_are_paired() -> None:
    rows = []
    for seed, level in enumerate((0.5, 1.0, 3.0)):
        for family, factor in (("ppo", 0.9), ("other", 1.0)):
            rows += [row(family, b, level * factor * static_kl(b), policy=family, seed=seed) for b in BUDGETS]
    result = compared(rows, "ppo", "other")
    assert [ratio for _, ratio in result.seed_log_ratios] == pytest.approx([math.log(0.9)] * 3)
    with pytest.raises(ValueError, match="no training seed in common"):
        compare([replace(r, seed=r.seed + 9 * (r.family == "ppo")) for r in rows], "ppo", "other")  # type: ignore[operator]


def test_only_budgets_of_all_seeds_are_compared() -> None:
    rows = [r for r in evaluation() if not (r.family == "ppo" and r.seed == 1 and r.time_budget == 0.5)]
    assert [budget for budget, _ in compared(rows).by_setting] == [0.6, 0.7, 0.8]
    chosen = compare(rows, "ppo", "static", budgets=(0.5, 0.7))
    assert chosen is not None
    assert [budget for budget, _ in chosen.by_setting] == [0.7]
    assert compare(rows, "ppo", "oracle") is None
    assert compare(rows, "ppo", "missing") is None
    assert list(ratios_to_static(rows, "ppo")) == [0.6, 0.7, 0.8]
    assert ratios_to_static(rows, "static") == {}


def test_one_document_has_no_interval() -> None:
    result = compared([replace(r, sequence_documents=(7,) * 24) for r in evaluation()])
    assert (result.overall.low, result.overall.excludes_zero) == (None, False)
    assert "one document gives no interval" in result.sentence()


@pytest.mark.parametrize(
    ("low", "high", "excludes"), [(1e-4, 3e-4, False), (1e-4, 2e-3, False), (6e-4, 2e-3, True), (-2e-3, -6e-4, True)]
)
def test_an_interval_that_begins_at_zero_as_printed_includes_it(low: float, high: float, excludes: bool) -> None:
    ratio = LogRatio(value=(low + high) / 2, low=low, high=high, num_seeds=0)
    assert ratio.excludes_zero == excludes
    assert f"{'ex' if excludes else 'in'}cludes zero" in ratio.words()


def test_rows_of_other_sequences_are_refused() -> None:
    rows = evaluation()
    changed = next(index for index, found in enumerate(rows) if found.family == "fixed")
    rows[changed] = replace(rows[changed], sequence_documents=rows[changed].sequence_documents[:-1])
    with pytest.raises(ValueError, match="same test sequences"):
        compare(rows, "ppo", "fixed")


def test_sequences_without_any_kl_stay_finite() -> None:
    rows = [replace(r, sequence_kl_nats=(0.0,) * 23 + (1.0,)) for r in evaluation(noise=0.0)]
    assert math.isfinite(compared(rows).overall.low or 0.0)


def test_documents_are_drawn_whole() -> None:
    documents = [3, 3, 3, 9, 5, 5]
    weights = document_weights(documents, num_resamples=50)
    assert weights.shape == (51, 6)
    assert weights.sum(1) == pytest.approx(np.ones(51))
    assert weights[0] == pytest.approx(np.full(6, 1 / 6))
    assert (weights[:, :3] == weights[:, :1]).all()
    assert (weights[:, 4] == weights[:, 5]).all()
    assert (weights[1:].min(1) == 0).any()


def test_paired_document_bootstrap_covers() -> None:
    """Two policies that differ by a noise of each document: the nominal 95% hold for documents, not for sequences."""
    generator = np.random.default_rng(0)
    covered = {"documents": 0, "sequences": 0}
    documents = np.repeat(np.arange(30), 4)
    for _ in range(200):
        level = np.repeat(generator.lognormal(0, 1, 30), 4)
        change = np.repeat(generator.normal(0, 0.3, 30), 4)  # the true mean of the difference is 0
        difference = level * 0 + change + generator.normal(0, 0.05, 120)
        for unit, owners in (("documents", documents), ("sequences", np.arange(120))):
            weights = document_weights(owners.tolist(), num_resamples=300)
            low, high = percentile_interval(weights[1:] @ (level + difference) - weights[1:] @ level)
            covered[unit] += low <= 0 <= high
    assert 0.88 <= covered["documents"] / 200 <= 0.99
    assert covered["sequences"] / 200 < 0.85
