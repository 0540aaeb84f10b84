"""Slots, the queue, clients that hang up, and the end of a server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli_runner import ROOT
from http_server import Running, completion, events, eventually, refusal, running

from flexquant_rl.agents.commands.servable import Servable, load_servable

pytestmark = pytest.mark.usefixtures("endless")

LONG = {"prompt": "def main():", "max_tokens": 400, "temperature": 0}


@contextmanager
def begun(client: httpx.Client, path: str = "/v1/completions", body: dict[str, Any] = LONG) -> Iterator[Iterator[str]]:
    """A stream whose first token has come."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


@pytest.fixture(scope="module")
def small(embedded_drafts: Servable) -> Iterator[Running]:
    """One slot, and one place to wait. Nothing is looked up in the text, so that a long request takes its time."""
    slow = load_servable("default", "draft:3,length=3,ngrams=0", loaded=embedded_drafts.model)
    with running(slow, slots=1, queue=1) as found:
        yield found


def ended(server: Running, outcome: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf'flexquant_requests_total{{outcome="{outcome}"}} (\S+)', text)
    return 0.0 if found is None else float(found[1])


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_hangs_up_frees_the_slot(small: Running, is_stream: bool) -> None:
    before, made = ended(small, "disconnected"), small.metric('flexquant_tokens_total{kind="generated"}')
    with small.client() as client:
        if is_stream:
            with begun(client):
                assert small.metric("flexquant_running") == 1
        else:
            client.timeout = httpx.Timeout(30, read=0.15)
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=LONG)
    assert eventually(lambda: ended(small, "disconnected") == before + 1)
    assert 'flexquant_refused_total{status="499"}' not in httpx.get(f"{small.url}/metrics").text
    assert small.metric("flexquant_running") == 0
    stopped_at = small.metric('flexquant_tokens_total{kind="generated"}')
    assert stopped_at - made < LONG["max_tokens"]  # type: ignore[operator]
    with small.client() as client:
        assert completion(client, max_tokens=3)["usage"]["completion_tokens"] == 3
    assert small.metric('flexquant_tokens_total{kind="generated"}') == stopped_at + 3


def test_a_full_queue_turns_away_and_says_when_to_come_again(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with small.client() as client, ThreadPoolExecutor() as pool:
        with begun(client):
            answer = pool.submit(completion, client, max_tokens=2)
            assert eventually(lambda: small.metric("flexquant_queue_length") == 1)
            with monkeypatch.context() as patched:  # a full queue makes no text tokens
                patched.setattr(small.served, "of_completion", lambda body: pytest.fail("tokenised in vain"))
                refused = client.post("/v1/completions", json=LONG)
            assert refusal(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
        assert answer.result(30)["usage"]["completion_tokens"] == 2


def test_who_waits_and_hangs_up_leaves_the_queue(small: Running) -> None:
    before = ended(small, "disconnected")
    with small.client() as client, begun(client):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=LONG, timeout=httpx.Timeout(30, read=0.1))  # LONG takes thrice that
        assert eventually(lambda: ended(small, "disconnected") == before + 1)
        assert small.metric("flexquant_queue_length") == 0
        assert small.metric("flexquant_running") == 1


def test_a_request_that_fails_takes_no_other_with_it(
    embedded_drafts: Servable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(embedded_drafts) as server, server.client() as client:
        engine = server.served.queue._engine
        generate = engine.generate
        fails = {13: lambda request, policy: 1 / 0}
        monkeypatch.setattr(
            engine, "generate", lambda request, policy: fails.get(request.seed, generate)(request, policy)
        )
        body = {"prompt": "x", "max_tokens": 2, "seed": 13}
        error = refusal(client.post("/v1/completions", json=body), 500)
        assert "log says why" in error["message"]
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            (line,) = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert json.loads(line.removeprefix("data: "))["error"] == error
        assert completion(client, max_tokens=2)["usage"]["completion_tokens"] == 2
        assert ended(server, "failed") == 2
    assert "ZeroDivisionError" in caplog.text


def test_what_runs_ends_and_what_comes_is_refused(embedded_drafts: Servable) -> None:
    with running(embedded_drafts, drain_s=60) as server, server.client() as client, server.client() as other:
        assert other.get("/health").status_code == 200
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            server.stopping.ask()
            answer = other.post("/v1/completions", json=LONG)
            assert refusal(answer, 503)["code"] == "stopping"
            assert "retry-after" in answer.headers
            assert refusal(other.get("/health"), 503)["code"] == "stopping"
            chunks = events(response)
    assert len(chunks) == 401


def test_what_does_not_end_in_time_is_told(embedded_drafts: Servable) -> None:
    body = LONG | {"stream": True}
    with (
        running(embedded_drafts, drain_s=0.05) as server,
        server.client() as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        server.stopping.ask()
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "stopping"
    assert len(lines) < LONG["max_tokens"]  # type: ignore[operator]


@contextmanager
def command(*arguments: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fq serve` in a process of its own, and its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "cli.py"), "serve", "default", "--port", "0", *arguments]
    with subprocess.Popen(words, cwd=cwd, env=environment, stdout=-1, stderr=-1, text=True) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"on (http://\S+)", process.stderr.readline())
            assert found is not None
            yield process, found[1]
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_command_in_order(tmp_path: Path, number: signal.Signals) -> None:
    body = {"prompt": "def main():", "max_tokens": 60, "temperature": 0, "stream": True}
    with command("--policy", "fixed:4", cwd=tmp_path) as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            process.send_signal(number)
            chunks = events(response)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    result = json.loads(out.splitlines()[-1])
    assert result.pop("num_tokens") == len(chunks) - 1
    assert result == {"model": "tiny-code-llama", "policy": "fixed:4", "num_requests": 1, "num_refused": 0}
    assert "Traceback" not in err


def test_threads_of_the_server_end_with_it(embedded_drafts: Servable) -> None:
    def engines() -> int:
        return sum(thread.name == "fq-serve-engine" for thread in threading.enumerate())

    before = engines()
    with running(embedded_drafts) as server:
        assert engines() == before + 1
        began = time.monotonic()
        server.stopping.ask()
    assert engines() == before
    assert time.monotonic() - began < server.served.settings.drain_s
