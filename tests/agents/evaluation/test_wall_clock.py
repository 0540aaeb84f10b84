"""Policies by the clock: medians, pieces in turns, and the error that is left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from flexquant_rl.agents.evaluation import wall_clock
from flexquant_rl.agents.evaluation.wall_clock import ClockedShares, measured_time_shares
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.engine.control.decision import Decision, Policy
from flexquant_rl.engine.control.signals import SignalSchema


class FakeClock:
    """Steps take as many milliseconds as `step_ms` says of their mean width and of how many steps were timed before."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, step_ms: Callable[[float, int], float] = lambda width, _: width
    ) -> None:
        self.widths: list[float] = []
        self._step_ms = step_ms
        monkeypatch.setattr(wall_clock, "clock_ms", self)

    def __call__(self, run: MethodType, device: torch.device) -> float:
        step = run()
        self.widths.append(float(step.decision.bit_widths.double().mean()))
        return self._step_ms(self.widths[-1], len(self.widths) - 1)


def clocked(
    prepared: Prepared, widths: tuple[int, ...], *, windows: int = 1, tokens: int = 4, rounds: int
) -> ClockedShares:
    """Fixed widths on the clock."""
    env = replace(prepared.env, max_new_tokens=tokens)
    context = policy_context(prepared)
    entries: list[tuple[Policy, float]] = [(Fixed(width).bind(context), 1.0) for width in widths]
    text = prepared.windows.test[:windows, : env.window_tokens]
    return measured_time_shares(prepared.model, prepared.profile, text, env, entries, rounds=rounds)


def test_measured_shares_are_sums_of_medians(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each token the median over rounds, added up over the tokens of all windows."""
    per_round = 4 * 2 * 6

    def step_ms(width: float, call: int) -> float:
        """The machine becomes slower from round to round, for 4 bits otherwise than for the rest."""
        round_idx = call // per_round
        return (4.0, 4.0, 24.0)[round_idx] if width == 4 else width * (1 + round_idx)

    clock = FakeClock(monkeypatch, step_ms)
    measured = clocked(tiny_prepared, (4, 8, 5), windows=2, tokens=6, rounds=3)
    assert measured.shares == pytest.approx((4 / 16, 1.0, 10 / 16))
    assert measured.num_rounds == 3
    assert len(clock.widths) == 3 * per_round
    assert [clock.widths.count(width) for width in (4, 5, 8)] == [36, 36, 72]


def test_policies_take_turns_within_a_window(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth of a second; in the first round, when nobody knows how long that is, every eight tokens."""
    clock = FakeClock(monkeypatch, lambda width, _: 5 * width)  # 40 ms for the baseline: two or three in a piece
    clocked(tiny_prepared, (4, 5), tokens=12, rounds=3)
    rounds = torch.tensor(clock.widths).view(3, 36)
    longest = []
    for one in rounds:
        runs = torch.unique_consecutive(one, return_counts=True)
        assert len(runs[0]) > 3, "nobody decodes the whole window in one go"
        longest.append(int(runs[1].max()))
    assert 3 < longest[0] <= 16  # two pieces of one width may meet
    assert max(longest[1:]) <= 4
    assert not torch.equal(rounds[1], rounds[2])


def test_a_model_that_decodes_a_window_at_once_does_so(
    tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are as warm in the caches as when it is served."""
    clock = FakeClock(monkeypatch, lambda width, _: 0.01 * width)
    clocked(tiny_prepared, (4, 5), tokens=12, rounds=3)
    for one in torch.tensor(clock.widths).view(3, 36)[1:]:
        assert len(torch.unique_consecutive(one)) <= 6  # the first piece ends anywhere


def test_drift_within_a_round_hits_all_alike(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is three times as slow at the end of every round: copies of one width keep their share."""
    per_round = 5 * 4 * 12

    def step_ms(width: float, call: int) -> float:
        return 5 * width * (1 + 2 * (call % per_round) / per_round)

    FakeClock(monkeypatch, step_ms)
    shares = clocked(tiny_prepared, (4, 4, 6, 8), windows=4, tokens=12, rounds=9).shares
    assert shares == pytest.approx((0.5, 0.5, 0.75, 1.0), rel=0.02)


def test_dear_tokens_count_as_they_are(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that takes half the time at one token and one and a half at the next earns no more than one at 1."""
    env = replace(tiny_prepared.env, max_new_tokens=6)

    class Fickle:
        """3 bits at the even tokens, 6 at the odd ones."""

        name = "fickle"

        def __call__(self, signals: Tensor) -> Decision:
            schema = SignalSchema(tiny_prepared.model.num_units, tiny_prepared.model.bit_widths)
            width = torch.where(schema.last_widths(signals)[:, :1] == 3, 6, 3)
            return Decision(width.expand(-1, schema.num_units).long())

    FakeClock(monkeypatch, lambda width, _: {8.0: 1.0, 3.0: 0.5, 6.0: 1.5}[width])
    measured = measured_time_shares(
        tiny_prepared.model, tiny_prepared.profile, tiny_prepared.windows.test[:1], env, [(Fickle(), 1.0)], rounds=1
    )
    assert measured.shares == pytest.approx((1.0,))
    assert math.isnan(measured.error), "one round says nothing of another"


def test_a_stall_is_not_a_token(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step in eleven stalls, seldom the same one twice: the medians do not know of it."""
    FakeClock(monkeypatch, lambda width, call: 1000.0 if call % 11 == 0 else 200 * width)
    assert clocked(tiny_prepared, (4,), rounds=9).shares == pytest.approx((0.5,))


@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_the_error_is_that_of_the_shares(noise: float) -> None:
    """Copies of one allocation are as far apart as the error says."""
    generator = np.random.default_rng(0)
    shares, errors = [], []
    for _ in range(60):
        # A round is fast or slow for a policy as a whole.
        turns = np.exp(noise * generator.standard_normal((4, 9, 1))) * np.ones((4, 9, 24))
        found = wall_clock._shares(turns.tolist())
        shares += found.shares
        errors.append(found.error)
    assert float(np.sqrt(np.mean(np.square(errors)))) == pytest.approx(float(np.std(shares)), rel=0.25)


def test_a_quiet_machine_is_asked_five_times(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a noisy one as often as it takes."""
    generator = np.random.default_rng(0)
    FakeClock(monkeypatch)
    assert clocked(tiny_prepared, (4,), rounds=9).num_rounds == 5
    FakeClock(monkeypatch, lambda width, _: width * float(np.exp(0.3 * generator.standard_normal())))
    measured = clocked(tiny_prepared, (4,), rounds=9)
    assert measured.num_rounds == 9
    assert measured.error > 0.01


def test_timing_of_slow_models_is_cut_short(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for seconds_per_look, rounds in ((0.0, 9), (21.0, 5)):
        FakeClock(monkeypatch, lambda width, _: width * float(np.exp(0.3 * generator.standard_normal())))
        looks = itertools.count(0.0, seconds_per_look)
        monkeypatch.setattr(wall_clock, "time", SimpleNamespace(monotonic=looks.__next__))
        assert clocked(tiny_prepared, (4,), tokens=2, rounds=9).num_rounds == rounds


def test_equal_policies_take_equal_times_by_the_real_clock(tiny_prepared: Prepared) -> None:
    one, other = clocked(tiny_prepared, (4, 4), windows=2, tokens=6, rounds=9).shares
    assert one == pytest.approx(other, rel=0.5)  # however busy the machine is
