"""Policies by the clock: medians, pieces in turns, and the error that is left."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexquant_rl.agents.evaluation import wall_clock
from flexquant_rl.agents.evaluation.wall_clock import ClockedShares, measured_time_shares
from flexquant_rl.agents.policies.drafts import parse_drafts
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.engine.control.decision import Decision, Policy
from flexquant_rl.engine.control.signals import SignalSchema


class FakeClock:
    """Steps take as many milliseconds as `step_ms` says of their mean width and of how many steps were timed before.

    The steps that only say how long pieces are come first and are not counted.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        step_ms: Callable[[float, int], float] = lambda width, _: width,
        *,
        tokens: int = 4,
    ) -> None:
        self.widths: list[float] = []
        self._step_ms = step_ms
        self._rehearsed = min(wall_clock._REHEARSED_TOKENS, tokens)
        monkeypatch.setattr(wall_clock, "clock_ms", self)

    def __call__(self, run: MethodType, device: torch.device) -> float:
        step = run()
        if self._rehearsed:
            self._rehearsed -= 1
            return self._step_ms(8.0, 0)
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

    clock = FakeClock(monkeypatch, step_ms, tokens=6)
    measured = clocked(tiny_prepared, (4, 8, 5), windows=2, tokens=6, rounds=3)
    assert measured.shares == pytest.approx((4 / 16, 1.0, 10 / 16))
    assert measured.num_rounds == 3
    assert len(clock.widths) == 3 * per_round
    assert [clock.widths.count(width) for width in (4, 5, 8)] == [36, 36, 72]


