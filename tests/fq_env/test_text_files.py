"""Text as people have it: byte-order marks, chats, nested rows, one long line, a big file."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env import prompts
from flexquant_rl.fq_env.prompts import file_documents, load_windows
from flexquant_rl.fq_env.text_files import documents_of

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi!"}]
SHARE_GPT = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi!"}]
PLAIN_CHAT = "user: Hello?\nassistant: Hi!"


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_of(row: Any, tmp_path: Path, **options: Any) -> str:
    """The text that a row becomes."""
    (document,) = documents_of(write_rows(tmp_path / "rows.jsonl", row), **options)
    return document


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        [*documents_of(path, **options)]
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_no_text(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("caf\u00e9 \U0001f600\r\nand more".encode(encoding))
    assert [*documents_of(path)] == ["caf\u00e9 \U0001f600\nand more"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("plain words".encode(encoding))
    assert "holds NUL characters, as binary files and UTF-16 without a byte-order mark do; convert" in refusal(path)


def test_a_byte_that_is_wrong_is_named_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    before = ("w\u00f6rds " * 100_000).encode()
    path.write_bytes(before + b"\xff and more")
    assert f"is not UTF-8 text (invalid start byte at byte {len(before)}); convert it" in refusal(path)


@pytest.mark.parametrize("size", [200_000, 1_000_000])
@pytest.mark.parametrize("mark", [" ", "", "\n"])
def test_one_long_line_is_cut_into_documents(size: int, mark: str, tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    text = "".join(f"word{number}{mark}" for number in range(size))[:size]
    path.write_text(text, encoding="utf-8")
    documents = [*documents_of(path)]
    assert max(map(len, documents)) <= 8000
    assert min(map(len, documents[:-1])) > 1900
    assert ("\n" if mark == "\n" else "").join(documents) == text.rstrip("\n")
    assert all(file_documents([path]).values()), "some in every split"


@pytest.mark.parametrize("size", [8000, 8001])
def test_only_a_longer_paragraph_is_cut(size: int, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(["x" * size] * 3), encoding="utf-8")
    assert [len(document) for document in documents_of(path)] == (
        [8000] * 3 if size == 8000 else [4000, 4001, 4000, 4001, 4000, 4001]
    )


def test_one_long_row_is_cut(tmp_path: Path) -> None:
    text = "word " * 40_000
    path = write_rows(tmp_path / "rows.jsonl", {"text": text}, {"text": "last"})
    documents = [*documents_of(path)]
    assert max(map(len, documents)) <= 8000
    assert "".join(documents[:-1]) == text
    assert documents[-1] == "last"


@pytest.mark.parametrize(
    "row",
    [
        {"id": "x-7", "messages": CHAT},
        {"id": "x-7", "conversations": SHARE_GPT},
        {"id": "x-7", "data": {"dialog": CHAT}},
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, CHAT[1]]},
    ],
    ids=["messages", "conversations", "nested", "bare", "parts"],
)
def test_chats_become_role_and_text(row: Any, tmp_path: Path) -> None:
    assert text_of(row, tmp_path) == PLAIN_CHAT


def test_chats_go_through_the_template(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    row = {"id": "x-7", "conversations": SHARE_GPT}
    text = text_of(row, tmp_path, tokenizer=tiny_tokenizer)
    assert text == "[user]Hello?[assistant]Hi!", "without the BOS token, which every window begins with"


def test_a_system_prompt_beside_a_chat_is_part_of_it(tmp_path: Path) -> None:
    assert text_of({"system": "Be brief.", "conversations": SHARE_GPT}, tmp_path) == f"system: Be brief.\n{PLAIN_CHAT}"


def test_a_chat_that_the_template_refuses(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_tokenizer.chat_template = "{{ raise_exception('roles must\\n alternate') }}"
    path = write_rows(tmp_path / "rows.jsonl", {"messages": CHAT})
    expected = f"{path} line 1: the model's chat template refuses this chat (roles must alternate); change the row"
    assert expected in refusal(path, tokenizer=tiny_tokenizer)


def test_a_message_that_is_no_text(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    assert "line 1: a message holds image_url, which is no text" in refusal(write_rows(tmp_path / "rows.jsonl", row))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"id": "x", "data": {"text": "deep"}}, "x\ndeep"),
        ({"lines": ["one", "two"], "n": 3}, "one\ntwo"),
        ([["one", {"a": [["two"]]}], "three"], "one\ntwo\nthree"),
        ({"messages": [{"speaker": "A", "says": "hi"}]}, "A\nhi"),
    ],
)
def test_nested_strings_are_not_dropped(row: Any, text: str, tmp_path: Path) -> None:
    assert text_of(row, tmp_path) == text


@pytest.mark.parametrize(
    ("row", "name", "text"),
    [
        ({"id": "x", "text": "this"}, "text", "this"),
        ({"id": "x", "data": {"text": "this"}}, "data.text", "this"),
        ({"a.b": "this", "a": {"b": "that"}}, "a.b", "this"),
        ({"id": "x", "chat": CHAT, "other": CHAT}, "chat", PLAIN_CHAT),
        ({"id": "x", "parts": ["one", "two"]}, "parts", "one\ntwo"),
    ],
)
def test_a_named_field_is_the_text(row: Any, name: str, text: str, tmp_path: Path) -> None:
    assert text_of(row, tmp_path, text_field=name) == text


def test_a_field_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"text": "a"}, {"id": 1, "data": {"body": "b"}})
    assert f"{path} line 2 has no field 'text'; its fields are 'id', 'data.body'" in refusal(path, text_field="text")


def test_a_field_without_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"id": 17})
    assert "line 1: field 'id' holds no text (17); name one that does" in refusal(path, text_field="id")


def test_a_field_needs_rows(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("words")
    with pytest.raises(InputError, match=r"--text-field body: no --text file is a \.jsonl file; leave"):
        file_documents([path], text_field="body")


def test_rows_without_text_say_what_they_hold(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"id": 17, "data": {"score": 2}})
    assert "its rows hold 'id', 'data.score'; give rows with strings" in refusal(path)


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n', encoding="utf-8")
    assert [*documents_of(path)] == ["a\ufffd b \U0001f600"]
    assert sum(map(len, file_documents([path]).values())) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [("[" * 100_000, "nested too deeply"), ("9" * 10_000, "is not JSON (Exceeds the limit"), ("nul", "is not JSON")],
)
def test_json_that_cannot_be_read(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    message = refusal(path)
    assert f"{path} line 2" in message
    assert says in message


def test_deep_rows_that_can_be_parsed_are_read(tmp_path: Path) -> None:
    depth = 500
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * depth + '"deep"' + "]" * depth, encoding="utf-8")
    assert [*documents_of(path)] == ["deep"]


@pytest.mark.parametrize("name", ["a\0b.txt", "x" * 5000 + ".txt"])
def test_names_that_no_system_takes(name: str) -> None:
    with pytest.raises(InputError, match="cannot be read|is not a file"):
        [*documents_of(Path(name))]


@pytest.mark.parametrize("character", ["x", "\u20ac", "\U0001f600"])
def test_reading_takes_three_bytes_of_memory_for_a_byte(character: str, tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    paragraphs = (f"{number} {'some words of a paragraph ' * 15}{character}\n\n" for number in range(10_000))
    path.write_text("".join(paragraphs), encoding="utf-8")
    [*documents_of(write_rows(tmp_path / "warm.jsonl", "up"))]
    tracemalloc.start()
    documents = file_documents([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(documents.values())
    assert peak < 3 * path.stat().st_size


def test_of_a_long_split_only_what_is_wanted_is_tokenised(
    text_file: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "long.txt"
    words = text_file.read_text(encoding="utf-8")
    path.write_text("\n\n".join(words[shift:] for shift in range(30)), encoding="utf-8")
    monkeypatch.setattr(prompts, "_READ_WHOLE_BYTES", 1)
    monkeypatch.setattr(prompts, "_SAMPLED_DOCUMENTS", 4)
    tokenised: list[str] = []

    class Spy:
        bos_token_id = None

        def __call__(self, text: str, **options: object) -> Any:
            tokenised.append(text)
            return tiny_tokenizer(text, **options)

    windows = load_windows(Spy(), 100, [path], max_windows=200)  # type: ignore[arg-type]
    assert len(windows.test) == 200
    documents = file_documents([path])["test"]
    assert len(documents) > 60
    assert len({*tokenised}) < 0.3 * len(documents)
    assert tokenised[-1] == documents[len(documents) - 1], "evenly spaced, the last one too"
