"""Who competes, and on which text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_rows import BUDGETS
from fake_session import FakeModel, fake_profile
from torch import Tensor

from flexquant_rl.agents.config import BASELINES
from flexquant_rl.agents.evaluation import contest
from flexquant_rl.agents.evaluation.baselines import contestant, validation_rehearsal
from flexquant_rl.agents.evaluation.budgets import BestOfFamily, Contestant, Entry, KnobFamily, Outcome
from flexquant_rl.agents.evaluation.comparison import compare
from flexquant_rl.agents.evaluation.contest import compete, heuristics
from flexquant_rl.agents.evaluation.equal_time import on_validation_text, static_entries, static_family
from flexquant_rl.agents.evaluation.evaluate import Trace
from flexquant_rl.agents.evaluation.showcase import MostMoving, movement_bits
from flexquant_rl.agents.evaluation.wall_clock import ClockedShares
from flexquant_rl.agents.policies.entropy import EntropyThreshold
from flexquant_rl.agents.policies.families import PPO, parse_policy
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.knapsack import Knapsack
from flexquant_rl.agents.policies.random_widths import RandomWidths
from flexquant_rl.agents.policies.static_front import static_front
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.agents.runs.training import SeedResult, policy_card
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.policy import LearnedPolicy, PrecisionNet
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.prompts import PromptWindows


def test_static_candidates_are_within_the_budget(tiny_prepared: Prepared) -> None:
    family = static_family(tiny_prepared)
    for budget in (0.5, 0.7, 1.0):
        candidates = list(family.candidates(budget))
        shares = [float(tiny_prepared.cost.time_share(one.bit_widths)) for one in candidates]
        assert max(shares) <= budget + 1e-9
        # The knapsack at the very budget comes first: no allocation of its front is nearer.
        assert shares[0] == pytest.approx(max(shares[:2]))
        names = {one.name for one in candidates}
        assert ("fixed:8" in names) == (budget == 1.0)
        assert "fixed:3" in names
    assert max(float(tiny_prepared.cost.time_share(one.bit_widths)) for one in family.candidates(1.0)) == 1.0


def test_baselines_of_a_model_without_four_bits() -> None:
    model = FakeModel(bit_widths=(3, 6, 8))
    profile = fake_profile(model)
    front = static_front(profile, model.unit_weights, num_points=1000)
    prepared = Prepared(model, None, profile, profile.cost, front, EnvConfig())  # type: ignore[arg-type]
    families = {family.name: family for family in heuristics(prepared)}
    entropy, schedule = families["entropy"], families["schedule"]
    assert isinstance(entropy, BestOfFamily)
    assert isinstance(schedule, BestOfFamily)
    names = {member.at(0.0).name.partition(",")[2] for member in entropy.members}
    assert {"low_width=3,high_width=6", "low_width=6", "low_width=3"} <= names, "adjacent widths, and far ones"
    shapes = {
        (spread, hysteresis, one_way)
        for spread in (0.5, 2.0, 6.0)
        for hysteresis in (0, 1)
        for one_way in (False, True)
    }
    found = [bound.at(0.0).name for bound in entropy.members]
    parsed = [parse_policy(name) for name in found]
    pairs = {(one.low_width, one.high_width) for one in parsed if isinstance(one, EntropyThreshold)}
    assert {
        (one.low_width, one.high_width, one.spread_nats, one.hysteresis_units, one.one_way)
        for one in parsed
        if isinstance(one, EntropyThreshold)
    } == {(*pair, *shape) for pair in pairs for shape in shapes}
    assert len(found) == len(pairs) * len(shapes)
    assert {member.at(0.0).name for member in schedule.members} >= {
        "schedule:0,high=6,low=4.35",
        "schedule:0,high=6,low=3",
        "schedule:0,low=3",
    }


@pytest.mark.parametrize("slow", [5, 8])
def test_more_bits_may_be_faster(tiny_prepared: Prepared, slow: int) -> None:
    """On a processor that reads 5 bits slowly, what lies between 5 and 6 takes less time: nobody regresses there."""
    unit_ms = tiny_prepared.cost.unit_ms.clone()
    widths = tiny_prepared.model.bit_widths
    if slow == 5:
        unit_ms[:, widths.index(5)] = unit_ms[:, widths.index(6)] * 1.05
    else:
        unit_ms[:] = unit_ms[:, :1]
    cost = replace(tiny_prepared.cost, unit_ms=unit_ms)
    prepared = replace(tiny_prepared, cost=cost, profile=replace(tiny_prepared.profile, cost=cost))
    (family,) = [family for family in heuristics(prepared, ["regressor"]) if family.name == "regressor"]
    assert isinstance(family, BestOfFamily)
    names = [member.at(0.5).name for member in family.members]
    if slow == 5:
        assert names
        assert not [name for name in names if "low=5,high=6" in name]
    else:
        assert not names
        with on_validation_text(prepared) as measure:
            assert family.entries((0.7,), measure) == (
                [],
                ["regressor has no point at 0.7 of full-width time: it has no settings here"],
            )


def test_only_the_baselines_that_are_named_compete(tiny_prepared: Prepared) -> None:
    def names(*baselines: str) -> list[str]:
        return [family.name for family in heuristics(tiny_prepared, baselines)]

    always = ["static", "fixed"]
    assert names() == always
    assert names("schedule", "random") == [*always, "random", "schedule"]
    # What a run has learned is the run's, and what chooses in flight is no policy.
    apart = ("untrained", "token", "relative-error")
    assert names(*BASELINES) == [*always, *(name for name in BASELINES if name not in apart)]


def test_every_knob_goes_from_fast_to_slow(tiny_prepared: Prepared) -> None:
    """The ends of each knob are the two allocations that it mixes, on recorded text."""
    rehearsal = None
    for family in heuristics(tiny_prepared):
        if not isinstance(family, BestOfFamily):
            continue
        rehearsal = rehearsal or family.rehearsal()
        assert family.rehearsal() is rehearsal, "text is recorded once"
        for member in family.members:
            times = [rehearsal.time_share(member.at(position)) for position in (0.0, 1.0)]
            assert times[0] < times[1], member.at(0.5).name


def learned_result(prepared: Prepared, seed: int) -> SeedResult:
    card = policy_card(prepared)
    torch.manual_seed(seed)
    policy = LearnedPolicy(PrecisionNet(card.schema), card, f"ppo seed {seed}")
    return SeedResult(seed, policy, ((0, 0.0), (64, 0.1 * seed)), None)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the policies that were timed; a step takes as long as its mean width says, and a little more."""
    found: list[str] = []

    def fake_shares(model: object, profile: object, windows: Tensor, config: object, policies: list, **_: object):
        found.extend(policy.name for policy, _ in policies)
        widths = [getattr(policy, "bit_widths", torch.full((3,), 5)) for policy, _ in policies]
        return ClockedShares(
            tuple(0.1 + 0.9 * float(own.double().mean()) / 8 for own in widths), (0.002,) * len(widths), 5
        )

    monkeypatch.setattr(contest, "measured_time_shares", fake_shares)
    return found


