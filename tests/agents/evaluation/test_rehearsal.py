"""Recorded text: times and KL without the model are those with it, as far as the record tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.budgets import Contestant
from flexquant_rl.agents.evaluation.evaluate import Evaluator
from flexquant_rl.agents.evaluation.rehearsal import RecordedText
from flexquant_rl.agents.policies.entropy import EntropyThreshold
from flexquant_rl.agents.policies.families import bind_policy
from flexquant_rl.agents.policies.schedule import Schedule
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.engine.control.decision import Decision, StaticAllocation
from flexquant_rl.engine.control.signals import SignalSchema


@pytest.fixture(scope="module")
def recorded(tiny_prepared: Prepared) -> RecordedText:
    p = tiny_prepared
    return RecordedText(p.model, p.profile, p.windows.validation, p.env, p.cost, num_scored=99)


@pytest.fixture(scope="module")
def evaluator(tiny_prepared: Prepared) -> Evaluator:
    p = tiny_prepared
    return Evaluator(p.model, p.profile, p.windows.validation, p.env, cost=p.cost)


@pytest.mark.parametrize("policy", [Schedule(5), Schedule(3, high=5.4, low=3.4), Schedule(0), Schedule(12)])
def test_exact_where_only_the_position_counts(
    tiny_prepared: Prepared, recorded: RecordedText, evaluator: Evaluator, policy: Schedule
) -> None:
    bound = bind_policy(policy, policy_context(tiny_prepared))
    trace = evaluator.run(bound)
    one = Contestant("schedule", bound)
    assert recorded.time_share(one) == pytest.approx(1 / trace.speedup)
    assert recorded.output_kl_nats(one) == pytest.approx(float(trace.output_kl_nats.mean()), rel=1e-3, abs=1e-7)


def test_the_controller_is_charged_where_it_looks(tiny_prepared: Prepared) -> None:
    p = tiny_prepared
    cost = replace(p.cost, controller_ms=0.3 * float(p.cost.latency_ms(p.cost.full_width())))
    text = RecordedText(p.model, p.profile, p.windows.validation, p.env, cost, num_scored=1)
    evaluator = Evaluator(p.model, p.profile, p.windows.validation, p.env, cost=cost)
    fixed = StaticAllocation("fixed:6", torch.full((p.model.num_units,), 6))
    blind = bind_policy(Schedule(0, low=6), policy_context(p))
    looking = bind_policy(EntropyThreshold(-1.0, low_width=4, high_width=6), policy_context(p))
    policies = (fixed, blind, looking)
    shares = [text.time_share(Contestant("own", policy)) for policy in policies]
    assert shares == pytest.approx([1 / evaluator.run(policy).speedup for policy in policies])
    assert shares[1] == pytest.approx(shares[0])
    assert shares[2] - shares[0] == pytest.approx(0.3)


def test_near_where_the_output_counts(tiny_prepared: Prepared, recorded: RecordedText, evaluator: Evaluator) -> None:
    bound = bind_policy(EntropyThreshold(5.0, low_width=4, high_width=6), policy_context(tiny_prepared))
    trace = evaluator.run(bound)
    one = Contestant("entropy", bound)
    assert recorded.time_share(one) == pytest.approx(1 / trace.speedup, abs=0.03)
    assert recorded.output_kl_nats(one) == pytest.approx(float(trace.output_kl_nats.mean()), rel=0.3)


def test_the_policy_sees_its_own_widths_and_the_dial(tiny_prepared: Prepared, recorded: RecordedText) -> None:
    schema = SignalSchema(tiny_prepared.model.num_units, tiny_prepared.model.bit_widths)
    seen: list[Tensor] = []

    class Watching:
        name = "watching"

        def __call__(self, signals: Tensor) -> Decision:
            seen.append(signals.clone())
            return Decision(torch.full((len(signals), schema.num_units), 3 if len(seen) % 2 else 6))

    recorded.time_share(Contestant("ppo", Watching(), 100.0))
    assert [int(schema.last_widths(signals)[0, 0]) for signals in seen[:4]] == [8, 3, 6, 3]
    assert [int(schema.tokens_decoded(signals)[0]) for signals in seen[:4]] == [0, 1, 2, 3]
    assert {float(signals[0, schema.index("dial")]) for signals in seen} == {2.0}
    means = [float(signals[0, schema.index("mean_width_16")]) * 8 for signals in seen[:3]]
    assert means == pytest.approx([8, (15 * 8 + 3) / 16, (14 * 8 + 3 + 6) / 16])


def test_token_kl_is_that_of_the_allocation(
    tiny_prepared: Prepared, recorded: RecordedText, evaluator: Evaluator
) -> None:
    widths = torch.tensor([3, 4, 6])
    kl = recorded.token_kl_nats(widths)
    assert kl.shape == recorded.signals.shape[:2]
    assert recorded.token_kl_nats(widths.clone()) is kl, "looked up once"
    trace = evaluator.run(StaticAllocation("static", widths))
    torch.testing.assert_close(kl, trace.output_kl_nats, atol=1e-5, rtol=1e-3)


def test_roughly_a_token_has_the_kl_of_its_time(tiny_prepared: Prepared, recorded: RecordedText) -> None:
    """That of fixed widths is theirs; what mixes them is between theirs, in the order that passes give."""
    context = policy_context(tiny_prepared)
    for width in tiny_prepared.model.bit_widths:
        fixed = StaticAllocation("fixed", torch.full((tiny_prepared.model.num_units,), width))
        one = Contestant("fixed", fixed)
        assert recorded.rough_kl_nats(one) == pytest.approx(float(recorded.token_kl_nats(fixed.bit_widths).mean()))
    policies = [bind_policy(Schedule(count, high=6, low=4), context) for count in (0, 4, 8, 12)]
    ones = [Contestant("schedule", policy) for policy in policies]
    roughly, found = ([score(one) for one in ones] for score in (recorded.rough_kl_nats, recorded.output_kl_nats))
    assert roughly == pytest.approx(found, rel=0.3)
    assert sorted(roughly, reverse=True) == roughly


def test_few_scored_sequences_are_brought_to_the_time_of_all(tiny_prepared: Prepared) -> None:
    """Two rows at 6 bits of eight, the others at 3: the two that are scored cost what all take, not what they take."""
    p = tiny_prepared
    few = RecordedText(p.model, p.profile, p.windows.validation, p.env, p.cost, num_scored=2)
    num_units = p.model.num_units

    class First:
        name = "first"

        def __call__(self, signals: Tensor) -> Decision:
            widths = torch.full((len(signals), num_units), 3)
            widths[[0, -1]] = 6  # the ends are what is scored
            return Decision(widths)

    one = Contestant("own", First())
    scored = few.token_kl_nats(torch.full((num_units,), 6)).double().mean()
    assert few.output_kl_nats(one) > 1.5 * float(scored)
