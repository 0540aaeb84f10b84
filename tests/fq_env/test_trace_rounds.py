"""Rounds played from traces, against a slow walk through the recorded sequences themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_traces import EOS, random_traces, toy_costs

from flexquant_rl.engine.control.traces import SequenceTrace, Traces
from flexquant_rl.engine.control.verify_costs import modelled_costs
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.trace_rounds import TraceRounds
from flexquant_rl.fq_env.trace_table import TraceTable


def rounds_of(traces: Traces, num_rows: int) -> TraceRounds:
    table = TraceTable(traces, range(len(traces.sequences)))
    return TraceRounds(table, toy_costs(table.num_levels, table.depth), num_rows)


def start(rounds: TraceRounds, sequences: list[int]) -> None:
    rows = torch.arange(len(sequences))
    rounds.start(rows, torch.tensor(sequences), torch.ones(len(rows)), torch.zeros_like(rows))


@pytest.mark.parametrize("seed", range(4))
def test_a_round_of_one_level_is_the_recorded_chain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    traces = random_traces(rng)
    rounds = rounds_of(traces, 1)
    plan, costs = traces.plan, rounds.costs
    for index, trace in enumerate(traces.sequences):
        start(rounds, [index])
        position, is_over = 0, False
        while not is_over:
            level, length = int(rng.integers(3)), int(rng.integers(plan.depth + 1))
            chain = trace.draft_ids[position, level].tolist()
            for place in range(length):
                is_possible = place < plan.draft_depth(position) and (place == 0 or chain[place - 1] != EOS)
                assert rounds.can_draft().tolist() == [is_possible]
                if not is_possible:
                    length = place
                    break
                facts = rounds.step(torch.tensor([level + 1]))
                assert facts.latency_ms.item() == costs.draft_ms[level]
                assert (facts.num_emitted.item(), facts.level.item()) == (0, level)
                np.testing.assert_array_equal(rounds._newest[0], trace.draft_signals[position, level, place].numpy())
            facts = rounds.step(torch.tensor([0]))
            text = trace.token_ids[position + 1 :].tolist()
            accepted = next((i for i in range(length) if i >= len(text) or chain[i] != text[i]), length)
            emitted = min(accepted + 1, trace.num_tokens - position)
            assert facts.latency_ms.item() == costs.verify_ms[length]
            assert (facts.num_drafted.item(), facts.num_accepted.item()) == (length, accepted)
            assert facts.num_emitted.item() == emitted
            position += emitted
            is_over = bool(facts.terminated | facts.truncated)
            assert is_over == (position == trace.num_tokens)
        assert bool(facts.terminated) == (trace.token_ids[-1].item() == EOS)


def stands_for(trace: SequenceTrace, position: int, level: int, pending: int) -> int:
    """Slow: places on, the first chain of a level that drafted the `pending` tokens of the text before it."""
    text = trace.token_ids[position + 1 : position + 1 + pending].tolist()
    for offset in range(pending):
        if trace.draft_ids[position + offset, level, : pending - offset].tolist() == text[offset:]:
            return offset
    return pending


def found_in(text: list[int], most: int) -> list[int]:
    """Slow: what followed the last four, three or two tokens where they stood before, the last time that they did."""
    for size in (4, 3, 2):
        for begin in range(len(text) - size - 1, -1, -1):
            if text[begin : begin + size] == text[-size:]:
                return text[begin + size :][:most]
    return []


@pytest.mark.parametrize(("seed", "ngram_drafts"), [(0, 1), (1, 3), (2, 9)])
def test_what_a_round_finds_is_what_stood_there_before(seed: int, ngram_drafts: int) -> None:
    traces = random_traces(np.random.default_rng(seed))
    plan = traces.plan
    table = TraceTable(traces, range(len(traces.sequences)), ngram_drafts)
    assert table.ngram_drafts == min(ngram_drafts, plan.depth)
    for planned, trace, first in zip(plan.sequences, traces.sequences, table.first.tolist(), strict=True):
        text = trace.token_ids.tolist()
        for position in range(trace.num_tokens):
            most = min(ngram_drafts, plan.draft_depth(position))
            found = found_in([*planned.prompt_ids, *text[: position + 1]], most)
            found = found[: found.index(EOS) + 1] if EOS in found else found
            rest = text[position + 1 :]
            right = next((i for i, token in enumerate(found) if i >= len(rest) or token != rest[i]), len(found))
            place = first + position
            assert (table.num_found[place], table.num_found_right[place]) == (len(found), right)
        assert table.num_found[first + trace.num_tokens] == 0
    assert table.num_found.max() == table.ngram_drafts
    without = table.without_lookups()
    assert without.ngram_drafts == without.num_found.max() == 0
    assert table.num_found.any(), "a copy"
    for wrong in (-1, 16):
        with pytest.raises(InputError, match=f"ngram_drafts={wrong} must be 0 to 15"):
            TraceTable(traces, [0], wrong)


def test_rounds_that_are_found_leave_no_trace_in_what_a_policy_sees() -> None:
    """Nobody drafts in them, and the history is that of rounds that a policy decided. What they settle is looked at."""
    traces = random_traces(np.random.default_rng(1))
    table = TraceTable(traces, range(len(traces.sequences)), 3)
    costs = replace(toy_costs(table.num_levels, table.depth), controller_ms=0.1, settled_ms=0.01)
    rounds = TraceRounds(table, costs, table.num_sequences)
    start(rounds, list(range(table.num_sequences)))
    seen = 0
    for _ in range(40):
        is_found, before = rounds._is_found.copy(), (rounds._acceptance.copy(), rounds._last_round.copy())
        assert not rounds.action_masks()[is_found, 1:].any()
        facts = rounds.step(torch.ones(table.num_sequences, dtype=torch.int64))
        assert facts.is_verify.numpy()[is_found].all()
        verify_ms = np.array(costs.verify_ms)[facts.num_drafted.numpy()] + 0.01 * facts.num_emitted.numpy()
        np.testing.assert_allclose(facts.latency_ms.numpy()[is_found], verify_ms[is_found])
        for kept, now in zip(before, (rounds._acceptance, rounds._last_round), strict=True):
            np.testing.assert_array_equal(kept[is_found], now[is_found])
        seen += int(is_found.sum())
        over = (facts.terminated | facts.truncated).nonzero()[:, 0]
        if len(over):
            rounds.start(over, over, torch.ones(len(over)), torch.zeros_like(over))
    assert seen > 5


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_round_takes_the_earliest_chain_that_fits(seed: int) -> None:
    traces = random_traces(np.random.default_rng(seed), accepted=0.85)
    table = TraceTable(traces, range(len(traces.sequences)))
    compared = 0
    for index, trace in enumerate(traces.sequences):
        for position in range(trace.num_tokens):
            for level in range(3):
                for pending in range(min(traces.plan.draft_depth(position), trace.num_tokens - position)):
                    place = table.first[index] + position
                    offset = stands_for(trace, position, level, pending)
                    assert table.chain_offset[place, level, pending] == offset
                    drafted = trace.draft_ids[position + offset, level, pending - offset].item()
                    is_right = drafted == trace.token_ids[position + 1 + pending].item()
                    assert table.is_right[place, level, pending] == is_right
                    compared += offset not in (0, pending)
    assert compared > 20, "no case between the two ends"


def test_after_a_wrong_draft_its_chain_goes_on() -> None:
    traces = random_traces(np.random.default_rng(5), accepted=0.5)
    rounds = rounds_of(traces, 1)
    seen = 0
    for index, trace in enumerate(traces.sequences):
        ids = trace.draft_ids[0].tolist()
        if trace.draft_ids[0, 0, 0] == trace.token_ids[1] or EOS in ids[0][:2] or traces.plan.draft_depth(0) < 3:
            continue
        start(rounds, [index])
        rounds.step(torch.tensor([1]))
        for place, level in ((1, 2), (2, 1)):  # other levels, but what they would read was never recorded
            rounds.step(torch.tensor([level + 1]))
            np.testing.assert_array_equal(rounds._newest[0], trace.draft_signals[0, 0, place].numpy())
        facts = rounds.step(torch.tensor([0]))
        assert (facts.num_accepted.item(), facts.num_emitted.item()) == (0, 1)
        seen += 1
    assert seen


@pytest.mark.parametrize("seed", range(3))
def test_rows_do_not_depend_on_each_other_and_everything_adds_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    traces = random_traces(rng)
    sequences = rng.integers(len(traces.sequences), size=7).tolist()
    together, alone = rounds_of(traces, 7), [rounds_of(traces, 1) for _ in range(7)]
    start(together, sequences)
    for rounds, sequence in zip(alone, sequences, strict=True):
        start(rounds, [sequence])
    emitted = np.zeros(7)
    running = np.ones(7, dtype=bool)
    for _ in range(200):
        observed = together.observations()
        assert np.isfinite(observed).all()
        np.testing.assert_array_equal(observed, np.concatenate([rounds.observations() for rounds in alone]))
        actions = rng.integers(4, size=7)
        facts = together.step(torch.from_numpy(actions))
        singles = [rounds.step(torch.tensor([action])) for rounds, action in zip(alone, actions, strict=True)]
        assert facts.latency_ms.tolist() == [single.latency_ms.item() for single in singles]
        emitted += facts.num_emitted.numpy() * running
        running &= ~(facts.terminated | facts.truncated).numpy()
    assert not running.any()
    assert emitted.tolist() == [traces.sequences[sequence].num_tokens for sequence in sequences]


def test_history_of_the_round() -> None:
    traces = random_traces(np.random.default_rng(1), accepted=1.0)
    rounds = rounds_of(traces, 1)
    longest = max(range(len(traces.sequences)), key=lambda index: traces.sequences[index].num_tokens)
    start(rounds, [longest])
    schema, trace = rounds.schema, traces.sequences[longest]

    def seen(name: str) -> float:
        return float(schema.column(rounds.observations(), name)[0])

    assert (seen("pending"), seen("confidence_product"), seen("lowest_confidence")) == (0, 1, 1)
    assert seen("acceptance_fast") == pytest.approx(0.8)
    rounds.step(torch.tensor([2]))
    rounds.step(torch.tensor([2]))
    confidences = trace.draft_signals[0, 1, :2, 1].tolist()
    assert seen("pending") == 2 / traces.plan.depth
    assert [seen("confidence_0"), seen("confidence_1"), seen("confidence_2")] == pytest.approx([*confidences, 0])
    assert seen("confidence_product") == pytest.approx(confidences[0] * confidences[1])
    assert seen("lowest_confidence") == pytest.approx(min(confidences))
    assert [seen(f"drafted_by_{level}") for level in range(3)] == [0, 1, 0]
    assert seen("position") == pytest.approx(np.log1p(2) / 4)
    rounds.step(torch.tensor([0]))
    assert (seen("pending"), seen("last_drafted"), seen("last_accepted")) == (0, 0.5, 0.5)
    assert seen("acceptance_fast") == pytest.approx(0.7 * 0.8 + 0.3)
    assert seen("acceptance_slow") == pytest.approx(0.95 * 0.8 + 0.05)


def test_costs_must_fit_the_traces() -> None:
    table = TraceTable(random_traces(np.random.default_rng(0)), [0])
    with pytest.raises(InputError, match="3 levels and rounds of up to 5 tokens"):
        TraceRounds(table, toy_costs(2, 4), 1)
    with pytest.raises(InputError, match="rounds of up to 5 tokens"):
        TraceRounds(table, modelled_costs((0.3, 0.4, 0.5), (1.0, 1.1), depth=2), 1)
    with pytest.raises(InputError, match="no sequence of this split"):
        TraceTable(random_traces(np.random.default_rng(0)), [])
