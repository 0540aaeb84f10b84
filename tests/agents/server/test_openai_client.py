"""The official client of OpenAI against the server: what it sends is understood, what it reads is there."""

from __future__ import annotations

from typing import Any

import pytest
from http_server import Running, completion

openai = pytest.importorskip("openai", reason="needs the package `openai`")

MESSAGES: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "def add(a, b):"}]


@pytest.fixture
def client(dial_server: Running) -> Any:
    return openai.OpenAI(base_url=f"{dial_server.url}/v1", api_key="none", max_retries=0)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-code-llama"]
    assert client.models.retrieve("tiny-code-llama").flexquant["bit_widths"] == [3, 4, 5, 6, 8]


def test_a_completion(client: Any, dial_server: Running) -> None:
    fields: dict[str, Any] = {"model": "tiny-code-llama", "prompt": "def main():", "max_tokens": 8, "temperature": 0}
    found = client.completions.create(**fields, logprobs=1, extra_body={"speed": 1.5})
    with dial_server.client() as plain:
        expected = completion(plain, max_tokens=8, speed=1.5)["choices"][0]
    assert found.choices[0].text == expected["text"]
    assert len(found.choices[0].logprobs.token_logprobs) == 8
    assert found.choices[0].flexquant["bit_widths"] == expected["flexquant"]["bit_widths"]
    chunks = list(client.completions.create(**fields, stream=True, extra_body={"speed": 1.5}))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected["text"]


def test_a_chat_that_goes_on(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny-code-llama", "max_completion_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(messages=MESSAGES, **fields)
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **fields
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    # The answer goes back as the client has it.
    longer = [*MESSAGES, whole.choices[0].message.model_dump(), {"role": "user", "content": "And sub?"}]
    again = client.chat.completions.create(messages=longer, **fields)
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens


def test_refusals_are_the_clients_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="unknown field nonsense") as error:
        client.completions.create(model="tiny-code-llama", prompt="x", extra_body={"nonsense": 1})
    assert error.value.param == "nonsense"
    assert error.value.code == "unknown_field"


def test_a_stream_that_is_left_is_ended(client: Any, dial_server: Running) -> None:
    stream = client.completions.create(model="tiny-code-llama", prompt="def main():", max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="tiny-code-llama", prompt="x", max_tokens=1).usage.completion_tokens == 1
