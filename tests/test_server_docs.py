"""Every Python block of docs/server.md runs as it is written, against a server of the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
from document_blocks import DOCS, run_blocks, save_random_policy
from http_server import running

from flexquant_rl.agents.commands.servable import load_servable
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.embedded import resolve_model

pytest.importorskip("openai", reason="needs the package `openai`")


def test_the_blocks_do_what_they_say(tmp_path: Path) -> None:
    save_random_policy(load_model(resolve_model(None), keep_reference=False), tmp_path / "policy")
    with running(load_servable("default", str(tmp_path / "policy"))) as server:
        names, printed = run_blocks(DOCS / "server.md", tmp_path, {"http://127.0.0.1:8000": server.url})
    first, streamed, judged = printed
    assert len(first) == 2
    assert len(first[1].split(",")) == names["found"].usage.completion_tokens
    assert len("".join(streamed)) > 10
    first_value, *values = [line.split()[-1] for line in judged]
    assert first_value == "None"
    assert all(float(value) < 0 for value in values)