def test_compete_judges_all_on_the_same_text(tiny_prepared: Prepared, timed: list[str]) -> None:
    policy = learned_result(tiny_prepared, 0).policy
    entries = [
        Contestant("fixed", StaticAllocation("fixed:4", torch.full((3,), 4))),
        Contestant("ppo", policy, 5.0, 0),
        Contestant("ppo", policy, 50.0, 1),
    ]
    rows = compete(tiny_prepared, entries, 4)
    # The fixed widths beside them say how the clock follows the table.
    assert timed == ["fixed:4", "ppo seed 0", "ppo seed 0", *(f"fixed:{width}" for width in (3, 5, 6, 8))]
    assert [result.policy for result in rows] == ["fixed:4", "ppo", "ppo"]
    assert [result.time_share_measured for result in rows] == pytest.approx([0.55, 0.6625, 0.6625])
    assert {result.num_sequences for result in rows} == {4}
    assert {result.num_tokens for result in rows} == {4 * tiny_prepared.env.max_new_tokens}
    assert {result.reference for result in rows} == {"unquantised"}
    assert {result.time_budget for result in rows} == {None}
    assert rows[0].sequence_documents == tuple(contest.test_windows(tiny_prepared, 4)[1])
    again = compete(tiny_prepared, entries[::-1], 4)[::-1]
    assert again == rows


