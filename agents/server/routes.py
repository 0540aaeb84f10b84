"""The routes: what is asked over HTTP, put to the queue, and sent back whole or token by token."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from flexquant_rl.agents.server.answers import Answer, ChatAnswer, Choice, CompletionAnswer
from flexquant_rl.agents.server.errors import CLIENT_GONE, ApiError, add_handlers, internal_error
from flexquant_rl.agents.server.guard import Guard
from flexquant_rl.agents.server.job_queue import End, Event, Job
from flexquant_rl.agents.server.metrics import CONTENT_TYPE
from flexquant_rl.agents.server.openapi import describe_errors, generated, refusals, text_of
from flexquant_rl.agents.server.page import page, page_headers
from flexquant_rl.agents.server.schemas import Body, ChatBody, CompletionBody
from flexquant_rl.agents.server.served import Served


def create_app(served: Served) -> FastAPI:
    """The application that serves a model."""
    app = FastAPI(title="flexquant-rl", version="1", docs_url=None, redoc_url=None)  # of the interface, /v1
    add_handlers(app)
    open_answers = OpenAnswers()
    app.state.open_answers = open_answers
    created = int(time.time())

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page(), headers=page_headers())

    @app.get("/health", responses=refusals(421, 503))
    async def health() -> Response:
        """Whether requests are taken."""
        if served.queue.is_draining:
            return ApiError(503, "the server is stopping; ask again when it is back", "stopping").response()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse, responses=text_of(CONTENT_TYPE))
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(served.queue.metrics.text(), media_type=CONTENT_TYPE)

    def model_entry() -> dict[str, Any]:
        entry = {"id": served.name, "object": "model", "created": created, "owned_by": "flexquant-rl"}
        return entry | {"flexquant": served.facts()}

    @app.get("/v1/models", responses=refusals(401, 421))
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [model_entry()]}

    @app.get("/v1/models/{name:path}", responses=refusals(401, 404, 421))
    async def model(name: str) -> dict[str, Any]:
        """The model by its name."""
        if name != served.name:
            raise ApiError(404, f"model {name!r} is not served here; {served.name!r} is", "model_not_found", "model")
        return model_entry()

    @app.post("/v1/completions", responses=generated())
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continues text."""

        def prepared() -> Answer:
            asks, has_log_probs = served.of_completion(body), body.logprobs is not None
            return CompletionAnswer(served, asks, echo=bool(body.echo), has_log_probs=has_log_probs)

        return await _answered(served, open_answers, request, body, prepared)

    @app.post("/v1/chat/completions", responses=generated())
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answers a chat."""

        def prepared() -> Answer:
            return ChatAnswer(served, served.of_chat(body), has_log_probs=bool(body.logprobs))

        return await _answered(served, open_answers, request, body, prepared)

    describe_errors(app)
    app.add_middleware(Guard, settings=served.settings, metrics=served.queue.metrics)
    return app


class OpenAnswers:
    """Counts the answers that are still being sent."""

    def __init__(self) -> None:
        self.count = 0


async def _answered(
    served: Served, open_answers: OpenAnswers, request: Request, body: Body, prepare: Callable[[], Answer]
) -> Response:
    """Puts what a body asks to the queue; a client that hangs up ends it."""
    served.check(body)
    with served.queue.room(body.num_texts):  # before any text is made tokens: a full queue costs nothing
        answer = await run_in_threadpool(prepare)
        jobs = [choice.ask.job for choice in answer.choices]
        events = _submit(served, jobs)
    open_answers.count += 1

    def ended() -> None:
        open_answers.count -= 1
        served.queue.cancel(jobs)

    if body.stream:
        return _Stream(_chunks(answer, events, with_usage=body.wants_usage), ended)
    try:
        return await _unless_gone(request, _whole(answer, events))
    finally:
        ended()


def _submit(served: Served, jobs: Sequence[Job]) -> asyncio.Queue[tuple[int, Event]]:
    """Gives jobs to the queue, which has room for them; what comes of them arrives with the index of its job."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def deliver(index: int) -> Callable[[Event], None]:
        return lambda event: _call_in(loop, events, (index, event))

    for index, job in enumerate(jobs):
        job.deliver = deliver(index)
    served.queue.submit(jobs, promised=len(jobs))
    return events


def _call_in(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], item: tuple[int, Event]
) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, item)


def _failure(end: End) -> ApiError | None:
    """What a client is told of a job that did not end by itself."""
    if end.outcome == "done":
        return None
    if end.outcome == "stopped":
        return ApiError(503, "the server stopped before the answer was whole; ask again when it is back", "stopping")
    return internal_error()


async def _whole(answer: Answer, events: asyncio.Queue[tuple[int, Event]]) -> Response:
    running = len(answer.choices)
    while running:
        index, event = await events.get()
        if isinstance(event, End):
            if (failure := _failure(event)) is not None:
                return failure.response()
            running -= 1
        else:
            answer.choices[index].add(event)
    return JSONResponse(answer.whole())


async def _chunks(
    answer: Answer, events: asyncio.Queue[tuple[int, Event]], *, with_usage: bool
) -> AsyncGenerator[bytes]:
    """The events of a stream: roles, tokens, reasons, on request numbers, and the mark of the end."""
    for chunk in answer.opening():
        yield _sent(chunk)
    echoed: set[int] = set()
    running = len(answer.choices)
    while running:
        index, event = await events.get()
        choice = answer.choices[index]
        if isinstance(event, End) and (failure := _failure(event)) is not None:
            yield _sent(failure.body())
            return
        if not isinstance(event, End):
            choice.add(event)
        for chunk in _chunks_of(answer, choice, event, echoed):
            yield _sent(chunk)
        running -= isinstance(event, End)
    if with_usage:
        yield _sent(answer.usage_chunk())
    yield b"data: [DONE]\n\n"


def _chunks_of(answer: Answer, choice: Choice, event: Event, echoed: set[int]) -> list[dict[str, Any]]:
    """The chunks of one event; the prompt's, where it is echoed, stands before the first token."""
    chunks: list[dict[str, Any]] = []
    is_end = isinstance(event, End)
    if isinstance(answer, CompletionAnswer) and choice.index not in echoed and (is_end or choice.tokens):
        echoed.add(choice.index)
        if (echo := answer.echo_chunk(choice)) is not None:
            chunks.append(echo)
    if is_end:
        chunks.append(answer.closing(choice))
    elif choice.tokens:
        chunks.append(answer.chunk(choice, choice.tokens[-1]))
    return chunks


def _sent(chunk: dict[str, Any]) -> bytes:
    # JSON has no line breaks outside its escapes, so that an event is one line.
    return b"data: %b\n\n" % json.dumps(chunk, separators=(",", ":")).encode()


class _Stream(EventSourceResponse):
    """A stream that says when it ended, also if it never began.

    Args:
        chunks: What is sent.
        ended: Called once.
    """

    def __init__(self, chunks: AsyncGenerator[bytes], ended: Callable[[], None]) -> None:
        super().__init__(chunks, sep="\n", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Waits for an answer, or for its client to hang up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def either(*tasks: asyncio.Task[Any]) -> None:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await either(working, leaving)
        return working.result() if working.done() else Response(status_code=CLIENT_GONE)
    finally:
        working.cancel()
        leaving.cancel()
