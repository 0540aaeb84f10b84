"""Times whole decode steps on a machine whose speed changes by more than a width does."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import Controller, StaticController, make_controller
from flexquant_rl.engine.control.cost import CostTable, clock_ms, measured_cost
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import unmeasured_profile
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.decoding.choice import open_session
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.decoding.lean import LeanSession
from flexquant_rl.engine.decoding.next_token import Replay
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM

MAX_PAIRS = 25
"""Most steps that a session must have room for."""
_MIN_PAIRS = 3
_VECTOR_MS = 25.0
"""Time that a width vector is worth: short steps are repeated more often."""
_NUM_BASELINES = 9
_CONTROLLER_ROUNDS = 9
ROUND_STEPS = 7
"""Steps of a turn, of which the median counts."""


def measured_table(
    model: NestedCausalLM, windows: Tensor, *, num_steps: int = 300, num_threads: int | None = None
) -> CostTable:
    """Latencies of steps on this device, and of a controller beside them.

    Args:
        model: The model.
        windows: `[n, T]` int64, text whose first window is read before the steps.
        num_steps: Whole steps to time, as for `measured_cost`.
        num_threads: Threads of the steps, as for `open_session`.

    Raises:
        InputError: As `measured_cost`.
    """
    session, prompt = halfway(model, windows, num_threads)
    timer = StepTimer(session, windows[0, :1])
    cost = measured_cost(model, timer, num_steps=num_steps, num_threads=num_threads)
    return replace(cost, controller_ms=measured_controller_ms(session, prompt, windows[0, :1]))


def interleaved_ms(turns: Sequence[Callable[[], float]], *, num_rounds: int = 15, seed: int = 0) -> Tensor:
    """Milliseconds of several ways to make a step, in turns.

    In every round each has a turn, in random order: what slows the machine down for a while slows them all down.

    Args:
        turns: Each makes a few steps and gives the milliseconds of the median one, as `step_turn`.
        num_rounds: Rounds.
        seed: Seed of the order.

    Returns:
        `[n, rounds]` float64.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(len(turns), num_rounds, dtype=torch.float64)
    for number in range(num_rounds):
        for place in torch.randperm(len(turns), generator=generator).tolist():
            found[place, number] = turns[place]()
    return found


def step_turn(session: DecodeSession | LeanSession, token_ids: Tensor, bit_width: int) -> Callable[[], float]:
    """A few steps with every unit at the same width, for `interleaved_ms`.

    Args:
        session: Holds a prompt, with room for `MAX_PAIRS` more tokens; it is forked, not stepped.
        token_ids: `[1]` int64, what every step reads.
        bit_width: The width.
    """
    widths = torch.full((session.model.num_units,), bit_width)

    def turn() -> float:
        runner = _timed_runner(session, token_ids, widths)
        return statistics.median(_pass_ms(runner) for _ in range(ROUND_STEPS))

    return turn


def halfway(
    model: NestedCausalLM, windows: Tensor, num_threads: int | None
) -> tuple[DecodeSession | LeanSession, StepOutput]:
    """A session halfway through an episode, so that attention costs what it costs on average, and its last output."""
    num_held = max(1, min(windows.shape[1] // 2, model.max_context - MAX_PAIRS))
    session = open_session(model, max_length=num_held + MAX_PAIRS, num_threads=num_threads)
    return session, session.prefill(windows[:1, :num_held])


class StepTimer:
    """Times steps of a session, each beside one at the largest width a moment later.

    A time is the usual time of the largest width, times the ratio of the two medians: what slows the machine down for a
    while slows down both.

    Args:
        session: Holds a prompt, with room for `MAX_PAIRS` more tokens; it is forked, not stepped.
        token_ids: `[1]` int64, what every step reads.
    """

    def __init__(self, session: DecodeSession | LeanSession, token_ids: Tensor) -> None:
        """Finds out how long a step usually takes."""
        model = session.model
        self._session = session
        self._token_ids = token_ids
        self._largest = torch.full((model.num_units,), max(model.bit_widths))
        self._num_pairs = _MIN_PAIRS
        usual = [self._medians_ms(self._largest) for _ in range(_NUM_BASELINES)]
        self._usual_ms = statistics.median(ms for pair in usual for ms in pair)
        self._num_pairs = min(max(int(_VECTOR_MS / (2 * self._usual_ms)), _MIN_PAIRS), MAX_PAIRS)

    def __call__(self, bit_widths: Tensor) -> float:
        """Milliseconds of a step at `[U]` widths."""
        own_ms, largest_ms = self._medians_ms(bit_widths)
        return self._usual_ms * own_ms / largest_ms

    def _medians_ms(self, bit_widths: Tensor) -> tuple[float, float]:
        """Medians of steps at the given and at the largest widths, taking turns."""
        runners = [_timed_runner(self._session, self._token_ids, widths) for widths in (bit_widths, self._largest)]
        times = [[_pass_ms(runner) for runner in runners] for _ in range(self._num_pairs)]
        own, largest = zip(*times, strict=True)
        return statistics.median(own), statistics.median(largest)


def _timed_runner(session: DecodeSession | LeanSession, token_ids: Tensor, bit_widths: Tensor) -> PolicyRunner:
    """The loop that serves, over a copy of a session; it times the passes alone."""
    controller = StaticController(StaticAllocation("timed", bit_widths))
    text = Replay(token_ids.expand(1, MAX_PAIRS))
    return PolicyRunner(session.fork(), controller, text, timed=True, first_token_ids=token_ids)


def _pass_ms(runner: PolicyRunner) -> float:
    pass_ms = runner.step().pass_ms
    assert pass_ms is not None, "the runner was told to time its passes"
    return pass_ms


def measured_controller_ms(session: DecodeSession | LeanSession, prompt: StepOutput, token_ids: Tensor) -> float:
    """Milliseconds that signals and a learned policy add to a step, as they are served.

    That is the part of a step that is not its pass, less the same part where widths are fixed. Neither what a network
    has learned nor what a profile says changes how long this takes: the weights are random, the sensitivities 0.

    Args:
        session: Holds a prompt, with room for `MAX_PAIRS` more tokens; it is forked, not stepped.
        prompt: What the prompt's last token put out.
        token_ids: `[1]` int64, what every step reads.
    """
    model = session.model
    profile = unmeasured_profile(model)
    schema = SignalSchema(model.num_units, model.bit_widths)
    policy = LearnedPolicy(PrecisionNet(schema), PolicyCard.of_model(model, {}))
    largest = StaticAllocation("timed", profile.cost.full_width())
    text = token_ids.expand(1, MAX_PAIRS)

    def outside_ms(controller: Controller) -> list[float]:
        runner = PolicyRunner(session.fork(), controller, Replay(text), timed=True)
        runner.begin(prompt, torch.ones(1, dtype=torch.float32))
        return [_outside_pass_ms(runner, model.device) for _ in range(MAX_PAIRS - 1)]

    controllers = [make_controller(model, chosen, profile) for chosen in (policy, largest)]
    turns = [[outside_ms(controller) for controller in controllers] for _ in range(_CONTROLLER_ROUNDS)]
    own, fixed = (statistics.median(ms for turn in turns for ms in turn[which]) for which in range(2))
    return max(own - fixed, 0.0)


def _outside_pass_ms(runner: PolicyRunner, device: torch.device) -> float:
    """Milliseconds of a step without its pass."""
    passes: list[float] = []
    whole_ms = clock_ms(lambda: passes.append(_pass_ms(runner)), device)
    return whole_ms - passes[0]