def test_tuning_reads_validation_text_and_the_contest_test_text(tiny_prepared: Prepared, timed: list[str]) -> None:
    tokens = tiny_prepared.windows.test
    windows = PromptWindows(lambda split: (tokens, torch.arange(8) // 2), "letters")
    prepared = replace(tiny_prepared, windows=windows)
    results = [learned_result(prepared, seed) for seed in (0, 1)]
    families = [*heuristics(prepared), *contest.learned(prepared, results, validation_rehearsal(prepared))]
    settings = contest.tune(prepared, families, (0.2, 0.6, 0.8), 4)
    assert windows.opened == {"validation", "train"}
    rows = contest.compete_at_budgets(prepared, settings, 4)
    assert windows.opened == {"validation", "train", "test"}
    assert {reason.split(" has no")[0] for reason in settings.missed} >= {"static", "fixed"}
    assert 0.2 not in {result.time_budget for result in rows}
    for family in ("static", "fixed", "random"):
        assert [r.time_budget for r in rows if r.family == family] == [0.6, 0.8], family
    for result in rows:
        if result.family in ("static", "fixed"):
            assert (result.time_share_modelled or 9) <= (result.time_budget or 0) + 1e-6
        if result.family == "fixed":
            assert result.time_share_modelled == pytest.approx(result.time_budget, abs=1e-6)
        assert result.differs_from_static == (0.0 if result.family == "static" else pytest.approx(0.5, abs=0.5))
        assert result.speedup_modelled == pytest.approx(1 / (result.time_share_modelled or 0))
        assert result.time_share_measured is not None
        assert result.static_kl_nats is not None
    assert {f"fixed:{width}" for width in prepared.model.bit_widths} <= set(timed)


def network_of_the_dial(prepared: Prepared) -> LearnedPolicy:
    """Goes from small and narrow widths to large ones with its dial."""
    card = policy_card(prepared)
    net = PrecisionNet(card.schema)
    centres = torch.linspace(-6, 8, 5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.encode_global[0].weight[0, card.schema.index("dial")] = 1.0
        net.encode_unit[0].weight[0, card.schema.num_per_unit] = 1.0
        net.encode_unit[2].weight[0, 0] = 1.0
        net.width_head.weight[:, 0] = 20 * centres
        net.width_head.bias.copy_(-centres.square())
    return LearnedPolicy(net, card, "a network of the dial")


def test_the_untrained_network_meets_budgets_as_the_trained_one(tiny_prepared: Prepared) -> None:
    """One way to find the settings, on one recording: the same network gets the same dials under both names."""
    policy = network_of_the_dial(tiny_prepared)
    result = replace(learned_result(tiny_prepared, 3), policy=policy, cloned=policy)
    rehearsal = validation_rehearsal(tiny_prepared)
    (before,) = contest.untrained(tiny_prepared, result, rehearsal)
    (after,) = contest.learned(tiny_prepared, [result], rehearsal)
    settings = contest.tune(tiny_prepared, [before, after], (0.1, *BUDGETS), 4)
    entries = {name: [entry for entry in settings.entries if entry.family == name] for name in ("untrained", PPO.name)}
    for name, own in entries.items():
        assert own
        assert {(entry.first.seed, entry.name) for entry in own} == {(3, name)}
    found, expected = ([(one.time_budget, one.first.kl_weight) for one in own] for own in entries.values())
    assert found == expected
    assert len(settings.entries) + len(settings.missed) == 2 * (1 + len(BUDGETS))
    assert settings.missed[0].startswith("untrained (seed 3) has no point at 0.1")


def test_a_learned_policy_uses_its_budgets_up(tiny_prepared: Prepared) -> None:
    """As much as by real runs alone, which cost more."""
    result = replace(learned_result(tiny_prepared, 3), policy=network_of_the_dial(tiny_prepared))
    (family,) = contest.learned(tiny_prepared, [result], validation_rehearsal(tiny_prepared))
    assert isinstance(family, BestOfFamily)
    with on_validation_text(tiny_prepared) as measure:
        asked: list[int] = []

        def counted(contestants: Sequence[Contestant]) -> list[Outcome]:
            asked.append(len(contestants))
            return measure(contestants)

        found, _ = family.entries(BUDGETS, counted)
        rehearsed, asked[:] = sum(asked), []
        expected, _ = family.members[0].entries(BUDGETS, counted)
        assert [entry.time_budget for entry in found] == [entry.time_budget for entry in expected]
        assert rehearsed < sum(asked)
        for one, other in zip(found, expected, strict=True):
            mine, theirs = measure([one.first, other.first])
            assert mine.time_share <= (one.time_budget or 0) + 1e-6
            assert mine.time_share >= theirs.time_share - 0.02


def test_an_untrained_network_that_is_lost_is_missed(tiny_prepared: Prepared) -> None:
    families = contest.untrained(tiny_prepared, learned_result(tiny_prepared, 3), validation_rehearsal(tiny_prepared))
    settings = contest.tune(tiny_prepared, families, BUDGETS, 4)
    assert settings.entries == ()
    (reason,) = settings.missed
    assert reason.startswith("untrained has no point at any budget: the run has no network of seed 3 from before PPO")


def test_the_reward_of_a_row_is_what_training_pays(tiny_prepared: Prepared, timed: list[str]) -> None:
    """A controller that costs time is charged in both."""
    full_ms = float(tiny_prepared.cost.latency_ms(tiny_prepared.cost.full_width()))
    charging = replace(tiny_prepared, cost=replace(tiny_prepared.cost, controller_ms=0.1 * full_ms))
    traces: list[Trace] = []
    one = Contestant(PPO.name, learned_result(charging, 1).policy, 5.0, 1)
    settings = contest.Settings((Entry(PPO.name, 0.7, one),), ())
    (found,) = contest.compete_at_budgets(charging, settings, 4, watch=lambda _, trace: traces.append(trace))
    assert found.reward_per_token == pytest.approx(float(traces[0].reward.double().mean()), rel=1e-5)
    assert replace(found, kl_weight=None).reward_per_token is None


def test_time_sharing_is_the_mixture(tiny_prepared: Prepared, timed: list[str]) -> None:
    three, four = (Contestant("fixed", StaticAllocation(f"fixed:{w}", torch.full((3,), w))) for w in (3, 4))
    entries = [Entry("fixed", 0.4, three), Entry("fixed", 0.45, three, four, 0.25), Entry("fixed", 0.5, four)]
    first, mixed, last = contest.compete_at_budgets(tiny_prepared, contest.Settings(tuple(entries), ()), 4)
    assert timed[:2] == ["fixed:3", "fixed:4"], "each member is run once"
    assert "fixed:3" not in timed[2:]
    for field in ("output_kl_nats", "time_share_modelled", "mean_bit_width", "top1_agreement"):
        expected = 0.75 * getattr(first, field) + 0.25 * getattr(last, field)
        assert getattr(mixed, field) == pytest.approx(expected), field
    assert mixed.output_kl_nats == pytest.approx(sum(mixed.sequence_kl_nats) / 4)
    assert math.log(mixed.perplexity) == pytest.approx(
        0.75 * math.log(first.perplexity) + 0.25 * math.log(last.perplexity)
    )
    # The largest KL of a small sample: the quantile of a mixture is not interpolated.
    assert last.output_kl_p99_nats <= mixed.output_kl_p99_nats <= 1.1 * first.output_kl_p99_nats
    assert first.time_share_measured is not None
    assert last.time_share_measured is not None
    expected = 0.75 * first.time_share_measured + 0.25 * last.time_share_measured
    assert mixed.time_share_measured == pytest.approx(expected)


def test_equal_policies_get_equal_rows(tiny_prepared: Prepared, timed: list[str]) -> None:
    """The same policies under two names: the same settings, rows, and a ratio of one."""
    (family,) = [family for family in heuristics(tiny_prepared) if family.name == "random"]
    assert isinstance(family, BestOfFamily)
    (ours,) = family.members
    twin = KnobFamily("twin", lambda position: replace(ours.at(position), family="twin"))
    families = [ours, twin]
    settings = contest.tune(tiny_prepared, [static_family(tiny_prepared), *families], BUDGETS, 4)
    rows = contest.compete_at_budgets(tiny_prepared, settings, 4)
    one, other = ([r for r in rows if r.family == name] for name in ("random", "twin"))
    assert len(one) == len(BUDGETS)
    strip = {"family": "", "policy": ""}
    assert [replace(r, **strip) for r in one] == [replace(r, **strip) for r in other]
    comparison = compare(rows, "random", "twin")
    assert comparison is not None
    assert [ratio.value for _, ratio in comparison.by_setting] == [0.0] * len(one)


def test_test_windows_are_spread(tiny_prepared: Prepared) -> None:
    windows = tiny_prepared.windows.test
    assert torch.equal(contest.test_windows(tiny_prepared, 99)[0], windows)
    some, documents = contest.test_windows(tiny_prepared, 2)
    assert torch.equal(some, windows[[0, -1]])
    assert documents == [0, 3]


def test_the_clock_times_every_token_whose_kl_counts(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who spends its bits early would pay for more than it took if the clock stopped halfway."""
    timed: list[tuple[Tensor, EnvConfig]] = []

    def shares(model: object, profile: object, windows: Tensor, env: EnvConfig, asked: list[Any], **_: Any) -> Any:
        timed.append((windows, env))
        return ClockedShares((1.0,) * len(asked), (0.0,) * len(asked), 5)

    monkeypatch.setattr(contest, "measured_time_shares", shares)
    windows = tiny_prepared.windows.test
    contest.clocked_shares(tiny_prepared, [contest.contestant(Fixed(4), policy_context(tiny_prepared))], windows)
    ((read, env),) = timed
    assert env == tiny_prepared.env
    assert read.shape[1] == env.window_tokens


def test_the_most_moving_sequence_is_found_among_all_that_was_run(tiny_prepared: Prepared, timed: list[str]) -> None:
    """Over seeds, dials and sequences; what is not trained moves as it likes."""
    results = [learned_result(tiny_prepared, seed) for seed in (0, 1)]
    dials = tiny_prepared.dials(3).tolist()
    entries = [
        Entry(PPO.name, None, Contestant(PPO.name, r.policy, dial, r.seed)) for r in results for dial in dials
    ] + [Entry("random", None, contest.contestant(RandomWidths(4.5), policy_context(tiny_prepared)))]
    seen: list[tuple[Contestant, Trace]] = []
    moving = MostMoving()

    def watch(one: Contestant, trace: Trace) -> None:
        seen.append((one, trace))
        moving.consider(one, trace)

    contest.compete_at_budgets(tiny_prepared, contest.Settings(tuple(entries), ()), 4, watch=watch)
    assert len(seen) == 7
    best = -1.0
    for one, trace in seen[:-1]:
        for index, widths in enumerate(trace.bit_widths.numpy().astype(np.float64)):
            if widths.std(axis=0).mean() > best:
                best, expected = widths.std(axis=0).mean(), (index, one.kl_weight, one.seed, widths)
    found = moving.found
    assert found is not None
    assert (found.sequence_idx, found.kl_weight, found.seed) == expected[:3]
    assert found.movement_bits == pytest.approx(best)
    np.testing.assert_array_equal(found.bit_widths.numpy(), expected[3])
    expected_title = f"test sequence {found.sequence_idx + 1} of 4, dial {found.kl_weight:.3g}, seed {found.seed}"
    assert found.title() == expected_title
    assert f"move by {best:.2f} bits" in found.words()
    # Random widths move more than any of them.
    assert float(movement_bits(seen[-1][1].bit_widths).max()) > best


def test_movement_is_the_deviation_over_tokens() -> None:
    widths = torch.randint(3, 9, (5, 12, 4))
    np.testing.assert_allclose(movement_bits(widths).numpy(), widths.numpy().std(axis=1).mean(axis=-1))
    assert float(movement_bits(torch.tensor([[3, 8], [3, 8]]))) == 0


def test_tokens_that_were_read(tiny_prepared: Prepared) -> None:
    first, steps = tiny_prepared.env.prompt_tokens, tiny_prepared.env.max_new_tokens
    read = tiny_prepared.windows.test[-1, first : first + steps].tolist()
    assert contest.read_tokens(tiny_prepared, 2, 1) == [chr(token) for token in read]


def test_without_a_budget_static_of_the_time_that_was_taken(tiny_prepared: Prepared, timed: list[str]) -> None:
    """A step differs where any unit does from the best static allocation within the row's own time."""
    context = policy_context(tiny_prepared)
    traces: dict[str, Trace] = {}
    learned_policy = learned_result(tiny_prepared, 1).policy
    entries = [
        Contestant(PPO.name, learned_policy, 5.0, 1),
        contest.contestant(RandomWidths(4.5), context),
        contest.contestant(Fixed(4), context),
        contest.contestant(Knapsack(5.0), context),
    ]
    settings = contest.Settings(tuple(Entry(one.family, None, one) for one in entries), ())
    rows = contest.compete_at_budgets(
        tiny_prepared, settings, 4, watch=lambda one, trace: traces.update({one.name: trace})
    )
    for one, result in zip(entries, rows, strict=True):
        share = result.time_share_modelled
        assert share is not None
        (static,) = static_entries(tiny_prepared, [share]).values()
        assert float(tiny_prepared.cost.time_share(static.bit_widths)) <= share + 1e-6
        unlike = (traces[one.name].bit_widths != static.bit_widths).any(-1).double().mean()
        assert result.differs_from_static == pytest.approx(float(unlike)), one.name
    assert {rows[2].differs_from_static, rows[3].differs_from_static} <= {0.0, 1.0}


@pytest.mark.parametrize(("share", "said"), [(1.02, ""), (0.98, ""), (1.06, "took 1.06 of"), (0.32, "took 0.32 of")])
def test_a_clock_that_disagrees_with_itself(
    share: float,
    said: str,
    tiny_prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The largest width is timed as a policy too: on a busy machine it took a third of its own time."""

    def measured(model: Any, profile: Any, windows: Any, config: Any, policies: list[Any], **_: Any) -> ClockedShares:
        full = tiny_prepared.cost.full_width()
        shares = [share if torch.equal(policy.bit_widths, full) else 0.5 for policy, _ in policies]
        return ClockedShares(tuple(shares), (0.002,) * len(shares), 5)

    monkeypatch.setattr(contest, "measured_time_shares", measured)
    context = policy_context(tiny_prepared)
    contest.compete(tiny_prepared, [contestant(Fixed(4), context)], 4)
    printed = capsys.readouterr().err
    assert ("the clock disagrees with itself" in printed) == bool(said)
    assert said in printed
