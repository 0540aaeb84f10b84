"""What is answered over HTTP: the engine's own text, in the shapes and the order that OpenAI's clients rely on."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from http_server import PROMPTS, Running, alone, completion, events, refusal, running

from flexquant_rl.agents.commands.servable import Servable, load_servable
from flexquant_rl.agents.server.answers import Choice
from flexquant_rl.engine.control.log_probs import TokenLogProbs
from flexquant_rl.engine.control.request import Request
from flexquant_rl.engine.serving import Engine, encode

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]


def test_the_text_is_the_engines(server: Running, embedded_drafts: Servable) -> None:
    engine = Engine(embedded_drafts.model, embedded_drafts.policy, embedded_drafts.profile)
    with server.client() as client:
        for fields in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 11}):
            answer = completion(client, max_tokens=20, **fields)
            assert answer["choices"][0]["text"] == alone(engine, PROMPTS[0], 20, **fields)
        stopped = completion(client, max_tokens=60, stop=["\n"], prompt="def main")["choices"][0]
        assert stopped["text"] == alone(engine, "def main", 60, stop=("\n",))
        assert stopped["finish_reason"] == "stop"


def test_a_completion_has_all_that_clients_read(server: Running) -> None:
    with server.client() as client:
        answer = completion(client, max_tokens=12)
    (choice,) = answer["choices"]
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny-code-llama"
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["total_tokens"] == 12 + answer["usage"]["prompt_tokens"]
    widths = choice["flexquant"]
    assert "".join(widths["texts"]) == choice["text"]
    assert widths["bit_widths"] == [8.0] * 12
    assert len(widths["accepted_drafts"]) == 12
    assert any(widths["accepted_drafts"])
    assert not widths["accepted_drafts"][0]


def test_an_answer_says_what_was_found_in_the_text(server: Running, embedded_drafts: Servable) -> None:
    prompt = "x = 1\nx = 1\nx = 1\nx = 1\n"
    engine = Engine(embedded_drafts.model, embedded_drafts.policy, embedded_drafts.profile)
    *_, last = engine.generate(Request(encode(embedded_drafts.model, prompt), 12))
    counts = last.draft_counts
    assert counts is not None
    assert counts.num_found >= counts.num_found_accepted > 0
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
    with server.client() as client:
        whole = completion(client, **body)["choices"][0]["flexquant"]
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            *_, end = events(response)
    for facts in (whole, end["choices"][0]["flexquant"]):
        assert (facts["num_found"], facts["num_found_accepted"]) == (counts.num_found, counts.num_found_accepted)
        assert facts["acceptance_by_position"] == counts.acceptance_by_position
        assert facts["tokens_per_pass"] == counts.tokens_per_pass


def test_a_stream_is_the_whole_answer_in_order(server: Running) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 15, "temperature": 0, "stream": True}
    with server.client() as client:
        whole = completion(client, max_tokens=15)["choices"][0]
        with client.stream("POST", "/v1/completions", json=body) as response:
            plain = events(response)
        options = {"stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/completions", json=body | options) as response:
            *tokens, end, usage = events(response)
    assert len(plain) == len(tokens) + 1
    assert "".join(chunk["choices"][0]["text"] for chunk in tokens) == whole["text"]
    drafted = [draft for chunk in tokens for draft in chunk["choices"][0]["flexquant"]["accepted_drafts"]]
    assert drafted == whole["flexquant"]["accepted_drafts"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in [*tokens, end]] == [None] * 15 + ["length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 15
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*tokens, end, usage]}) == 1


def test_a_chat_begins_with_its_role(dial_server: Running, embedded_dial: Servable) -> None:
    body = {"messages": MESSAGES, "max_tokens": 10, "temperature": 0, "kl_weight": 20}
    with dial_server.client() as client:
        whole = client.post("/v1/chat/completions", json=body).json()
        stream = body | {"stream": True, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/chat/completions", json=stream) as response:
            role, *tokens, end, usage = events(response)
    message = whole["choices"][0]["message"]
    engine = Engine(embedded_dial.model, embedded_dial.policy, embedded_dial.profile)
    prompt = "user: def add(a, b):\nassistant:"
    ids = torch.tensor(embedded_dial.model.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert usage["usage"]["prompt_tokens"] == len(ids)
    assert message["role"] == "assistant"
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in tokens) == message["content"]
    assert end["choices"][0]["delta"] == {}
    assert end["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert {chunk["object"] for chunk in (role, *tokens, end, usage)} == {"chat.completion.chunk"}
    widths = whole["choices"][0]["flexquant"]["bit_widths"]
    assert len(set(widths)) > 1
    engine.close()


def test_a_model_without_a_template_says_so(server: Running) -> None:
    with server.client() as client:
        error = refusal(client.post("/v1/chat/completions", json={"messages": MESSAGES}), 400)
    assert error["code"] == "no_chat_template"
    assert "/v1/completions" in error["message"]


def test_log_probabilities_of_prompt_and_text(server: Running, embedded_drafts: Servable) -> None:
    engine = Engine(embedded_drafts.model, embedded_drafts.policy, embedded_drafts.profile)
    with server.client() as client:
        choice = completion(client, echo=True, logprobs=2, max_tokens=4)["choices"][0]
        scored = completion(client, echo=True, logprobs=1, max_tokens=0)["choices"][0]
        body = {"prompt": PROMPTS[0], "echo": True, "logprobs": 2, "max_tokens": 4, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            chunks = events(response)
    ids = encode(embedded_drafts.model, PROMPTS[0]).tolist()
    found = choice["logprobs"]
    assert choice["text"].startswith(PROMPTS[0])
    assert len(found["tokens"]) == len(found["text_offset"]) == len(ids) + 4
    assert found["token_logprobs"][0] is None
    (likelihood,) = engine.loglikelihood([(ids[:1], ids[1:])], kl_weight=1.0)
    assert sum(found["token_logprobs"][1 : len(ids)]) == pytest.approx(likelihood.log_prob_nats, abs=1e-4)
    # Greedy: what was generated is what was likeliest.
    for value, top in list(zip(found["token_logprobs"], found["top_logprobs"], strict=True))[len(ids) :]:
        assert value == max(top.values())
    assert choice["text"][found["text_offset"][len(ids)] :] == "".join(found["tokens"][len(ids) :])
    assert scored["text"] == PROMPTS[0]
    assert scored["logprobs"]["token_logprobs"] == found["token_logprobs"][: len(ids)]
    assert chunks[0]["choices"][0]["text"] == PROMPTS[0]
    streamed = [value for chunk in chunks[:-1] for value in chunk["choices"][0]["logprobs"]["token_logprobs"]]
    assert streamed == found["token_logprobs"]


def test_log_probabilities_of_a_chat(dial_server: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    with dial_server.client() as client:
        content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for entry in content:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]


def test_several_prompts_and_several_choices(server: Running, embedded_drafts: Servable) -> None:
    model = embedded_drafts.model
    tokens = [encode(model, prompt).tolist() for prompt in PROMPTS[:2]]
    with server.client() as client:
        single = [completion(client, prompt, max_tokens=6)["choices"][0]["text"] for prompt in PROMPTS[:2]]
        for prompts in (list(PROMPTS[:2]), tokens):
            answer = completion(client, prompts, max_tokens=6)
            assert [choice["text"] for choice in answer["choices"]] == single
            assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        sampled = completion(client, max_tokens=8, temperature=1.0, seed=5, n=3)
        again = completion(client, max_tokens=8, temperature=1.0, seed=6)
    assert len({choice["text"] for choice in sampled["choices"]}) > 1
    assert sampled["choices"][1]["text"] == again["choices"][0]["text"]
    assert sampled["usage"]["prompt_tokens"] == again["usage"]["prompt_tokens"]


def test_the_dial_is_that_of_the_policy(dial_server: Running, embedded_dial: Servable) -> None:
    engine = Engine(embedded_dial.model, embedded_dial.policy, embedded_dial.profile)
    with dial_server.client() as client:
        facts = client.get("/v1/models").json()["data"][0]["flexquant"]
        assert [point["kl_weight"] for point in facts["dial"]] == [5.0, 20.0]
        for asked, kl_weight in (({"speed": 2.0}, 5.0), ({"kl_weight": 3.5}, 3.5), ({}, 20.0)):
            choice = completion(client, max_tokens=12, **asked)["choices"][0]
            assert choice["text"] == alone(engine, PROMPTS[0], 12, kl_weight=kl_weight)
            assert choice["flexquant"]["kl_weight"] == kl_weight
        full = completion(client, max_tokens=12, full_width=True)["choices"][0]["flexquant"]
        assert set(full["bit_widths"]) == {8.0}
        assert full["policy"] == "fixed:8"
        for fields, part in (
            ({"speed": 9.0}, "outside 1 to 2.00"),
            ({"speed": 1.5, "kl_weight": 3}, "set the same dial"),
            ({"verify_width": 8}, "makes none"),
            ({"full_width": True, "speed": 1.5}, "leaves nothing to set"),
        ):
            answer = client.post("/v1/completions", json={"prompt": "x", **fields})
            assert part in refusal(answer, 400)["message"]
    engine.close()


def test_a_verify_width_of_a_requests_own(server: Running, embedded_drafts: Servable) -> None:
    with server.client() as client:
        choice = completion(client, max_tokens=12, verify_width=5)["choices"][0]
        assert set(choice["flexquant"]["bit_widths"][1:]) == {5.0}
        own = completion(client, max_tokens=12, verify_width=8)["choices"][0]
        assert own["flexquant"]["policy"] == "draft:3,length=3"
        for width, part in ((3, "above 3"), (7, "stored width")):
            answer = client.post("/v1/completions", json={"prompt": "x", "verify_width": width})
            assert part in refusal(answer, 400)["message"]
        answer = client.post("/v1/completions", json={"prompt": "x", "speed": 1.5})
        assert "has none" in refusal(answer, 400)["message"]


def test_lookups_alone_are_verified_at_any_stored_width(embedded_drafts: Servable) -> None:
    repeated = "x = 1\n" * 4
    found = load_servable("default", "lookups", loaded=embedded_drafts.model)
    with running(found) as server, server.client() as client:
        facts = client.get("/v1/models").json()["data"][0]["flexquant"]
        assert (facts["policy"], facts["verify_width"]) == ("lookups", 8)
        for width in (8, 3):
            plain = load_servable("default", f"fixed:{width}", loaded=embedded_drafts.model)
            engine = Engine(plain.model, plain.policy, plain.profile)
            choice = completion(client, repeated, max_tokens=24, verify_width=width)["choices"][0]
            assert choice["text"] == alone(engine, repeated, 24)
            assert choice["flexquant"]["num_found"] > 0
            assert choice["flexquant"]["acceptance_by_position"] == []
            engine.close()
        assert choice["flexquant"]["policy"] == "lookups:verify=3"
        error = refusal(client.post("/v1/completions", json={"prompt": "x", "verify_width": 7}), 400)
        assert "must be a stored width (3, 4, 5, 6, 8)" in error["message"]
        assert "of the drafts" not in error["message"]


def test_models_and_health(server: Running) -> None:
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
        (entry,) = client.get("/v1/models").json()["data"]
        assert client.get("/v1/models/tiny-code-llama").json() == entry
        assert refusal(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert entry["id"] == "tiny-code-llama"
    facts = entry["flexquant"]
    assert facts["bit_widths"] == [3, 4, 5, 6, 8]
    assert facts["verify_width"] == 8
    assert facts["why_no_dial"].endswith("has no dial: it drafts, and its text is that of 8 bits.")
    assert facts["max_length"] == 512


def test_prompts_that_are_judged_alone_count(embedded_drafts: Servable) -> None:
    with running(embedded_drafts) as server, server.client() as client:
        read = 0
        for prompt, asked in ((PROMPTS[0], 0), ([5], 0), (PROMPTS[1], 2)):  # a single token is judged by nothing
            answer = completion(client, prompt, max_tokens=asked, echo=True, logprobs=0)
            read += answer["usage"]["prompt_tokens"]
            assert server.metric('flexquant_tokens_total{kind="prompt"}') == read
        assert server.metric('flexquant_tokens_total{kind="generated"}') == 2


def test_a_character_in_parts_has_its_bytes(embedded_drafts: Servable) -> None:
    text = "😀"
    found, ask = SimpleNamespace(found=embedded_drafts), SimpleNamespace()
    _, *ids = encode(embedded_drafts.model, text).tolist()  # but for the token that begins texts
    choice = Choice(0, ask, found)  # type: ignore[arg-type]
    content = choice.chat_logprobs([TokenLogProbs(token_id, -1.0, ()) for token_id in ids])["content"]
    assert len(content) > 1
    assert b"".join(bytes(entry["bytes"]) for entry in content) == text.encode()


def test_metrics_count_what_happened(embedded_drafts: Servable) -> None:
    with running(embedded_drafts) as server, server.client() as client:
        answer = completion(client, max_tokens=10)
        client.post("/v1/completions", json={"prompt": 3})
        counts = answer["usage"]
        assert server.metric('flexquant_tokens_total{kind="prompt"}') == counts["prompt_tokens"]
        assert server.metric('flexquant_tokens_total{kind="generated"}') == 10
        assert server.metric("flexquant_time_to_first_token_seconds_count") == 1
        assert server.metric("flexquant_time_between_tokens_seconds_count") == 9
        assert server.metric("flexquant_bit_width_sum") == 80
        accepted = sum(answer["choices"][0]["flexquant"]["accepted_drafts"])
        assert server.metric('flexquant_drafts_total{kind="accepted"}') == accepted
        assert server.metric('flexquant_drafts_total{kind="proposed"}') >= accepted
        assert server.metric('flexquant_requests_total{outcome="done"}') == 1
        assert server.metric('flexquant_refused_total{status="400"}') == 1
        assert server.metric("flexquant_queue_length") == server.metric("flexquant_running") == 0
        assert math.isfinite(server.metric("flexquant_time_to_first_token_seconds_sum"))


def test_many_clients_get_what_each_gets_alone(server: Running) -> None:
    """200 requests of 16 clients, half of them streamed: none is lost, none gets another's text."""
    lengths = {prompt: 4 + place for place, prompt in enumerate(PROMPTS)}
    with server.client() as client:
        expected = {
            prompt: completion(client, prompt, max_tokens=lengths[prompt])["choices"][0]["text"] for prompt in PROMPTS
        }
    assert len({*expected.values()}) == len(PROMPTS)

    def ask(number: int) -> list[tuple[str, str]]:
        texts = []
        with server.client() as client:
            for place in range(number, 200, 16):
                prompt = PROMPTS[place % len(PROMPTS)]
                if place % 2:
                    text = completion(client, prompt, max_tokens=lengths[prompt])["choices"][0]["text"]
                else:
                    body = {"prompt": prompt, "max_tokens": lengths[prompt], "temperature": 0, "stream": True}
                    with client.stream("POST", "/v1/completions", json=body) as response:
                        text = "".join(chunk["choices"][0]["text"] for chunk in events(response))
                texts.append((prompt, text))
        return texts

    with ThreadPoolExecutor(16) as pool:
        texts = [found for each in pool.map(ask, range(16)) for found in each]
    assert len(texts) == 200
    assert all(text == expected[prompt] for prompt, text in texts)


def test_the_schema_says_what_is_answered(server: Running) -> None:
    with server.client() as client:
        schema = client.get("/openapi.json").json()
        assert client.get("/openapi.json").json() == schema
        paths = schema["paths"]
        refused = client.post("/v1/completions", json={"prompt": "x", "max_tokens": -1})
        streamed = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "stream": True})
        metrics = client.get("/metrics")
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = paths[path]["post"]["responses"]
        assert set(answers) == {"200", "400", "401", "404", "408", "413", "415", "421", "429", "500", "503"}
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
        assert answers["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    assert str(refused.status_code) in paths["/v1/completions"]["post"]["responses"]
    assert set(refused.json()["error"]) == set(schema["components"]["schemas"]["ErrorFacts"]["required"])
    assert streamed.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert list(paths["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "422" not in json.dumps(paths)
    assert "HTTPValidationError" not in json.dumps(schema)
