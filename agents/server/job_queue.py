"""The queue in front of the one engine: who runs, who waits, who is turned away, and how it all ends.

One thread takes a token of each running job in turn. So none starves, a job that is cancelled frees its slot before the
next token, and nothing but this thread asks the engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from flexquant_rl.agents.server.errors import ApiError
from flexquant_rl.agents.server.mean_width import MeanWidth
from flexquant_rl.agents.server.metrics import Metrics, Outcome
from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.control.drafts import DraftPolicy
from flexquant_rl.engine.control.log_probs import TokenLogProbs
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.serving import Engine

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class End:
    """Nothing more comes of a job."""

    outcome: Outcome


Event = TokenLogProbs | GeneratedToken | End


@dataclass(eq=False)
class Job:
    """One text to continue, or to judge, or both.

    Attributes:
        request: What to continue; without new tokens it is judged alone.
        num_new_tokens: Tokens to generate at most, 0 for none.
        policy: In place of the engine's own.
        judged: The prompt's tokens are judged first, naming so many likeliest ones; None leaves that out.
        deliver: Takes what comes of it, in the queue's thread; must not wait.
    """

    request: Request
    num_new_tokens: int
    policy: Policy | DraftPolicy | None
    judged: int | None
    deliver: Callable[[Event], None] = field(default=lambda event: None)
    _seen_at: float = field(default_factory=time.monotonic)
    _num_tokens: int = 0
    _is_read: bool = False

    def events(self, engine: Engine) -> Generator[Event]:
        """Runs it on an engine, a token at a time."""
        if self.judged is not None:
            request = self.request
            yield from engine.judge_text(
                request.prompt_ids, kl_weight=request.kl_weight, num_likeliest=self.judged, policy=self.policy
            )
        if self.num_new_tokens:
            yield from engine.generate(self.request, self.policy)


class JobQueue:
    """Runs jobs on an engine.

    Args:
        engine: The engine; it is closed in the end.
        slots: Jobs that run at a time; a captured graph has one.
        size: Jobs that may wait.
    """

    def __init__(self, engine: Engine, *, slots: int, size: int) -> None:
        self._engine = engine
        self._slots = 1 if engine.is_graph else slots
        self.mean_width = MeanWidth(engine.model)
        self._size = size
        self._waiting: deque[Job] = deque()
        self._num_promised = 0
        self._running: dict[Job, Generator[Event]] = {}
        self._changed = threading.Condition()
        self._is_draining = self._is_stopped = False
        self.metrics = Metrics(lambda: len(self._waiting), lambda: len(self._running))
        self._thread = threading.Thread(target=self._work, name="fq-serve-engine", daemon=True)
        self._thread.start()

    @property
    def is_draining(self) -> bool:
        """Whether no more jobs are taken."""
        return self._is_draining

    @property
    def capacity(self) -> int:
        """Jobs that run and wait at most."""
        return self._slots + self._size

    @contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Keeps places for some jobs while they are made; the block submits them.

        Raises:
            ApiError: As `submit`.
        """
        with self._changed:
            self._check_room(count)
            self._num_promised += count
        try:
            yield
        finally:
            with self._changed:
                self._num_promised -= count

    def _check_room(self, count: int) -> None:
        if self._is_draining:
            raise ApiError(503, "the server is stopping; ask again when it is back", "stopping")
        num_running, num_waiting = len(self._running), len(self._waiting) + self._num_promised
        if num_running + num_waiting + count > self.capacity:
            raise ApiError(
                429,
                f"{num_running} requests run and {num_waiting} wait, and {self._size} may; try again",
                "queue_full",
            )

    def submit(self, jobs: Sequence[Job], *, promised: int = 0) -> None:
        """Takes all of some jobs, or none of them.

        Args:
            jobs: The jobs.
            promised: For how many of them the caller's `room` keeps places.

        Raises:
            ApiError: 503 if the queue takes none any more, 429 if it is full.
        """
        with self._changed:
            self._check_room(len(jobs) - promised)
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs, of which nobody wants to hear any more, before their next token; ended ones are left alone."""
        with self._changed:
            for job in jobs:
                job.request.cancel.set()
                if job in self._waiting:
                    self._waiting.remove(job)
                    self.metrics.count_end("disconnected")
            self._changed.notify_all()

    def drain(self) -> None:
        """Takes no more jobs from now on."""
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()

    def stop(self, timeout_s: float) -> None:
        """Takes no more jobs, lets those that are there end for so long, ends the others, and closes the engine."""
        self.drain()
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or not (self._running or self._waiting), timeout_s)
            self._is_stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._engine.close()

    def stop_now(self) -> None:
        """Ends the wait of `stop`."""
        with self._changed:
            self._is_draining = self._is_stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        """The thread: fills the slots, then takes one token of each job."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopped or self._running or self._waiting)
                if self._is_stopped:
                    break
                while self._waiting and len(self._running) < self._slots:
                    job = self._waiting.popleft()
                    self._running[job] = job.events(self._engine)
            for job in list(self._running):
                self._advance(job)
        while self._running:
            self._end(next(iter(self._running)), "stopped")
        with self._changed:
            left, self._waiting = list(self._waiting), deque()
        for job in left:
            self.metrics.count_end("stopped")
            job.deliver(End("stopped"))

    def _advance(self, job: Job) -> None:
        is_cancelled = job.request.cancel.is_set
        try:
            event = None if is_cancelled() else next(self._running[job], None)
            if event is not None:
                self._count(job, event)
                job.deliver(event)
        except Exception:  # whatever it is, the thread goes on with the others
            _LOG.exception("a request failed")
            self._end(job, "failed")
            return
        if is_cancelled():  # perhaps during this token, which then was the last one
            self._end(job, "disconnected")
        elif event is None:
            if job.judged is not None:
                self._count_prompt(job)  # one token is judged by nothing, and was read all the same
            self._end(job, "done")
        elif isinstance(event, GeneratedToken) and event.finish_reason is not None:
            self._end(job, "done")

    def _end(self, job: Job, outcome: Outcome) -> None:
        """Frees the slot of a job, then says so."""
        self._running[job].close()
        with self._changed:
            del self._running[job]
            self._changed.notify_all()
        self.metrics.count_end(outcome)
        job.deliver(End(outcome))

    def _count(self, job: Job, event: Event) -> None:
        metrics, now = self.metrics, time.monotonic()
        self._count_prompt(job)
        if not isinstance(event, GeneratedToken):
            return
        if job._num_tokens:
            metrics.between_tokens_s.observe(now - job._seen_at)
        else:
            metrics.first_token_s.observe(now - job._seen_at)
        metrics.tokens.labels("generated").inc()
        metrics.bit_width.observe(self.mean_width(event.bit_widths))
        if event.draft_counts is not None:
            metrics.count_drafts(event.draft_counts)
        job._seen_at = now
        job._num_tokens += 1

    def _count_prompt(self, job: Job) -> None:
        """Counts a prompt that was read, once: one that is judged and continued counts as one."""
        if not job._is_read:
            job._is_read = True
            self.metrics.tokens.labels("prompt").inc(len(job.request.prompt_ids))
