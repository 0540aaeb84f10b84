"""Times of steps are ratios to the largest width beside them, on a clock that the tests turn themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexquant_rl.engine.control import runner, step_timer
from flexquant_rl.engine.control.controller import StaticController
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.step_timer import (
    MAX_PAIRS,
    StepTimer,
    interleaved_ms,
    measured_controller_ms,
    step_turn,
)
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM

PROMPT = torch.tensor([[3, 5, 7]])


class Clock:
    """A step takes its mean width in ms, times how slow the machine is; every seventh one stalls."""

    def __init__(self) -> None:
        self.slowness = 1.0
        self.calls = 0
        self.widths = torch.zeros(0)
        self.token_ids: list[int] = []

    def __call__(self, run: Callable[[], object], device: torch.device) -> float:
        del device
        self.calls += 1
        run()
        stall = 50.0 if self.calls % 7 == 0 else 0.0
        return float(self.widths.float().mean()) * self.slowness + stall


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, step = Clock(), DecodeSession.step

    def noted(session: DecodeSession, token_ids: Tensor, bit_widths: Tensor, **options: Tensor) -> StepOutput:
        clock.widths = bit_widths
        clock.token_ids += token_ids.tolist()
        return step(session, token_ids, bit_widths, **options)

    monkeypatch.setattr(runner, "clock_ms", clock)
    monkeypatch.setattr(DecodeSession, "step", noted)
    return clock


@pytest.fixture
def session(nested_model: NestedCausalLM) -> DecodeSession:
    session = DecodeSession(nested_model, max_length=PROMPT.shape[1] + MAX_PAIRS)
    session.prefill(PROMPT)
    return session


def test_what_slows_the_machine_down_cancels(clock: Clock, session: DecodeSession) -> None:
    timer = StepTimer(session, PROMPT[0, :1])
    widths = torch.full((session.model.num_units,), 4)
    assert timer(widths) == pytest.approx(4.0)
    clock.slowness = 3.0
    assert timer(widths) == pytest.approx(4.0)
    assert timer(torch.full_like(widths, 8)) == pytest.approx(8.0)
    assert set(clock.token_ids) == {int(PROMPT[0, 0])}, "every step reads the token that was given"


def test_short_steps_are_repeated_more_often(clock: Clock, session: DecodeSession) -> None:
    counts = []
    for slowness in (1e-3, 0.1, 10.0):
        clock.slowness = slowness
        timer = StepTimer(session, PROMPT[0, :1])
        before = clock.calls
        timer(torch.full((session.model.num_units,), 4))
        counts.append((clock.calls - before) // 2)
    assert counts == [MAX_PAIRS, 15, 3]


def test_the_session_stays_as_it_was(session: DecodeSession) -> None:
    StepTimer(session, PROMPT[0, :1])(torch.full((session.model.num_units,), 4))
    assert session.lengths.tolist() == [PROMPT.shape[1]]


def test_a_controller_takes_what_is_not_the_pass(
    clock: Clock, session: DecodeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals and policy, less what the loop takes with fixed widths too; passes stall, and widths differ."""
    seen: list[tuple[float, bool]] = []
    original = step_timer._pass_ms

    def noted(own: PolicyRunner) -> float:
        seen.append((original(own), isinstance(own.controller, StaticController)))
        return seen[-1][0]

    def whole_step(run: Callable[[], object], device: torch.device) -> float:
        run()
        pass_ms, is_fixed = seen[-1]
        return pass_ms + (0.01 if is_fixed else 0.25)

    monkeypatch.setattr(step_timer, "_pass_ms", noted)
    monkeypatch.setattr(step_timer, "clock_ms", whole_step)
    prompt = session.prefill(PROMPT)
    assert measured_controller_ms(session, prompt, PROMPT[0, :1]) == pytest.approx(0.24)
    assert {is_fixed for _, is_fixed in seen} == {True, False}


def test_a_controller_takes_some_time_by_the_real_clock(session: DecodeSession) -> None:
    prompt = session.prefill(PROMPT)
    assert 0 < measured_controller_ms(session, prompt, PROMPT[0, :1]) < 50
    assert session.lengths.tolist() == [PROMPT.shape[1]]


def test_models_take_turns(clock: Clock, session: DecodeSession, half_unit_model: NestedCausalLM) -> None:
    other = DecodeSession(half_unit_model, max_length=PROMPT.shape[1] + MAX_PAIRS)
    other.prefill(PROMPT)
    clock.token_ids.clear()
    turns = [step_turn(one, torch.tensor([9]), width) for one in (session, other) for width in (3, 8)]
    times = interleaved_ms([*turns, lambda: 2.5], num_rounds=5)
    assert times.tolist() == [[3.0] * 5, [8.0] * 5, [3.0] * 5, [8.0] * 5, [2.5] * 5], "stalls are outvoted"
    assert set(clock.token_ids) == {9}
    assert session.lengths.tolist() == other.lengths.tolist() == [PROMPT.shape[1]]
