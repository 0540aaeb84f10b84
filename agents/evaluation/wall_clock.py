"""Policies timed by the clock on the wall, in small pieces and in turns, with the error that is left.

Two copies of one allocation must take the same time. When each decoded whole windows in its turn they were up to a
twentieth apart on a shared machine, whose speed moves within seconds, and a hundredth of the time is worth a tenth of
the KL. So policies take turns every tenth of a second: what the machine does meanwhile hits all of them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexquant_rl.agents.evaluation.resampling import Array
from flexquant_rl.engine.control.controller import Controller, DraftController, make_controller
from flexquant_rl.engine.control.cost import clock_ms
from flexquant_rl.engine.control.decision import Policy, StaticAllocation
from flexquant_rl.engine.control.drafts import DraftPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.rounds import Rounds, Settled
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.decoding.choice import open_session
from flexquant_rl.engine.decoding.next_token import Replay, Sampler
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.config import EnvConfig

_MAX_ROUNDS = 41
_MIN_ROUNDS = 5
_TIMING_S_EACH = 1.0
# Of a share: with this much the KL of static in equal time is known to a hundredth.
_SMALL_ERROR = 0.001
_PIECE_MS = 100.0
# The steps that say how long one takes.
_REHEARSED_TOKENS = 8
_NUM_RESAMPLES = 100


@dataclass(frozen=True)
class ClockedShares:
    """Wall-clock time of policies as a share of that at the largest width.

    Attributes:
        shares: Of every policy.
        errors: Standard error of each share over rounds, without that of the largest width, which all have in common
            and which no comparison of two policies has in it; NaN of a single round. Few rounds may agree by chance,
            so none is less than the median of all.
        num_rounds: Turns that every policy had.
    """

    shares: tuple[float, ...]
    errors: tuple[float, ...]
    num_rounds: int


def measured_time_shares(
    model: NestedCausalLM,
    profile: Profile,
    windows: Tensor,
    config: EnvConfig,
    policies: Sequence[tuple[Policy | DraftPolicy, float]],
    *,
    rounds: int = _MAX_ROUNDS,
    num_threads: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> ClockedShares:
    """Wall-clock time of batch-1 decoding as a share of that at the largest width, signals and policy included.

    In every round each policy and the baseline decode the same windows. They do it in pieces of a tenth of a second,
    piece after piece in a new random order: drift of the machine hits all alike. A model that decodes a whole window in
    less does so: its weights are as warm in the caches as when a policy decodes alone. Where pieces begin is drawn in
    every round. Of each token the median over rounds counts, so that a stall does not; the medians are added up over
    all tokens, so that dear tokens count as they are.

    A policy of drafts has no say in a text that is given: it continues the windows' prompts greedily, for as many
    tokens or to the end of its text, and its time is per token. Its steps are the same in every round, so medians are
    taken alike; of a policy that learns on the way the median of whole turns counts.

    Args:
        model: The model.
        profile: Profile that the signals are made with.
        windows: `[n, window_tokens]` int64.
        config: Shape of the episodes.
        policies: Policies, each with its dial.
        rounds: Turns of every policy at most. After the fifth no new one begins once half of the shares are known to
            a thousandth, or each policy has had a second on average.
        num_threads: Threads of a step, as for `open_session`.
        progress: Wraps the rounds.
    """
    baseline = StaticAllocation("baseline", profile.cost.full_width())
    contestants: list[tuple[Policy | DraftPolicy, float]] = [(baseline, 1.0), *policies]
    texts = _TimedTexts(model, profile, windows, config, contestants, num_threads)
    turns: list[list[list[float]]] = [[] for _ in contestants]
    ends_at = time.monotonic() + _TIMING_S_EACH * len(contestants)
    try:
        for done in progress(range(1, rounds + 1)):
            for own, times_ms in zip(turns, texts.round_ms(), strict=True):
                own.append(times_ms)
            if done >= _MIN_ROUNDS and (time.monotonic() > ends_at or _are_known(turns)):
                break
    finally:
        texts.close()
    return _shares(turns)


def _are_known(turns: Sequence[Sequence[Sequence[float]]]) -> bool:
    """Whether half of the shares are known as well as it takes: one policy that is rough keeps nobody waiting."""
    return statistics.median(_shares(turns).errors) <= _SMALL_ERROR


def _shares(turns: Sequence[Sequence[Sequence[float]]]) -> ClockedShares:
    """Of the times of every contestant in every round, the baseline first."""
    num_rounds = len(turns[0])
    # Of a contestant whose steps differ from round to round only whole turns can be compared. [R, P] each.
    times = [
        np.array(own) if len({len(turn) for turn in own}) == 1 else np.array([[sum(turn)] for turn in own])
        for own in turns
    ]

    def usual_ms(chosen: NDArray[np.int64]) -> Array:
        return np.array([np.median(own[chosen], axis=0).sum() for own in times])

    full_ms, *own_ms = usual_ms(np.arange(num_rounds)).tolist()
    shares = np.array(own_ms) / full_ms
    errors = np.full(len(shares), math.nan)
    if num_rounds > 1:
        drawn = _parts_of(num_rounds)
        logs = np.log(np.stack([usual_ms(chosen) for chosen in drawn]))
        # What all contestants have in common is the machine's: their median, which has a part of each one's own in it.
        common = np.median(logs, axis=1, keepdims=True)
        size = drawn.shape[1]
        scale = size / (num_rounds - size) * len(times) / (len(times) - 1)
        own = (logs - common).std(0) * math.sqrt(scale)
        errors = shares * np.maximum(own, np.median(own))[1:]
    return ClockedShares(tuple(shares.tolist()), tuple(errors.tolist()), num_rounds)


def _parts_of(num_rounds: int) -> NDArray[np.int64]:
    """Rounds that stand for all of them, a little more than half in each part (subsampling, Politis and Romano 1994).

    Rounds drawn with replacement take a stall several times, and the median believes it: of six rounds they called
    shares .009 uncertain that were .001 apart.
    """
    size = min(num_rounds // 2 + 1, num_rounds - 1)
    if math.comb(num_rounds, size) <= _NUM_RESAMPLES:
        return np.array(list(itertools.combinations(range(num_rounds), size)))
    generator = np.random.default_rng(0)
    return np.stack([generator.choice(num_rounds, size, replace=False) for _ in range(_NUM_RESAMPLES)])


class _TimedTexts:
    """Windows whose prompts are read once, and decoded by all contestants in turns.

    Every contestant holds the keys and values of one window at a time.

    Args:
        model: The model.
        profile: Profile that the signals are made with.
        windows: `[n, window_tokens]` int64.
        config: Shape of the episodes.
        contestants: Policies, each with its dial; a few steps of the first one say how many make a piece.
        num_threads: Threads of a step, as for `open_session`.
    """

    def __init__(
        self,
        model: NestedCausalLM,
        profile: Profile,
        windows: Tensor,
        config: EnvConfig,
        contestants: Sequence[tuple[Policy | DraftPolicy, float]],
        num_threads: int | None,
    ) -> None:
        self._model, self._windows = model, windows
        self._first, self._num_tokens = config.prompt_tokens, config.max_new_tokens
        self._contestants = [(make_controller(model, policy, profile), dial) for policy, dial in contestants]
        self._generator = torch.Generator().manual_seed(0)
        length = config.window_tokens - 1
        self._parents = [open_session(model, max_length=length, num_threads=num_threads) for _ in windows]
        self._prompts = [
            parent.prefill(window[None, : self._first]) for parent, window in zip(self._parents, windows, strict=True)
        ]
        self._piece_tokens = max(1, round(_PIECE_MS / max(self._rehearsed_ms(), 1e-6)))

    def round_ms(self) -> list[list[float]]:
        """Times of the steps of every contestant on all windows."""
        times_ms: list[list[float]] = [[] for _ in self._contestants]
        for index in range(len(self._windows)):
            with ExitStack() as opened:
                plays = [self._play(index, controller, dial) for controller, dial in self._contestants]
                for play in plays:
                    opened.enter_context(closing(play.runner.decoder))
                for end in self._ends():
                    for which in torch.randperm(len(plays), generator=self._generator).tolist():
                        plays[which].play(end)
                for own, play in zip(times_ms, plays, strict=True):
                    own += play.times_ms
        return times_ms

    def close(self) -> None:
        """Frees the decoders."""
        for parent in self._parents:
            parent.close()

    def _rehearsed_ms(self) -> float:
        """How long a step of the first contestant takes."""
        play = self._play(0, *self._contestants[0])
        with closing(play.runner.decoder):
            play.play(min(_REHEARSED_TOKENS, self._num_tokens))
        return statistics.median(play.times_ms)

    def _ends(self) -> list[int]:
        """Where the pieces of a window end, the first anywhere in the length of a piece; a short window is one."""
        if self._piece_tokens >= self._num_tokens:
            return [self._num_tokens]
        first = int(torch.randint(1, self._piece_tokens + 1, (), generator=self._generator))
        return [*range(first, self._num_tokens, self._piece_tokens), self._num_tokens]

    def _play(self, index: int, controller: Controller, dial: float) -> _Play:
        decoder, prompt, window = self._parents[index].fork(), self._prompts[index], self._windows[index]
        if isinstance(controller, DraftController):
            runner = PolicyRunner(decoder, controller)
            runner.begin(prompt, torch.ones(1))
            return _DraftedPlay(runner, self._model, self._num_tokens, window[: self._first], controller)
        runner = PolicyRunner(decoder, controller, Replay(window[None, self._first :]))
        runner.begin(prompt, torch.tensor([dial]))
        return _Play(runner, self._model, self._num_tokens)


class _Play:
    """One window under one policy, behind a prompt that its decoder holds.

    Attributes:
        runner: Holds the row.
    """

    def __init__(self, runner: PolicyRunner, model: NestedCausalLM, num_tokens: int) -> None:
        self.runner = runner
        self._model, self._num_tokens = model, num_tokens
        self._done = 0
        self._times_ms: list[float] = []

    @property
    def times_ms(self) -> list[float]:
        """Wall clock of every step so far."""
        return self._times_ms

    def play(self, end: int) -> None:
        """Decodes up to a token."""
        while self._done < end:
            self._times_ms.append(clock_ms(self.runner.step, self._model.device))
            self._done += 1


class _DraftedPlay(_Play):
    """A greedy text by rounds of drafts, which may end early."""

    def __init__(
        self,
        runner: PolicyRunner,
        model: NestedCausalLM,
        num_tokens: int,
        prompt_ids: Tensor,
        controller: DraftController,
    ) -> None:
        super().__init__(runner, model, num_tokens)
        self._eos = tuple(model.eos_token_ids)
        self._rounds = Rounds(runner.decoder, controller, Sampler(1))
        self._rounds.begin(0, prompt_ids.tolist(), int(runner.upcoming_token_ids), eos_token_ids=self._eos)
        self._settled: Settled | None = None
        self._has_ended = False

    @property
    def times_ms(self) -> list[float]:
        """Wall clock of every round so far, as if the text had all its tokens."""
        return [ms * self._num_tokens / self._done for ms in self._times_ms]

    def play(self, end: int) -> None:
        """Goes on to a token, or to the end of the text."""
        while self._done < end and not self._has_ended:
            self._times_ms.append(clock_ms(self._round, self._model.device))
            if self._settled is not None:
                self._done += len(self._settled.token_ids)
                self._has_ended = bool(set(self._settled.token_ids) & set(self._eos))

    def _round(self) -> None:
        self._settled = self._rounds.step(0, self._num_tokens - self._done)