def test_policies_take_turns_within_a_window(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth of a second, by the steps of the largest width."""
    clock = FakeClock(monkeypatch, lambda width, _: 5 * width, tokens=12)  # two in a piece
    clocked(tiny_prepared, (4, 5), tokens=12, rounds=3)
    rounds = torch.tensor(clock.widths).view(3, 36)
    for one in rounds:
        _, counts = torch.unique_consecutive(one, return_counts=True)
        assert 1 <= int(counts.max()) <= 4  # two pieces of one width may meet
    assert not torch.equal(rounds[0], rounds[1])


def test_a_model_that_decodes_a_window_at_once_does_so(
    tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are as warm in the caches as when it is served."""
    clock = FakeClock(monkeypatch, lambda width, _: 0.01 * width, tokens=12)
    clocked(tiny_prepared, (4, 5), tokens=12, rounds=3)
    for one in torch.tensor(clock.widths).view(3, 36):
        assert len(torch.unique_consecutive(one)) == 3


def test_drift_within_a_round_hits_all_alike(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is three times as slow at the end of every round: copies of one width keep their share."""
    per_round = 5 * 4 * 12

    def step_ms(width: float, call: int) -> float:
        return 5 * width * (1 + 2 * (call % per_round) / per_round)

    FakeClock(monkeypatch, step_ms, tokens=12)
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

    FakeClock(monkeypatch, lambda width, _: {8.0: 1.0, 3.0: 0.5, 6.0: 1.5}[width], tokens=6)
    measured = measured_time_shares(
        tiny_prepared.model, tiny_prepared.profile, tiny_prepared.windows.test[:1], env, [(Fickle(), 1.0)], rounds=1
    )
    assert measured.shares == pytest.approx((1.0,))
    assert math.isnan(measured.errors[0]), "one round says nothing of another"


def test_a_stall_is_not_a_token(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step in eleven stalls, seldom the same one twice: the medians do not know of it."""
    FakeClock(monkeypatch, lambda width, call: 1e5 if call % 11 == 0 else 200 * width)
    assert clocked(tiny_prepared, (4,), rounds=9).shares == pytest.approx((0.5,))


@pytest.mark.parametrize("rounds", [5, 9])
@pytest.mark.parametrize(("noise", "token_noise"), [(0.02, 0.0), (0.1, 0.1), (0.0, 0.2)])
def test_copies_are_as_far_apart_as_the_error_says(rounds: int, noise: float, token_noise: float) -> None:
    """Whatever the baseline does: noise of rounds, of single steps, and drift that all have in common."""
    generator = np.random.default_rng(0)
    apart, errors = [], []
    for _ in range(200):
        drift = np.exp(0.3 * generator.standard_normal((1, rounds, 1)))
        own = noise * generator.standard_normal((6, rounds, 1))
        own = own + token_noise * generator.standard_normal((6, rounds, 48))
        found = wall_clock._shares((drift * np.exp(own)).tolist())
        apart.append((found.shares[0] - found.shares[1]) / math.sqrt(2))
        errors += found.errors
    assert float(np.sqrt(np.mean(np.square(errors)))) == pytest.approx(float(np.std(apart)), rel=0.35)


def test_stalls_do_not_make_shares_uncertain() -> None:
    """Medians do not know of them, so the error must not either: drawn with replacement it was four times too large."""
    generator = np.random.default_rng(0)
    apart, errors = [], []
    for _ in range(60):
        turns = np.exp(0.03 * generator.standard_normal((8, 6, 96)))
        turns *= np.where(generator.random((8, 6, 96)) < 0.05, 4, 1)
        found = wall_clock._shares(turns.tolist())
        apart.append((found.shares[0] - found.shares[1]) / math.sqrt(2))
        errors += found.errors
    assert 0.8 < float(np.sqrt(np.mean(np.square(errors))) / np.std(apart)) < 3


def test_one_rough_policy_is_rough_alone() -> None:
    generator = np.random.default_rng(0)
    turns = np.exp(0.001 * generator.standard_normal((6, 9, 1))) * np.ones((6, 9, 24))
    turns[3] *= np.exp(0.5 * generator.standard_normal((9, 1)))
    errors = wall_clock._shares(turns.tolist()).errors
    assert errors[2] > 0.05
    assert statistics.median(errors) < 0.001


def test_a_quiet_machine_is_asked_five_times(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a noisy one as often as it takes."""
    generator = np.random.default_rng(0)
    FakeClock(monkeypatch)
    assert clocked(tiny_prepared, (4,), rounds=9).num_rounds == 5
    FakeClock(monkeypatch, lambda width, _: width * float(np.exp(0.3 * generator.standard_normal())))
    measured = clocked(tiny_prepared, (4,), rounds=9)
    assert measured.num_rounds == 9
    assert measured.errors[0] > 0.01


def test_timing_of_slow_models_is_cut_short(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for seconds_per_look, rounds in ((0.0, 9), (21.0, 5)):
        FakeClock(monkeypatch, lambda width, _: width * float(np.exp(0.3 * generator.standard_normal())))
        looks = itertools.count(0.0, seconds_per_look)
        monkeypatch.setattr(wall_clock, "time", SimpleNamespace(monotonic=looks.__next__))
        assert clocked(tiny_prepared, (4,), tokens=2, rounds=9).num_rounds == rounds


@pytest.mark.parametrize("name", ["draft:3,length=3", "draft:3,length=2,verify=6,ngrams=0"])
def test_rounds_of_drafts_are_the_same_in_pieces(
    tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of one token or of the whole window: as many rounds, and a time per token that is the same."""
    env = replace(tiny_prepared.env, max_new_tokens=12)
    drafts = parse_drafts(name)
    assert drafts is not None
    policy = drafts.bind(policy_context(tiny_prepared))
    timed: dict[float, tuple[int, float]] = {}
    for ms in (0.01, 1000.0):
        calls = itertools.count()

        def clock(run: Callable[[], object], device: torch.device, ms: float = ms, calls: Any = calls) -> float:
            run()
            next(calls)
            return ms

        monkeypatch.setattr(wall_clock, "clock_ms", clock)
        measured = measured_time_shares(
            tiny_prepared.model, tiny_prepared.profile, tiny_prepared.windows.test[:2], env, [(policy, 1.0)], rounds=2
        )
        timed[ms] = next(calls), measured.shares[0]
    assert timed[0.01] == pytest.approx(timed[1000.0])
    assert timed[0.01][1] > 0


def test_decoders_are_closed_when_a_step_fails(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    opened: list[object] = []
    calls = itertools.count()

    def failing(run: Callable[[], object], device: torch.device) -> float:
        run()
        if next(calls) == 20:
            raise RuntimeError("no more")
        return 1.0

    monkeypatch.setattr(wall_clock, "clock_ms", failing)
    decoder_class = type(wall_clock.open_session(tiny_prepared.model, max_length=8))
    close, fork = decoder_class.close, decoder_class.fork

    def forked(self: Any) -> Any:
        opened.append(fork(self))
        return opened[-1]

    monkeypatch.setattr(decoder_class, "fork", forked)
    monkeypatch.setattr(decoder_class, "close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(RuntimeError, match="no more"):
        clocked(tiny_prepared, (4, 5), tokens=12, rounds=3)
    assert opened
    assert {id(one) for one in opened} <= {id(one) for one in closed}


def test_equal_policies_take_equal_times_by_the_real_clock(tiny_prepared: Prepared) -> None:
    one, other = clocked(tiny_prepared, (4, 4), windows=2, tokens=6, rounds=9).shares
    assert one == pytest.approx(other, rel=0.5)  # however busy the machine is
