"""`fq serve`: options that cannot be served are one line before anything listens."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from cli_runner import run

from flexquant_rl import cli
from flexquant_rl.agents.commands import serve as command


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = command.importlib.util.find_spec
    monkeypatch.setattr(
        command.importlib.util, "find_spec", lambda name: None if name in ("fastapi", "uvicorn") else find_spec(name)
    )
    error = run(cli.main, "serve", "default").error
    assert error == (
        "fq serve needs the extra `serve` (fastapi, uvicorn not found); pip install 'flexquant-rl[serve]', or on a "
        "machine that only serves -r requirements-server.txt"
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--port", 70000), "port=70000: Input should be less than or equal to 65535"),
        (("--slots", 0), "slots=0: Input should be greater than or equal to 1; change the option or the variable"),
        (("--drain-s", "nan"), "drain_s=nan"),
        (("--host", "300.1.1.1"), "cannot be opened"),
        (("--policy", "fixed:4", "--verify-width", 8), "is for drafts"),
        (("--port", 0, "--max-length", 100_000), "context holds 512"),
        (("--port", 0, "--policy", "nothing"), "is not the directory"),
    ],
)
def test_bad_options(arguments: tuple[object, ...], part: str, no_server: None) -> None:
    assert part in run(cli.main, "serve", "default", *arguments).error


def test_an_address_that_is_taken(no_server: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = run(cli.main, "serve", "default", "--port", port).error
    assert f"127.0.0.1 port {port} cannot be opened (Address already in use)" in error


@pytest.mark.parametrize(("name", "value"), [("SLOTS", "many"), ("API_KEY", "two words"), ("API_KEY", "")])
def test_bad_variables(name: str, value: str, monkeypatch: pytest.MonkeyPatch, no_server: None) -> None:
    monkeypatch.setenv(f"FQ_SERVE_{name}", value)
    error = run(cli.main, "serve", "default").error
    assert f"change the option or the variable FQ_SERVE_{name}" in error
    assert "two words" not in error


def test_options_come_before_the_environment(monkeypatch: pytest.MonkeyPatch, no_server: None) -> None:
    from flexquant_rl.agents.server.settings import read_settings

    monkeypatch.setenv("FQ_SERVE_SLOTS", "9")
    monkeypatch.setenv("FQ_SERVE_API_KEY", "s3cret")
    found = read_settings({"slots": 2, "queue": None})
    assert (found.slots, found.queue) == (2, 64)
    assert found.api_key is not None
    assert "s3cret" not in repr(found)
    assert read_settings({}).slots == 9


@pytest.fixture
def no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips without the extra; a command that should be refused must not serve for ever."""
    running: Any = pytest.importorskip("flexquant_rl.agents.server.running", reason="needs the extra `serve`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "serve", None)
