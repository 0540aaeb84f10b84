"""Who competes, on which text, and how much of the headroom is captured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fake_session import FakeModel, fake_profile
from torch import Tensor

from flexquant_rl.agents.evaluation import contest
from flexquant_rl.agents.evaluation.contest import Contestant, compete, headroom, heuristics, oracle_row, showcase
from flexquant_rl.agents.evaluation.oracle import OracleConfig
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.policies.static_front import static_front
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.agents.runs.training import SeedResult, policy_card
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.policy import LearnedPolicy, PrecisionNet
from flexquant_rl.fq_env.config import EnvConfig


def row(family: str, speedup: float, kl: float, *, seed: int | None = None) -> EvalRow:
    return EvalRow(
        policy=family,
        family=family,
        seed=seed,
        kl_weight=None,
        mean_bit_width=5.0,
        output_kl_nats=kl,
        output_kl_low=kl,
        output_kl_high=kl,
        output_kl_p99_nats=kl,
        perplexity=2.0,
        top1_agreement=1.0,
        speedup_modelled=speedup,
        speedup_measured=None,
        num_sequences=1,
        num_tokens=1,
        reference="unquantised",
        sequence_kl_nats=(kl,),
    )


# KL is linear in time: between 1x and 2x, at three quarters of the time (4/3x), the static KL is 0.025.
MIDDLE = 4 / 3
STATIC = [row("knapsack", 1.0, 0.01), row("knapsack", 2.0, 0.04)]
ORACLE = row("oracle", MIDDLE, 0.005)


@pytest.mark.parametrize(("kl", "share"), [(0.015, 0.5), (0.025, 0.0), (0.005, 1.0), (0.045, -1.0)])
def test_headroom_by_hand(kl: float, share: float) -> None:
    assert headroom([*STATIC, ORACLE, row("ppo", MIDDLE, kl, seed=0)]) == pytest.approx(share, abs=1e-9)


def test_headroom_is_the_mean_over_seeds() -> None:
    rows = [*STATIC, ORACLE, row("ppo", MIDDLE, 0.015, seed=0), row("ppo", MIDDLE, 0.025, seed=1)]
    assert headroom(rows) == pytest.approx(0.25)
    # Each seed's own front is interpolated: 0.01 and 0.02 at 1x and 2x are 0.015 in the middle.
    rows = [*STATIC, ORACLE, row("ppo", 1.0, 0.01, seed=0), row("ppo", 2.0, 0.02, seed=0)]
    assert headroom(rows) == pytest.approx(0.5)
    # A seed that does not reach the oracle's speed is left out, not counted as nothing.
    assert headroom([*rows, row("ppo", 1.1, 0.001, seed=1)]) == pytest.approx(0.5)


def test_headroom_of_other_families_does_not_count() -> None:
    rows = [*STATIC, ORACLE, row("ppo", MIDDLE, 0.015, seed=0)]
    others = [row("fixed", MIDDLE, 0.001), row("entropy", MIDDLE, 0.001)]
    assert headroom([*rows, *others]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "rows",
    [
        [*STATIC, row("ppo", MIDDLE, 0.015, seed=0)],  # no oracle
        [*STATIC, ORACLE],  # nothing learned
        [*STATIC, ORACLE, row("ppo", 1.2, 0.015, seed=0)],  # never at the oracle's speed
        [STATIC[0], ORACLE, row("ppo", MIDDLE, 0.015, seed=0)],  # static never at the oracle's speed
        [*STATIC, row("oracle", MIDDLE, 0.05), row("ppo", MIDDLE, 0.015, seed=0)],  # an oracle worse than static
    ],
)
def test_no_headroom_without_both_ends(rows: list[EvalRow]) -> None:
    assert headroom(rows) is None


def test_heuristics(tiny_prepared: Prepared) -> None:
    contestants = heuristics(tiny_prepared)
    names = [contestant.name for contestant in contestants]
    assert names[:5] == ["fixed:3", "fixed:4", "fixed:5", "fixed:6", "fixed:8"]
    assert {"random:3.5", "random:4.5", "random:5.5", "entropy:0.5", "entropy:3.5"} <= set(names)
    assert len(names) == len(set(names))
    for contestant in contestants:
        assert contestant.family == contestant.name.split(":")[0]
        assert contestant.seed is None
        assert contestant.kl_weight is None
        assert contestant.timed
    knapsack = [contestant for contestant in contestants if contestant.family == "knapsack"]
    assert 3 <= len(knapsack) <= contest._KNAPSACK_POINTS
    # The names say what they are: the ends of the front are among them.
    front = tiny_prepared.front
    chosen = [contestant.policy.bit_widths.tolist() for contestant in knapsack]  # type: ignore[attr-defined]
    assert front.bit_widths[0].tolist() in chosen
    assert front.bit_widths[-1].tolist() in chosen
    for contestant, widths in zip(knapsack, chosen, strict=True):
        mean = tiny_prepared.model.mean_bit_width(torch.tensor(widths))
        assert float(contestant.name.split(":")[1]) == pytest.approx(float(mean), abs=0.01)


def test_heuristics_of_a_model_without_four_bits() -> None:
    model = FakeModel(bit_widths=(3, 6, 8))
    profile = fake_profile(model)
    front = static_front(profile, model.unit_weights)
    prepared = Prepared(model, None, profile, profile.cost, front, EnvConfig())  # type: ignore[arg-type]
    names = [contestant.name for contestant in heuristics(prepared) if contestant.family == "entropy"]
    assert names[0] == "entropy:0.5,low_width=3", "a name says what runs"


def learned_result(prepared: Prepared, seed: int) -> SeedResult:
    card = policy_card(prepared)
    torch.manual_seed(seed)
    return SeedResult(seed, LearnedPolicy(PrecisionNet(card.schema), card, f"ppo seed {seed}"), 0.0, 0.1 * seed, None)


def test_compete_judges_all_on_the_same_text(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def fake_speedups(model: object, profile: object, window: Tensor, config: object, policies: list, **_: object):
        timed.extend(policy.name for policy, _ in policies)
        assert len(window) == tiny_prepared.env.window_tokens
        return [float(index) for index in range(len(policies))]

    monkeypatch.setattr(contest, "measured_speedups", fake_speedups)
    results = [learned_result(tiny_prepared, seed) for seed in (0, 1)]
    entries = [
        Contestant("fixed", StaticAllocation("fixed:4", torch.full((3,), 4))),
        *contest.learned(tiny_prepared, results, 2, results[1]),
    ]
    assert [entry.timed for entry in entries] == [True, False, False, True, True]
    assert [entry.seed for entry in entries] == [None, 0, 0, 1, 1]
    dials = tiny_prepared.dials(2).tolist()
    assert [entry.kl_weight for entry in entries] == [None, *dials, *dials]
    assert dials == pytest.approx([tiny_prepared.env.kl_weight_min, tiny_prepared.env.kl_weight_max], rel=1e-5)
    rows = compete(tiny_prepared, entries, 4)
    assert timed == ["fixed:4", "ppo seed 1", "ppo seed 1"]
    assert [result.policy for result in rows] == ["fixed:4", "ppo", "ppo", "ppo", "ppo"]
    assert [result.speedup_measured for result in rows] == [0.0, None, None, 1.0, 2.0]
    assert {result.num_sequences for result in rows} == {4}
    assert {result.num_tokens for result in rows} == {4 * tiny_prepared.env.max_new_tokens}
    assert {result.reference for result in rows} == {"unquantised"}
    again = compete(tiny_prepared, entries[::-1], 4)[::-1]
    strip = {"speedup_measured": None}
    assert [replace(result, **strip) for result in again] == [replace(result, **strip) for result in rows]


def test_test_windows_are_spread(tiny_prepared: Prepared) -> None:
    windows = tiny_prepared.windows.test
    assert torch.equal(contest.test_windows(tiny_prepared, 99), windows)
    assert torch.equal(contest.test_windows(tiny_prepared, 2), windows[[0, -1]])


def test_oracle_row_is_on_the_same_text(tiny_prepared: Prepared) -> None:
    result = oracle_row(tiny_prepared, 2, OracleConfig(num_masks=8))
    assert (result.policy, result.family, result.num_sequences) == ("oracle:token", "oracle", 2)
    assert result.speedup_measured is None
    assert 1 < (result.speedup_modelled or 0) < math.inf
    assert 0 < result.output_kl_nats < math.inf
    # Half of the tokens at each of the two allocations.
    mean = [float(tiny_prepared.model.mean_bit_width(tiny_prepared.front.nearest(bits))) for bits in (4.0, 5.0)]
    assert result.mean_bit_width == pytest.approx(sum(mean) / 2, rel=1e-4)


def test_showcase_names_the_tokens_that_were_read(tiny_prepared: Prepared) -> None:
    trace, tokens = showcase(tiny_prepared, learned_result(tiny_prepared, 0).policy, 5.0)
    first, steps = tiny_prepared.env.prompt_tokens, tiny_prepared.env.max_new_tokens
    assert trace.bit_widths.shape == (1, steps, 3)
    read = tiny_prepared.windows.test[0, first : first + steps].tolist()
    assert tokens == [chr(token) for token in read]
