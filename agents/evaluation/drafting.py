"""Judging policies of drafts on recorded sequences: time by a cost table, what a bound reaches, tuned settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flexquant_rl.agents.evaluation.resampling import document_weights, percentile_interval
from flexquant_rl.engine.control.draft_limits import DOUBTED_NGRAM_DRAFTS
from flexquant_rl.engine.control.drafting_rules import DraftingContext, DraftingPolicy, DraftingRule, Plain
from flexquant_rl.engine.control.verified_signals import Sees, VerifiedSchema
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.fq_env.trace_rounds import TraceRounds
from flexquant_rl.fq_env.trace_table import TraceTable

Floats = NDArray[np.float64]
_AT_ONCE = 24


@dataclass(frozen=True)
class Played:
    """What a policy needed for each of S sequences.

    Attributes:
        time_steps: `[S]` time in plain steps at the largest width.
        num_tokens: `[S]` tokens that became settled, one for every plain step.
        num_rounds: `[S]` passes of verification.
        num_drafted: `[S]` drafts.
        num_accepted: `[S]` drafts that were kept.
    """

    time_steps: Floats
    num_tokens: Floats
    num_rounds: Floats
    num_drafted: Floats
    num_accepted: Floats

    @property
    def speedup(self) -> float:
        """Tokens per second over those of plain decoding: total over total."""
        return float(self.num_tokens.sum() / self.time_steps.sum())


def play(table: TraceTable, costs: VerifyCosts, policy: DraftingPolicy, *, sees: Sees = "signals") -> Played:
    """Plays every sequence once from its beginning to its end, all in lockstep.

    Args:
        table: The sequences.
        costs: What steps cost.
        policy: Decides.
        sees: What it looks at, and pays for.
    """
    return play_all(table, costs, [policy], sees=sees)[0]


def play_all(
    table: TraceTable, costs: VerifyCosts, policies: Sequence[DraftingPolicy], *, sees: Sees = "signals"
) -> list[Played]:
    """`play` for several policies at once, which takes less time than one after the other.

    Args:
        table: The sequences.
        costs: What steps cost.
        policies: Each plays all sequences in rows of its own.
        sees: What they all look at, and pay for.
    """
    size = table.num_sequences

    def decide(rounds: TraceRounds) -> NDArray[np.int64]:
        seen = rounds.observations().reshape(len(policies), size, -1)
        return np.concatenate([policy(own) for policy, own in zip(policies, seen, strict=True)])

    return _played(table, costs.charging(sees), len(policies), decide)


def _played(
    table: TraceTable, costs: VerifyCosts, times: int, decide: Callable[[TraceRounds], NDArray[np.int64]]
) -> list[Played]:
    """What was needed for every sequence, so many times each; `decide` gives the actions of all rows."""
    rounds = TraceRounds(table, costs, table.num_sequences * times)
    rows = torch.arange(rounds.num_rows)
    rounds.start(rows, rows % table.num_sequences, torch.ones(len(rows)), torch.zeros_like(rows))
    sums = np.zeros((5, len(rows)))
    running = np.ones(len(rows), dtype=np.bool_)
    while running.any():
        facts = rounds.step(torch.from_numpy(decide(rounds)))
        columns = (
            facts.latency_ms / costs.full_ms,
            facts.num_emitted,
            facts.is_verify,
            facts.num_drafted,
            facts.num_accepted,
        )
        sums += np.stack([column.numpy() for column in columns]) * running
        running &= ~(facts.terminated | facts.truncated).numpy()
    return [Played(*own) for own in sums.reshape(5, times, table.num_sequences).transpose(1, 0, 2)]


def context_of(table: TraceTable, costs: VerifyCosts) -> DraftingContext:
    """What rules may know: measured on training sequences, where a policy is asked."""
    schema = VerifiedSchema(table.num_levels, table.depth, table.embedding.shape[1])
    return DraftingContext(schema, costs, acceptance(table, where_asked=True).mean_by_level())


def tuned(rules: Iterable[DraftingRule], table: TraceTable, context: DraftingContext) -> DraftingRule:
    """The setting of one family that is fastest on some sequences; the first of equals."""
    every = list(rules)
    speeds: list[float] = []
    for begin in range(0, len(every), _AT_ONCE):
        some = every[begin : begin + _AT_ONCE]
        policies = [rule.bind(context) for rule in some]
        costs = _costs_of(some[0], context)
        speeds += [played.speedup for played in play_all(table, costs, policies, sees=some[0].sees)]
    return every[int(np.argmax(speeds))]


def play_rule(table: TraceTable, context: DraftingContext, rule: DraftingRule) -> Played:
    """`play` for a rule, which pays for what it looks at. One that never drafts has no rounds and looks nothing up."""
    table = table.without_lookups() if isinstance(rule, Plain) else table
    return play(table, _costs_of(rule, context), rule.bind(context), sees=rule.sees)


def _costs_of(rule: DraftingRule, context: DraftingContext) -> VerifyCosts:
    """What steps of a rule cost as it is served: one that never drafts takes plain steps, all others take rounds."""
    costs = context.known_costs()
    return costs.without_rounds() if isinstance(rule, Plain) else costs


def speedup_interval(played: Played, documents: NDArray[np.int64]) -> tuple[float, float]:
    """95% interval of the speedup by resampling documents."""
    weights = document_weights(documents.tolist())[1:]
    return percentile_interval((weights @ played.num_tokens) / (weights @ played.time_steps))


def clairvoyant(table: TraceTable, costs: VerifyCosts) -> Played:
    """The fastest that any policy could be that knew every draft before: dynamic programming from the end.

    It drafts each token at the cheapest level that is right, and no draft that is wrong, or verifies what is found in
    the text, as much of it as a doubted lookup finds or any other. Deciding costs nothing, and a token without
    drafts costs a plain step where that is cheaper than a round.
    """
    draft_ms, verify_ms = np.array(costs.draft_ms), np.array(costs.verify_ms)
    verify_ms[0] = min(verify_ms[0], costs.plain_ms)
    cheapest = np.where(table.is_right, draft_ms[None, :, None], np.inf).min(1)  # [F, D]
    sums = np.zeros((5, table.num_sequences))
    for index, (first, num_tokens) in enumerate(zip(table.first, table.num_tokens, strict=True)):
        # Of the rest of the sequence from each position: time, tokens, rounds, drafted, accepted.
        rest = np.zeros((num_tokens + 1, 5))
        for position in range(num_tokens - 1, -1, -1):
            room = min(table.depth, num_tokens - position)
            drafts = np.concatenate([[0.0], np.cumsum(cheapest[first + position, :room])])
            gained = np.minimum(np.arange(room + 1) + 1, num_tokens - position)
            times = drafts + verify_ms[: room + 1] + rest[position + gained, 0]
            best = int(times.argmin())
            drafted, accepted, next_place, passed = best, best, position + gained[best], times[best]
            for most in (table.num_found[first + position], DOUBTED_NGRAM_DRAFTS):
                found = min(most, table.num_found[first + position])
                right = min(table.num_found_right[first + position], found)
                behind = position + min(right + 1, num_tokens - position)
                if found and verify_ms[found] + rest[behind, 0] < passed:
                    drafted, accepted, next_place, passed = found, right, behind, verify_ms[found] + rest[behind, 0]
            own = np.array([passed - rest[next_place, 0], next_place - position, 1, drafted, accepted])
            rest[position] = own + rest[next_place]
        sums[:, index] = rest[0]
    sums[0] /= costs.full_ms
    return Played(*sums)


def hindsight(table: TraceTable, costs: VerifyCosts) -> Played:
    """Rounds that end behind the first wrong draft, as if each were known once it is drafted: a reference, no bound.

    They are drafted at one level, up to a length, which may be 0; both are those that are fastest on the very
    sequences. Knowing costs nothing. What foresees a wrong draft, or changes the level, may be faster.
    """
    settings = [(0, 0), *((level, most) for level in range(table.num_levels) for most in range(1, table.depth + 1))]
    levels, most = np.repeat(np.array(settings), table.num_sequences, axis=0).T

    def decide(rounds: TraceRounds) -> NDArray[np.int64]:
        return np.where(rounds.all_right() & (rounds.num_pending() < most), levels + 1, 0)

    return max(_played(table, costs.charging("nothing"), len(settings), decide), key=lambda played: played.speedup)


@dataclass(frozen=True)
class Acceptance:
    """How many drafts agree, from every position of some sequences.

    Attributes:
        reached: `[S, L, D]` rounds in which every draft before the i-th agreed and the i-th could be kept.
        kept: `[S, L, D]` those in which the i-th agreed too.
        lengths: `[F', L]` drafts that agree from each position with room for all D.
    """

    reached: NDArray[np.int64]
    kept: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def by_place(self) -> Floats:
        """`[L, D]` share of i-th drafts that agree, of those after which all before agreed."""
        share: Floats = self.kept.sum(0) / np.maximum(self.reached.sum(0), 1)
        return share

    def mean_by_level(self) -> Floats:
        """`[L]` the same over all places in the round."""
        share: Floats = self.kept.sum((0, 2)) / np.maximum(self.reached.sum((0, 2)), 1)
        return share

    def by_sequence(self) -> Floats:
        """`[S, L]` the same for each prompt."""
        share: Floats = self.kept.sum(2) / np.maximum(self.reached.sum(2), 1)
        return share


def acceptance(table: TraceTable, *, where_asked: bool = False) -> Acceptance:
    """Counts the drafts that agree, from every position, or from those alone where nothing is found in the text."""
    shape = (table.num_sequences, table.num_levels, table.depth)
    reached, kept = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    whole = list[NDArray[np.int64]]()
    places = np.arange(table.depth)
    for index, (first, num_tokens) in enumerate(zip(table.first, table.num_tokens, strict=True)):
        agreement = table.agreement[first : first + num_tokens]  # [N, L]
        room = np.minimum(table.depth, num_tokens - 1 - np.arange(num_tokens))
        is_reached = (agreement[..., None] >= places) & (places < room[:, None, None])
        if where_asked:
            is_reached &= (table.num_found[first : first + num_tokens] == 0)[:, None, None]
        reached[index] = is_reached.sum(0)
        kept[index] = (is_reached & (agreement[..., None] > places)).sum(0)
        whole.append(agreement[room == table.depth])
    return Acceptance(reached, kept, np.concatenate(whole))
