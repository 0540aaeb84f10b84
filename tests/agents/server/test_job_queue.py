"""The queue with an engine of paper: turns, cancellation between two tokens, order, the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

for package in ("fastapi", "prometheus_client"):
    pytest.importorskip(package, reason="needs the extra `serve`")

from flexquant_rl.agents.server.errors import ApiError
from flexquant_rl.agents.server.job_queue import End, Event, Job, JobQueue
from flexquant_rl.engine.control.request import GeneratedToken, Request


class PaperEngine:
    """Makes a token where `step` lets it; the tokens of a request count up from its seed."""

    is_graph = False
    model = SimpleNamespace(unit_weights=torch.tensor([100, 300]))

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.made: list[int] = []
        self.left: list[int] = []
        self.is_closed = False

    def generate(self, request: Request, policy: object) -> Iterator[GeneratedToken]:
        try:
            for place in range(request.max_new_tokens):
                assert self.asked.acquire(timeout=10)
                self.made.append(request.seed + place)
                reason: Any = "length" if place + 1 == request.max_new_tokens else None
                yield GeneratedToken(0, request.seed + place, "", torch.tensor([4, 8]), 1.0, reason)
        finally:
            self.left.append(request.seed)

    def close(self) -> None:
        self.is_closed = True


class Heard:
    """What came of a job, and when something did."""

    def __init__(self, seed: int, num_tokens: int) -> None:
        self.events: list[Event] = []
        self.news = threading.Semaphore(0)
        request = Request(torch.tensor([1, 2]), num_tokens, seed=seed)
        self.job = Job(request, num_tokens, None, None, self.hear)

    def hear(self, event: Event) -> None:
        self.events.append(event)
        self.news.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.news.acquire(timeout=10)

    @property
    def outcome(self) -> str:
        assert isinstance(self.events[-1], End)
        return self.events[-1].outcome


@pytest.fixture
def engine() -> PaperEngine:
    return PaperEngine()


def queue_of(engine: PaperEngine, **sizes: int) -> JobQueue:
    return JobQueue(engine, **sizes)  # type: ignore[arg-type]


def finish(queue: JobQueue, engine: PaperEngine) -> None:
    engine.asked.release(1000)
    queue.stop(10)
    assert engine.is_closed


def test_running_jobs_take_turns_and_others_wait_in_order(engine: PaperEngine) -> None:
    queue = queue_of(engine, slots=2, size=3)
    jobs = [Heard(seed, 3) for seed in (100, 200, 300)]
    queue.submit([heard.job for heard in jobs])
    engine.asked.release(9)
    for heard in jobs:
        heard.wait(4)
        assert heard.outcome == "done"
    assert engine.made[:6] == [100, 200, 101, 201, 102, 202]
    assert engine.made[6:] == [300, 301, 302]
    assert b"flexquant_bit_width_sum 63.0" in queue.metrics.text()  # 9 tokens at (4 + 3 * 8) / 4 bits
    finish(queue, engine)


def test_a_cancelled_job_makes_no_further_token_and_frees_its_slot(engine: PaperEngine) -> None:
    queue = queue_of(engine, slots=1, size=1)
    first, second = Heard(100, 50), Heard(200, 1)
    queue.submit([first.job, second.job])
    engine.asked.release(2)
    first.wait(2)
    queue.cancel([first.job])  # while the engine makes the third token
    engine.asked.release(2)
    second.wait(2)
    assert engine.made[:2] == [100, 101]
    assert engine.made[2:] in ([200], [102, 200])  # at most the one that was under way
    assert first.outcome == "disconnected"
    assert second.outcome == "done"
    assert engine.left == [100, 200]
    finish(queue, engine)


def test_a_cancelled_job_that_waits_is_never_begun(engine: PaperEngine) -> None:
    queue = queue_of(engine, slots=1, size=1)
    first, second, third = (Heard(seed, 2) for seed in (100, 200, 300))
    queue.submit([first.job, second.job])
    with pytest.raises(ApiError, match="wait") as refused:
        queue.submit([third.job])
    assert refused.value.status == 429
    queue.cancel([second.job])
    queue.submit([third.job])
    finish(queue, engine)
    assert engine.made == [100, 101, 300, 301]


def test_places_are_kept_for_jobs_that_are_being_made(engine: PaperEngine) -> None:
    queue = queue_of(engine, slots=1, size=1)
    own, other = [Heard(seed, 1) for seed in (100, 200)], Heard(300, 1)
    with queue.room(2):
        with pytest.raises(ApiError, match="0 requests run and 2 wait"), queue.room(1):
            pass
        with pytest.raises(ApiError, match="0 requests run and 2 wait"):
            queue.submit([other.job])
        queue.submit([heard.job for heard in own], promised=2)
    engine.asked.release(2)
    for heard in own:
        heard.wait(2)
    with queue.room(2):  # what was promised is free again, also where nothing came of it
        pass
    queue.submit([other.job])
    finish(queue, engine)
    assert engine.made == [100, 200, 300]


def test_some_jobs_are_taken_whole_or_not_at_all(engine: PaperEngine) -> None:
    queue = queue_of(engine, slots=1, size=1)
    with pytest.raises(ApiError):
        queue.submit([Heard(seed, 1).job for seed in range(3)])
    finish(queue, engine)
    assert engine.made == []


def test_the_end_lets_run_what_was_taken_and_refuses_the_rest(engine: PaperEngine) -> None:
    queue = queue_of(engine, slots=1, size=2)
    first, second = Heard(100, 2), Heard(200, 2)
    queue.submit([first.job, second.job])
    queue.drain()
    with pytest.raises(ApiError, match="stopping") as refused:
        queue.submit([Heard(300, 1).job])
    assert refused.value.status == 503
    finish(queue, engine)
    assert first.outcome == second.outcome == "done"


def test_the_end_does_not_wait_for_ever(engine: PaperEngine) -> None:
    queue = queue_of(engine, slots=1, size=1)
    first, second = Heard(100, 500), Heard(200, 1)
    queue.submit([first.job, second.job])
    engine.asked.release(3)
    first.wait(3)
    stopping = threading.Thread(target=queue.stop, args=(60.0,))
    stopping.start()
    queue.stop_now()
    engine.asked.release(1)
    stopping.join(10)
    assert not stopping.is_alive()
    assert first.outcome == second.outcome == "stopped"
    assert 200 not in engine.made
