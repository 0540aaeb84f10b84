"""From an application to a server that listens, and to its orderly end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from flexquant_rl.agents.server.served import Served
from flexquant_rl.engine.errors import InputError

_LAST_BYTES_S = 5.0
"""Seconds that answers which are whole get to reach their clients."""
_LOOK_S = 0.02


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: what a signal means is decided in `Stopping`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


class Stopping:
    """The wish that a server stops: the first one lets running requests end, the second one does not.

    Args:
        served: What is served.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._loop = asyncio.get_running_loop()
        self.asked = asyncio.Event()

    def ask(self) -> None:
        """Asks, once more or for the first time; for any thread."""
        if self._served.queue.is_draining:
            self._served.queue.stop_now()
        self._served.queue.drain()
        self._loop.call_soon_threadsafe(self.asked.set)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Inside the block SIGTERM and Ctrl-C ask."""

        def handle(number: int, frame: FrameType | None) -> None:
            # A handler runs between two steps of the main thread, which may hold the queue's lock.
            self._loop.call_soon_threadsafe(self.ask)

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """Opens the address.

    Raises:
        InputError: If it is taken, or none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, UnicodeError, OverflowError) as error:
        # `create_server` appends the address to what the system says.
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while ")[0]
        raise InputError(f"{host} port {port} cannot be opened ({reason}); choose another --host or --port") from error


def address(listening: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    app: FastAPI, served: Served, listening: socket.socket, ready: Callable[[Stopping], None], *, signals: bool
) -> None:
    """Serves until it is asked to stop, and until what runs has ended or its time is over.

    Args:
        app: The application.
        served: What it serves.
        listening: From `bind`.
        ready: Told once requests are answered.
        signals: Whether SIGTERM and Ctrl-C ask to stop; only the main thread may have that.
    """
    stopping = Stopping(served)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(_LOOK_S)
    ready(stopping)
    if signals:
        with stopping.on_signals():
            await _until_stopped(app, served, stopping, serving)
    else:
        await _until_stopped(app, served, stopping, serving)
    server.should_exit = True
    await serving


async def _until_stopped(app: FastAPI, served: Served, stopping: Stopping, serving: asyncio.Task[None]) -> None:
    asked = asyncio.create_task(stopping.asked.wait())
    await asyncio.wait((asked, serving), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    await asyncio.to_thread(served.queue.stop, served.settings.drain_s)
    for _ in range(int(_LAST_BYTES_S / _LOOK_S)):
        if not app.state.open_answers.count:
            return
        await asyncio.sleep(_LOOK_S)
