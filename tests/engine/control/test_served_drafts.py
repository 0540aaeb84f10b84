"""Policies of drafts see and do while they serve what they see and do on a recording of the same text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexquant_rl.agents.evaluation.drafting import context_of
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.controller import StaticController, make_controller
from flexquant_rl.engine.control.deployed_drafts import DraftsFacts, deploy_rule
from flexquant_rl.engine.control.drafting_net import DraftingNet, normalisation
from flexquant_rl.engine.control.drafting_rules import RULES, Actions, Bandit, DraftingPolicy, Plain
from flexquant_rl.engine.control.drafts import Draft, RoundState
from flexquant_rl.engine.control.policy import PolicyCard
from flexquant_rl.engine.control.profile import unmeasured_profile
from flexquant_rl.engine.control.recording import record_sequence
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.served_drafts import ServedDrafts, drafts_at
from flexquant_rl.engine.control.signals import SignalSchema, project_embedding
from flexquant_rl.engine.control.traces import PlannedSequence, RecordingPlan, Traces, occurring_tokens
from flexquant_rl.engine.control.verified_signals import Observations, RoundHistory, Sees, VerifiedSchema
from flexquant_rl.engine.control.verify_costs import modelled_costs
from flexquant_rl.engine.decoding.choice import default_decoder, session_opener
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.trace_rounds import TraceRounds
from flexquant_rl.fq_env.trace_table import TraceTable

pytestmark = pytest.mark.usefixtures("endless")

WIDTHS, DEPTH, TOKENS = (3, 5), 4, 24
COSTS = modelled_costs((0.4, 0.6), (1.0, 1.1), depth=DEPTH)
PROMPT = torch.tensor([1, *map(ord, "abc abe abc")])


@pytest.fixture(scope="module")
def nested(tiny_model_dir: Path) -> NestedCausalLM:
    return load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))


@dataclass
class Kept:
    """A function of observations that keeps what it was asked and what it said."""

    decide: DraftingPolicy
    asked: list[Observations] = field(default_factory=list)
    said: list[int] = field(default_factory=list)

    def __call__(self, observations: Observations) -> Actions:
        actions = self.decide(observations)
        self.asked.append(observations[0])
        self.said.append(int(actions[0]))
        return actions


def recorded(model: NestedCausalLM, decoder: Any, ngram_drafts: int = 0) -> TraceTable:
    planned = PlannedSequence(tuple(PROMPT.tolist()), "test", 0, "x")
    plan = RecordingPlan(model.fingerprint, decoder, 8, WIDTHS, DEPTH, TOKENS, (), (planned,))
    trace = record_sequence(plan, session_opener(model, max_length=64, decoder=decoder)(1), planned.prompt_ids)
    assert trace is not None
    ids = occurring_tokens((trace,))
    embedding = project_embedding(model.embedding_matrix(), SignalSchema(1, (8,)).num_embedding_dims)[ids]
    return TraceTable(Traces(plan, (trace,), ids, embedding), [0], ngram_drafts)


def played(table: TraceTable, policy: DraftingPolicy) -> Kept:
    """What a policy sees and says where it may draft, over the recording."""
    kept, rounds, rows = Kept(policy), TraceRounds(table, COSTS, 1), torch.tensor([0])
    rounds.start(rows, rows, torch.ones(1), rows)
    while True:
        action = kept(rounds.observations()) if rounds.can_draft()[0] else np.zeros(1, dtype=np.int64)
        facts = rounds.step(torch.from_numpy(action))
        if bool(facts.truncated):
            return kept


def served(model: NestedCausalLM, decoder: Any, policy: ServedDrafts, ngram_drafts: int = 0) -> list[GeneratedToken]:
    session = session_opener(model, max_length=64, decoder=decoder)(1)
    runner = PolicyRunner(session, make_controller(model, policy, unmeasured_profile(model)), ngram_drafts=ngram_drafts)
    return list(runner.generate([Request(PROMPT, TOKENS + 1)]))


def policies(table: TraceTable) -> list[tuple[str, Sees, DraftingPolicy, DraftingPolicy]]:
    """Every rule at a setting from the middle of its grid, and random networks; twice, as a bandit learns."""
    context = context_of(table, COSTS)
    found: list[tuple[str, Sees, DraftingPolicy, DraftingPolicy]] = []
    for kind in RULES:
        grid = list(kind.grid(context.schema))
        rule = grid[len(grid) // 3]
        found.append((kind.family, kind.sees, rule.bind(context), rule.bind(context)))
    looks: tuple[Sees, ...] = ("signals", "confidences")
    for sees in looks:
        net = DraftingNet(context.schema)
        net.std.copy_(normalisation(context.schema, torch.zeros(2, context.schema.dim), sees=sees)[1])
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(3)
            net.action_head.bias[0] -= 0.5
            net.action_head.bias[2:] -= 1e3  # at one level, so that the recording shows every round as it is
        assert net.sees == sees
        twice = net.policy()  # weights are random: the same ones wherever this net is asked for by its name
        found.append((f"net:{sees}", net.sees, twice, twice))
    return found


@pytest.mark.parametrize(("decoder", "ngram_drafts"), [("lean", 0), ("hf", 0), ("lean", 2), ("hf", 9)])
def test_serving_sees_and_does_what_the_recording_did(nested: NestedCausalLM, decoder: Any, ngram_drafts: int) -> None:
    if decoder == "lean" and default_decoder(nested)[0] != "lean":
        pytest.skip("the native kernels could not be built")
    table = recorded(nested, decoder, ngram_drafts)
    assert bool(table.num_found.any()) == bool(ngram_drafts), "the text repeats itself"
    schema = context_of(table, COSTS).schema
    levels = torch.tensor(WIDTHS)[:, None].expand(-1, nested.num_units).contiguous()
    drafted = 0
    for name, sees, on_recording, in_service in policies(table):
        expected, kept = played(table, on_recording), Kept(in_service)
        # All is computed, also for those that look at less: what they see is compared too.
        policy = ServedDrafts(name, schema, levels, torch.full((nested.num_units,), 8), kept, "signals")
        tokens = served(nested, decoder, policy, table.ngram_drafts)
        assert [token.token_id for token in tokens] == table.token_ids.tolist(), name
        is_mixed = len({action for action in expected.said if action}) > 1
        if is_mixed:  # the recording has no drafts of a round that mixes levels: what it shows of them is approximate
            assert name in ("profile-guided", "bandit")
            count = first_mixed(expected.said)
        else:
            count = len(expected.said)
            assert len(kept.said) == count, name
        assert count > (1 if ngram_drafts else 3), name
        np.testing.assert_allclose(np.stack(kept.asked[:count]), np.stack(expected.asked[:count]), rtol=0, atol=2e-4)
        assert kept.said[:count] == expected.said[:count], name
        drafted += sum(action > 0 for action in expected.said[:count])
        if sees != "signals":
            fresh = in_service if name.startswith("net") else next(one[3] for one in policies(table) if one[0] == name)
            less = Kept(fresh)
            own = ServedDrafts(name, schema, levels, policy.verify_bit_widths, less, sees)
            served(nested, decoder, own, table.ngram_drafts)
            assert less.said == kept.said, f"{name} sees more than it says"
    assert drafted > (10 if ngram_drafts else 30)


def first_mixed(said: list[int]) -> int:
    """How many decisions are made before the first draft of another level than the one before it in its round."""
    before = 0
    for place, action in enumerate(said):
        if action and before and action != before:
            return place + 1
        before = action
    return len(said)


def test_a_bandit_learns_from_text_to_text_and_rows_do_not_mix(nested: NestedCausalLM) -> None:
    decoder = default_decoder(nested)[0]
    context = context_of(recorded(nested, decoder), COSTS)
    policy = Bandit(0.02).bind(context)
    levels = torch.tensor(WIDTHS)[:, None].expand(-1, nested.num_units).contiguous()
    bandit = ServedDrafts("bandit", context.schema, levels, torch.full((nested.num_units,), 8), policy, "nothing")
    for _ in range(3):
        served(nested, decoder, bandit)
    assert policy._arm is None, "the policy itself plays no row"  # type: ignore[attr-defined]
    assert (policy._arms._count > 0.5).sum() > 3, "arms were tried and counted"  # type: ignore[attr-defined]


def test_drafts_from_the_text_count_as_sure(nested: NestedCausalLM) -> None:
    low, high = torch.full((2,), 3), torch.full((2,), 8)
    policy = drafts_at("d", low, high, length=3, min_confidence=0.4)
    seen = policy.observe(None, RoundState((Draft(5), Draft(6, low, torch.tensor([0.0, 2.0]))), 3))[0]
    named = dict(zip(policy.schema.names, seen.tolist(), strict=True))
    confidence = float(torch.tensor([0.0, 2.0]).softmax(-1)[1])
    assert (named["confidence_0"], named["drafted_by_0"]) == (1, 1)
    assert named["confidence_product"] == pytest.approx(confidence)
    assert named["pending"] == pytest.approx(2 / 3)
    found = policy.observe(None, RoundState((Draft(5),), 3))[0]
    assert found[policy.schema.index("drafted_by_0")] == 0
    # More drafts than a round of the policy has: it is not asked.
    assert policy(None, RoundState((Draft(5),) * 9, 3)).verify
    assert len(served(nested, "hf", served_at_one_width(nested), ngram_drafts=9)) == TOKENS + 1


def served_at_one_width(model: NestedCausalLM) -> ServedDrafts:
    widths = (torch.full((model.num_units,), width) for width in (4, 8))
    return drafts_at("d", *widths, length=3, min_confidence=0.3)


def test_histories_are_moving_averages() -> None:
    history = RoundHistory()
    assert history.after(0, 0) is history
    for drafted, accepted in ((4, 2), (3, 3)):
        history = history.after(drafted, accepted)
    fast = 0.7 * (0.7 * 0.8 + 0.3 * 0.5) + 0.3
    slow = 0.95 * (0.95 * 0.8 + 0.05 * 0.5) + 0.05
    np.testing.assert_allclose(history.acceptance, [fast, slow], rtol=1e-6)
    assert history.last_round == (3, 3)


def test_the_schema_goes_through_json() -> None:
    schema = VerifiedSchema(3, 5, 7)
    assert VerifiedSchema.from_dict(schema.to_dict()) == schema
    for wrong in (0, 1.5, 10**9, True):
        with pytest.raises(ValueError, match="sizes of the observation"):
            VerifiedSchema.from_dict(schema.to_dict() | {"depth": wrong})


def test_plain_decoding_needs_no_rounds(nested: NestedCausalLM) -> None:
    """A run may find that nothing that drafts is faster: what it exports then is as fast as a static allocation."""
    widths = torch.full((nested.num_units,), 8)
    facts = DraftsFacts(Plain())
    policy = deploy_rule("plain", VerifiedSchema(1, 3), widths[None], widths, PolicyCard.of_model(nested, {}), facts)
    assert isinstance(make_controller(nested, policy, unmeasured_profile(nested)), StaticController)
    tokens = served(nested, "hf", policy, ngram_drafts=3)
    assert [token.token_id for token in tokens] == recorded(nested, "hf").token_ids.tolist()
    assert tokens[-1].draft_counts is None
