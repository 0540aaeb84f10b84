"""Policies of drafts on traces: times by hand, the bound by brute force, what rules do with what they see."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from toy_traces import random_traces, toy_costs, visible_traces

from flexquant_rl.agents.evaluation.draft_rows import draft_row
from flexquant_rl.agents.evaluation.drafting import (
    acceptance,
    clairvoyant,
    context_of,
    hindsight,
    play,
    play_all,
    play_rule,
    speedup_interval,
    tuned,
)
from flexquant_rl.engine.control.drafting_rules import (
    RULES,
    Bandit,
    BanditPolicy,
    ConfidenceStop,
    FixedRounds,
    Lookups,
    MovingAverage,
    Plain,
    ProductStop,
    rule_name,
)
from flexquant_rl.engine.control.traces import SequenceTrace
from flexquant_rl.engine.control.verified_signals import Sees
from flexquant_rl.engine.control.verify_costs import VerifyCosts, modelled_costs
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.trace_rounds import TraceRounds
from flexquant_rl.fq_env.trace_table import TraceTable

COSTS = toy_costs(3, 4)


def table_of(seed: int, ngram_drafts: int = 0, **options: float) -> TraceTable:
    traces = random_traces(np.random.default_rng(seed), **options)  # type: ignore[arg-type]
    return TraceTable(traces, range(len(traces.sequences)), ngram_drafts)


def test_plain_decoding_is_one() -> None:
    table = table_of(0)
    played = play(table, COSTS, Plain().bind(context_of(table, COSTS)), sees="nothing")
    assert played.speedup == 1
    assert played.num_rounds.tolist() == table.num_tokens.tolist() == played.num_tokens.tolist()
    assert not played.num_drafted.any()


def test_who_never_drafts_pays_plain_steps_and_who_might_have_pays_rounds() -> None:
    """As they are served: `make_controller` gives the rule `plain` no rounds, and a round has books of its own."""
    table = table_of(0, max_new_tokens=9)
    costs = modelled_costs((5.0, 5.0, 5.0), (1.13, 1.2), depth=4, plain_share=0.98)
    context = context_of(table, costs)
    plain = play_rule(table, context, Plain())
    np.testing.assert_allclose(plain.time_steps, 0.98 * table.num_tokens)
    silent = play(table, costs, lambda seen: np.zeros(len(seen), dtype=np.int64), sees="nothing")
    np.testing.assert_allclose(silent.time_steps, 1.13 * table.num_tokens)
    bound = clairvoyant(table, costs)  # drafts are too dear here
    np.testing.assert_allclose(bound.time_steps, plain.time_steps)
    # Tuning and the row of a table say the same.
    assert tuned(Plain.grid(context.schema), table, context) == Plain()
    row = draft_row(
        plain, table, policy="plain", family="plain", kind="plain", verify_width=8, cost_source=costs.source
    )
    assert row.speedup_modelled == pytest.approx(1 / 0.98)


def fixed_time(
    trace: SequenceTrace,
    costs: VerifyCosts,
    level: int,
    length: int,
    eos: int,
    depths: list[int],
    *,
    ends_behind_wrong: bool = False,
) -> float:
    """Slow: rounds of one length at one level over one sequence, or until a draft is wrong."""
    text, position, time = trace.token_ids.tolist(), 0, 0.0
    while position < trace.num_tokens:
        drafts = trace.draft_ids[position, level].tolist()[: min(length, depths[position])]
        if eos in drafts:
            drafts = drafts[: drafts.index(eos) + 1]
        rest = text[position + 1 :]
        kept = next((i for i, draft in enumerate(drafts) if i >= len(rest) or draft != rest[i]), len(drafts))
        if ends_behind_wrong:
            drafts = drafts[: kept + 1]
        time += len(drafts) * costs.draft_ms[level] + costs.verify_ms[len(drafts)]
        position += kept + 1
    return time


@pytest.mark.parametrize("seed", range(3))
def test_fixed_rounds_take_the_time_that_they_take(seed: int) -> None:
    traces = random_traces(np.random.default_rng(seed))
    table = TraceTable(traces, range(len(traces.sequences)))
    depths = [traces.plan.draft_depth(position) for position in range(traces.plan.max_new_tokens)]
    for level, length in itertools.product(range(3), range(1, 5)):
        played = play(table, COSTS, FixedRounds(level, length).bind(context_of(table, COSTS)))
        expected = [fixed_time(trace, COSTS, level, length, 0, depths) for trace in traces.sequences]
        np.testing.assert_allclose(played.time_steps, expected)


@pytest.mark.parametrize("seed", range(3))
def test_hindsight_ends_a_round_behind_a_wrong_draft(seed: int) -> None:
    traces = random_traces(np.random.default_rng(seed), accepted=0.9)
    table = TraceTable(traces, range(len(traces.sequences)))
    depths = [traces.plan.draft_depth(position) for position in range(traces.plan.max_new_tokens)]
    times = [
        [fixed_time(trace, COSTS, level, most, 0, depths, ends_behind_wrong=True) for trace in traces.sequences]
        for level, most in itertools.product(range(3), range(1, 5))
    ]
    played = hindsight(table, replace(COSTS, controller_ms=0.5))  # knowing costs nothing
    np.testing.assert_allclose(played.time_steps, min(times, key=sum))
    assert played.time_steps.sum() >= clairvoyant(table, COSTS).time_steps.sum()
    dear = replace(COSTS, draft_ms=tuple(100 * ms for ms in COSTS.draft_ms))  # what never drafts is among the settings
    lookups_alone = play(table, dear, FixedRounds(0, 0).bind(context_of(table, dear)))
    np.testing.assert_allclose(hindsight(table, dear).time_steps, lookups_alone.time_steps)


def fastest(table: TraceTable, costs: VerifyCosts, place: int, left: int) -> float:
    """Slow: the least time of a rest of a sequence, over all rounds without a wrong draft."""
    if left == 0:
        return 0.0
    options, drafting = list[float](), 0.0
    for length in range(min(table.depth, left - 1) + 1):
        if length:
            right = [costs.draft_ms[level] for level in range(3) if table.is_right[place, level, length - 1]]
            if not right:
                break
            drafting += min(right)
        rest = fastest(table, costs, place + length + 1, left - length - 1)
        options.append(drafting + costs.verify_ms[length] + rest)
    for found in {int(table.num_found[place]), min(int(table.num_found[place]), 2)} - {0}:
        gained = min(int(table.num_found_right[place]), found, left - 1) + 1
        options.append(costs.verify_ms[found] + fastest(table, costs, place + gained, left - gained))
    return min(options)


@pytest.mark.parametrize(("seed", "ngram_drafts"), [(0, 0), (1, 0), (2, 0), (1, 2), (2, 4)])
def test_the_bound_is_the_fastest_there_is(seed: int, ngram_drafts: int) -> None:
    table = table_of(seed, ngram_drafts, max_new_tokens=9)
    played = clairvoyant(table, COSTS)
    ends = zip(table.first.tolist(), table.num_tokens.tolist(), strict=True)
    expected = [fastest(table, COSTS, first, num_tokens) for first, num_tokens in ends]
    np.testing.assert_allclose(played.time_steps, expected)
    assert played.num_tokens.tolist() == table.num_tokens.tolist()
    assert ((played.num_rounds + played.num_accepted) >= table.num_tokens).all()  # a text may end within a round
    if not ngram_drafts:
        assert (played.num_rounds + played.num_accepted).tolist() == table.num_tokens.tolist()


def test_rounds_that_find_their_drafts_are_played_by_all_but_plain_decoding() -> None:
    """Found rounds cost their pass and no decision; what is not found is decided, or a plain round."""
    table = table_of(2, 3, max_new_tokens=15)
    costs = replace(COSTS, controller_ms=0.25)
    assert table.num_found.any()
    assert table.num_found_right.any()
    expected, rounds, drafted, doubts = [], 0, 0, 0
    for first, num_tokens in zip(table.first.tolist(), table.num_tokens.tolist(), strict=True):
        time, place, most = 0.0, first, 3
        while place < first + num_tokens:
            found = min(int(table.num_found[place]), most)
            right = min(int(table.num_found_right[place]), found)
            time += costs.verify_ms[found] + (0 if found else costs.controller_ms)
            place, rounds, drafted = place + right + 1, rounds + 1, drafted + found
            if found:
                most = 3 if 2 * right >= found else 2
                doubts += most == 2
        expected.append(time)
    silent = play(table, costs, lambda seen: np.zeros(len(seen), dtype=np.int64))
    np.testing.assert_allclose(silent.time_steps, expected)
    assert (silent.num_rounds.sum(), silent.num_drafted.sum()) == (rounds, drafted)
    assert doubts
    alone = play_rule(table, context_of(table, costs), Lookups())
    np.testing.assert_array_equal(alone.num_rounds, silent.num_rounds)
    assert (alone.time_steps <= silent.time_steps).all(), "nobody decides there"
    plain = play_rule(table, context_of(table, costs), Plain())
    assert not plain.num_drafted.any()
    assert plain.num_rounds.tolist() == table.num_tokens.tolist()


@pytest.mark.parametrize("family", RULES, ids=lambda family: family.family)
def test_every_family_plays_and_none_beats_the_bound(family: type) -> None:
    table = table_of(4)
    context = context_of(table, COSTS)
    bound = clairvoyant(table, COSTS)
    rules = list(family.grid(context.schema))  # type: ignore[attr-defined]
    assert len({rule_name(rule) for rule in rules}) == len(rules)
    for rule in rules[:: max(1, len(rules) // 12)]:
        played = play(table, COSTS, rule.bind(context))
        assert (played.time_steps >= bound.time_steps - 1e-9).all()
        assert played.num_tokens.tolist() == table.num_tokens.tolist()


def test_tuning_takes_the_fastest_setting() -> None:
    table = table_of(2, accepted=0.9)
    context = context_of(table, COSTS)
    best = tuned(FixedRounds.grid(context.schema), table, context)
    speeds = {rule: play(table, COSTS, rule.bind(context)).speedup for rule in FixedRounds.grid(context.schema)}
    assert speeds[best] == max(speeds.values()) > min(speeds.values())  # type: ignore[index]


def test_who_looks_pays() -> None:
    table, costs = table_of(1), replace(COSTS, controller_ms=0.05, confidence_ms=0.02)
    policy = ProductStop(0, 0.5).bind(context_of(table, costs))
    free, less, all_of_it = (play(table, costs, policy, sees=sees) for sees in get_args(Sees))
    for paid, price in ((less, 0.02), (all_of_it, 0.05)):
        np.testing.assert_allclose(paid.time_steps - free.time_steps, price * (free.num_rounds + free.num_drafted))
    by_rule = play_rule(table, context_of(table, costs), ProductStop(0, 0.5))
    np.testing.assert_array_equal(by_rule.time_steps, less.time_steps)


def test_rules_stop_where_they_say() -> None:
    table = table_of(3, accepted=0.95)
    context = context_of(table, COSTS)
    schema = context.schema
    observations = np.zeros((4, schema.dim), dtype=np.float32)
    observations[:, schema.index("pending")] = np.array([0, 1, 2, 3]) / 4
    observations[:, schema.index("confidence_0") : schema.index("confidence_0") + 3] = (0.9, 0.3, 0.5)
    observations[:, schema.index("confidence_product")] = (1, 0.9, 0.27, 0.135)
    assert ConfidenceStop(1, 0.4, 3).bind(context)(observations).tolist() == [2, 2, 0, 0]
    assert ProductStop(2, 0.2).bind(context)(observations).tolist() == [3, 3, 3, 0]
    assert FixedRounds(0, 2).bind(context)(observations).tolist() == [1, 1, 0, 0]
    observations[:, schema.index("last_drafted")] = 2 / 4
    for average, expected in ((0.1, [1, 0, 0, 0]), (0.5, [1, 1, 0, 0]), (0.9, [1, 1, 1, 1])):
        observations[:, schema.index("acceptance_fast")] = average
        assert MovingAverage(0, 0.3, 0.7).bind(context)(observations).tolist() == expected


def test_a_bandit_finds_the_best_arm() -> None:
    traces = visible_traces(np.random.default_rng(0), num_sequences=60)
    table = TraceTable(traces, range(60))
    costs = modelled_costs((0.9, 0.01), (1.0, 1.01), depth=3)  # only the second level is worth drafting with
    context = context_of(table, costs)
    policy = Bandit(0.02).bind(context)
    for _ in range(4):
        played = play(table, costs, policy)
    best = max(play(table, costs, rule.bind(context)).speedup for rule in FixedRounds.grid(context.schema))
    assert played.speedup > 0.8 * best > 1.2  # its first rounds try every arm


def test_acceptance_counts_every_position() -> None:
    traces = random_traces(np.random.default_rng(8))
    table = TraceTable(traces, range(len(traces.sequences)))
    counted = acceptance(table)
    reached, kept = np.zeros((2, 3, 4))
    for trace in traces.sequences:
        text = trace.token_ids.tolist()
        for position, level in itertools.product(range(trace.num_tokens), range(3)):
            for place in range(min(4, trace.num_tokens - 1 - position)):
                drafted = trace.draft_ids[position, level, : place + 1].tolist()
                reached[level, place] += drafted[:place] == text[position + 1 : position + 1 + place]
                kept[level, place] += drafted == text[position + 1 : position + 2 + place]
    np.testing.assert_array_equal(counted.reached.sum(0), reached)
    np.testing.assert_array_equal(counted.kept.sum(0), kept)
    np.testing.assert_allclose(counted.mean_by_level(), kept.sum(1) / reached.sum(1))


def test_rules_weigh_the_acceptance_of_places_where_they_are_asked() -> None:
    table = table_of(2, 3, accepted=0.6)
    agreement = table.agreement.copy()
    table.agreement[table.num_found > 0] = 0  # wherever something is found, every draft is wrong
    asked = acceptance(table, where_asked=True)
    np.testing.assert_allclose(context_of(table, COSTS).acceptance, asked.mean_by_level())
    assert (asked.mean_by_level() > acceptance(table).mean_by_level()).all()
    table.agreement[table.num_found > 0] = agreement[table.num_found > 0]
    np.testing.assert_array_equal(acceptance(table, where_asked=True).kept, asked.kept)


def test_intervals_hold_the_value() -> None:
    table = table_of(6, num_sequences=20)
    context = context_of(table, COSTS)
    for level in (0, 2):
        played = play(table, COSTS, FixedRounds(level, 2).bind(context))
        low, high = speedup_interval(played, table.documents)
        assert low < played.speedup < high


def test_costs_are_checked_and_go_on_in_a_line() -> None:
    costs = modelled_costs((0.4,), (1.0, 1.2, 1.3), depth=5)
    assert costs.verify_ms == pytest.approx((1.0, 1.2, 1.3, 1.4, 1.5, 1.6))
    with pytest.raises(InputError, match="give those of M = 1 and 2"):
        modelled_costs((0.4,), (1.0,), depth=3)
    for shares in ((-0.4,), (float("nan"),), ()):
        with pytest.raises(InputError, match="a finite time above 0"):
            modelled_costs(shares, (1.0, 1.1), depth=3)
    with pytest.raises(InputError, match="must not be negative"):
        modelled_costs((0.4,), (1.0, 1.1), depth=3, controller_share=-1)


@pytest.mark.parametrize("family", RULES, ids=lambda family: family.family)
def test_policies_that_play_at_once_do_as_each_alone(family: type) -> None:
    table = table_of(5)
    context = context_of(table, COSTS)
    rules = list(family.grid(context.schema))[::9]  # type: ignore[attr-defined]
    together = play_all(table, COSTS, [rule.bind(context) for rule in rules], sees=rules[0].sees)
    for rule, played in zip(rules, together, strict=True):
        alone = play(table, COSTS, rule.bind(context), sees=rule.sees)
        for name, values in vars(alone).items():
            np.testing.assert_array_equal(getattr(played, name), values)


def test_a_bandit_learns_of_rounds_alone() -> None:
    """Behind the end of a text, and where nothing fits any longer, no round takes place."""
    table = TraceTable(random_traces(np.random.default_rng(3)), range(6))
    costs = toy_costs(3, 4)
    rounds = TraceRounds(table, costs, 6)
    rows = torch.arange(6)
    rounds.start(rows, rows, torch.ones(6), torch.zeros(6, dtype=torch.int64))
    bandit = Bandit(0.1).bind(context_of(table, costs))
    assert isinstance(bandit, BanditPolicy)
    for _ in range(80):
        rounds.step(torch.from_numpy(bandit(rounds.observations())))
    arms = bandit._arms
    assert not rounds.can_draft().any()
    # A round that ends with an end-of-sequence token gains none behind it, and is booked with one.
    assert arms._tokens.sum() <= table.num_tokens.sum() + table.has_eos.sum(), "rounds that did not take place"
    before = arms._count.copy()
    bandit(rounds.observations())
    bandit(rounds.observations())
    np.testing.assert_array_equal(arms._count, before)
