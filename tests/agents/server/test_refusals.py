"""What is refused: one clear line in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from http_server import Running, completion, eventually, refusal, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexquant_rl.agents.commands.servable import Servable
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.verify_costs import modelled_costs

KNOWN = ("prompt", "max_tokens", "temperature", "n", "stop", "seed", "echo", "logprobs", "stream", "speed")


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "set echo"),
        ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 10**30}, "max_tokens", "generates 512 at most"),
        ({"max_tokens": 600}, "max_tokens", "generates 512 at most"),
        ({"max_tokens": 510, "prompt": "x = 1\n" * 9}, "prompt", "and 510 new ones are more than the 512"),
        ({"temperature": -0.5}, "temperature", "greater than or equal to 0"),
        ({"temperature": 1e-9}, None, "no longer numbers"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": "high"}, "top_p", "valid number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "less than or equal to 16"),
        ({"seed": -3}, "seed", "greater than or equal to 0"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 stop strings"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": []}, "prompt", "none of them empty"),
        ({"prompt": [1, -4]}, "prompt", "not 0 to 4095"),
        ({"prompt": [10**20]}, "prompt", "not 0 to 4095"),
        ({"prompt": None}, "prompt", "give text"),
        ({"prompt": "\ud800"}, None, "not UTF-8 text"),
        ({"prompt": "x " * 2000}, "prompt", "are more than the 512 that this server holds"),
        ({"prompt": ["x"] * 100}, "n", "holds 68"),
        ({"model": "gpt-9"}, "model", "'tiny-code-llama' is"),
        ({"best_of": 3}, "best_of", "does not support"),
        ({"suffix": "end"}, "suffix", "does not support"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "does not support"),
        ({"presence_penalty": 0.1}, "presence_penalty", "does not support"),
        ({"stream_options": {"include_usage": True}}, None, "set stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "unknown field stream_options.x"),
        ({"nonsense": 1}, "nonsense", "unknown field nonsense"),
        ({"\ud800": 1}, None, "unicode"),
        ({"speed": -1}, "speed", "greater than 0"),
        ({"verify_width": 9}, "verify_width", "less than or equal to 8"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_field_that_cannot_be_served(server: Running, fields: dict[str, Any], param: str | None, part: str) -> None:
    content = json.dumps({"prompt": "x", **fields})
    with server.client() as client:
        answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        error = refusal(answer, 404 if param == "model" else 400)
        assert part in error["message"]
        if param is not None:
            assert error["param"].split(".")[0] == param
        assert completion(client, max_tokens=1)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: give text, or a list of parts"),
        ({"messages": [{"role": "user", "content": "x " * 2000}]}, "are more than the 512 that this server holds"),
        ({"tools": [{"type": "function"}]}, "tools: this server does not support"),
        ({"response_format": {"type": "json_object"}}, "response_format: this server does not support"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "the same limit"),
        ({"max_tokens": 0}, "ask for a token"),
        ({"logprobs": 2}, "valid boolean"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_chat_that_cannot_be_served(dial_server: Running, fields: dict[str, Any], part: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    with dial_server.client() as client:
        assert part in refusal(client.post("/v1/chat/completions", json=body), 400)["message"]


def test_nobody_is_told_where_a_policy_lies(embedded_drafts: Servable) -> None:
    policy = embedded_drafts.policy
    assert isinstance(policy, DeployedDrafts)
    costs = modelled_costs((0.5,), (1.0, 1.1), depth=policy.schema.depth)
    trained = replace(policy, name="/place/of/somebody/drafts", facts=replace(policy.facts, costs=costs))
    with running(replace(embedded_drafts, policy=trained)) as found, found.client() as client:
        facts = client.get("/v1/models").json()["data"][0]["flexquant"]
        said = [facts["policy"], facts["why_no_dial"]]
        for param, value in (("speed", 1.5), ("kl_weight", 3.0), ("verify_width", 6)):
            error = refusal(client.post("/v1/completions", json={"prompt": "x", param: value}), 400)
            assert error["param"] == param
            said.append(error["message"])
    assert all("drafts" in text and "somebody" not in text for text in said)


def test_harmless_fields_are_not_looked_at(dial_server: Running) -> None:
    body = {
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}],
        "max_completion_tokens": 2,
        **{"user": "me", "metadata": {"a": "b"}, "store": False, "logit_bias": {}, "presence_penalty": 0.0},
        **{"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True},
        **{"n": None, "temperature": None, "stop": None, "stream": None},
    }
    with dial_server.client() as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_bodies_that_are_none(server: Running) -> None:
    kind = {"content-type": "application/json"}
    with server.client() as client:
        for content in (b"", b'{"prompt":', b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 10_000 + b"}"):
            assert refusal(client.post("/v1/completions", content=content, headers=kind), 400)["code"] == "invalid_json"
        for content in (b"[]", b"3", b"null", b'{"prompt": "x", "temperature": NaN}'):
            refusal(client.post("/v1/completions", content=content, headers=kind), 400)
        for headers in ({}, {"content-type": "text/plain"}):
            refusal(client.post("/v1/completions", content=b"{}", headers=headers), 415)
        assert refusal(client.get("/v1/completions"), 405)["code"] == "method_not_allowed"
        assert refusal(client.get("/v1/nothing"), 404)["code"] == "not_found"


def test_a_body_of_ten_megabytes(server: Running) -> None:
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()
    kind = {"content-type": "application/json"}
    with server.client() as client:
        for content in (body, (body[start : start + 65_536] for start in range(0, len(body), 65_536))):
            error = refusal(client.post("/v1/completions", content=content, headers=kind), 413)
            assert "larger than 1048576 bytes" in error["message"]


def test_a_key_is_asked_for_where_one_is_set(embedded_drafts: Servable) -> None:
    with running(embedded_drafts, api_key="s3cret") as server:
        for key in (None, "Bearer wrong", "s3cret", "Bearer", "Basic s3cret"):
            with server.client(headers={} if key is None else {"Authorization": key}) as client:
                for path in ("/v1/models", "/metrics"):
                    answer = client.get(path)
                    assert refusal(answer, 401)["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"
                assert client.get("/health").status_code == client.get("/").status_code == 200
        with server.client(headers={"Authorization": "Bearer s3cret"}) as client:
            assert completion(client, max_tokens=1)


def test_names_that_are_not_this_machines_are_refused(server: Running) -> None:
    """A web page whose name leads to 127.0.0.1 must not reach the server from a browser."""
    port = urlsplit(server.url).port
    with server.client() as client:
        assert refusal(client.get("/v1/models", headers={"host": "evil.example"}), 421)["code"] == "bad_host"
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_body_that_does_not_come(embedded_drafts: Servable) -> None:
    with running(embedded_drafts, body_timeout_s=0.2) as server:
        place = urlsplit(server.url)
        with socket.create_connection((str(place.hostname), int(place.port or 0)), timeout=20) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
            assert b" 408 " in client.recv(4096)
        assert eventually(lambda: server.metric('flexquant_refused_total{status="408"}') == 1)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=6), ANYTHING, max_size=4))
def test_whatever_is_sent_is_answered_or_refused(server: Running, fields: dict[str, Any]) -> None:
    content = json.dumps({"prompt": "x", "max_tokens": 1, **fields})
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers, timeout=60)
    if answer.status_code != 200:
        assert answer.status_code < 500
        refusal(answer, answer.status_code)
