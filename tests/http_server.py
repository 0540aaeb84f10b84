"""A server in a thread of this process on a free loopback port, and requests to it; needs the extra `serve`."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from flexquant_rl.agents.commands.servable import Rungs, Servable
from flexquant_rl.engine.control.request import Request
from flexquant_rl.engine.embedded import EMBEDDED_MODEL_NAME
from flexquant_rl.engine.serving import Engine, encode

for package in ("fastapi", "uvicorn", "sse_starlette", "pydantic_settings", "prometheus_client", "httpx"):
    pytest.importorskip(package, reason="needs the extra `serve`, and httpx")

import httpx

from flexquant_rl.agents.server.routes import create_app
from flexquant_rl.agents.server.running import Stopping, address, bind, serve
from flexquant_rl.agents.server.served import Served
from flexquant_rl.agents.server.settings import read_settings


@dataclass
class Running:
    """A server that runs."""

    url: str
    served: Served
    stopping: Stopping

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def metric(self, name: str) -> float:
        """A sample of `/metrics`, labels included in its name."""
        text = httpx.get(f"{self.url}/metrics").text
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[-1])


@contextmanager
def running(
    found: Servable, name: str = EMBEDDED_MODEL_NAME, rungs: Rungs | None = None, **settings: Any
) -> Iterator[Running]:
    """Serves on a free port until the block ends."""
    listening = bind("127.0.0.1", 0)
    served = Served.start(name, found, read_settings({"port": 0, "drain_s": 5.0, **settings}), rungs=rungs)
    started = threading.Event()
    handles: list[Stopping] = []

    def ready(stopping: Stopping) -> None:
        handles.append(stopping)
        started.set()

    def work() -> None:
        asyncio.run(serve(create_app(served), served, listening, ready, signals=False))

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(60)
    try:
        yield Running(address(listening), served, handles[0])
    finally:
        handles[0].ask()
        thread.join(60)
        listening.close()
        assert not thread.is_alive()


PROMPTS = ("def main():", "class Node:", "import os", "for line in", "return ", "try:\n", "    if x", "# The")


def completion(client: httpx.Client, prompt: Any = PROMPTS[0], **fields: Any) -> dict[str, Any]:
    """A completion that is answered, greedy unless it says otherwise."""
    response = client.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a refused request: OpenAI's shape, one line, nothing of our insides."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    assert isinstance(error, dict)
    return error


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, once its end was seen."""
    data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def alone(engine: Engine, prompt: str, num_tokens: int, **fields: Any) -> str:
    """What the engine gives for a prompt, without a server."""
    request = Request(encode(engine.model, prompt), num_tokens, **fields)
    return "".join(token.text for token in engine.generate(request))


def eventually(holds: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether something becomes true in time."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
