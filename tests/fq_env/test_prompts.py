"""Windows of text and their split into train, validation and test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.prompts import PromptWindows, cut_windows, file_documents, load_windows

LENGTH = 21
SPLITS = ("train", "validation", "test")


def decoded(tokenizer: PreTrainedTokenizerFast, windows: torch.Tensor) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in windows]


def equal(one: PromptWindows, other: PromptWindows) -> bool:
    return all(torch.equal(one.split(name), other.split(name)) for name in SPLITS)


def test_windows_have_the_length_and_begin_with_bos(tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    windows = load_windows(tiny_tokenizer, LENGTH, [text_file])
    for name in SPLITS:
        rows = windows.split(name)
        assert rows.dtype == torch.int64
        assert rows.shape[1] == LENGTH
        assert (rows[:, 0] == tiny_tokenizer.bos_token_id).all()
        assert (rows[:, 1:] != tiny_tokenizer.bos_token_id).all()
    assert windows.source == "words.txt"


def test_windows_are_the_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    windows, documents = cut_windows(tiny_tokenizer, ["abcdefgh", "xy", "123456"], 4, 3)
    assert decoded(tiny_tokenizer, windows) == ["abc", "def", "123", "456"]
    assert documents.tolist() == [0, 0, 2, 2], "a document without a window keeps its number"


def test_without_bos_neighbours_share_the_target(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.bos_token = None
    windows, _ = cut_windows(tiny_tokenizer, ["abcdefg"], 4, 3)
    assert decoded(tiny_tokenizer, windows) == ["abcd", "defg"]


def test_training_windows_overlap_and_the_others_do_not(
    tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    documents = file_documents([text_file])
    windows = load_windows(tiny_tokenizer, LENGTH, [text_file])
    for name, stride in (("train", LENGTH // 2), ("validation", LENGTH - 1), ("test", LENGTH - 1)):
        expected = [
            document[start : start + LENGTH - 1]
            for document in documents[name]
            for start in range(0, len(document) - LENGTH + 2, stride)
        ]
        assert decoded(tiny_tokenizer, windows.split(name)) == expected
        owners = windows.documents(name).tolist()
        for text, owner in zip(decoded(tiny_tokenizer, windows.split(name)), owners, strict=True):
            assert text in documents[name][owner]


def test_splits_hold_different_text(text_file: Path) -> None:
    documents = file_documents([text_file])
    chunks = [chunk for name in SPLITS for chunk in documents[name]]
    assert len(chunks) == len(set(chunks))
    assert all(documents[name] for name in SPLITS)
    paragraphs = [paragraph for chunk in chunks for paragraph in chunk.split("\n\n")]
    assert sorted(paragraphs) == sorted(text_file.read_text(encoding="utf-8").split("\n\n"))


def test_reading_twice_gives_the_same(tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    assert equal(
        load_windows(tiny_tokenizer, LENGTH, [text_file]),
        load_windows(tiny_tokenizer, LENGTH, [text_file]),
    )


def test_another_file_moves_no_text_between_splits(text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    alone, both = file_documents([text_file]), file_documents([other, text_file])
    for name in SPLITS:
        assert both[name][-len(alone[name]) :] == [*alone[name]]


def test_the_same_text_twice_stays_in_one_split(text_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text_file.read_bytes())
    documents = file_documents([text_file, copy])
    for name in SPLITS:
        half = len(documents[name]) // 2
        assert documents[name][:half] == documents[name][half:]


def test_blank_lines_survive(tmp_path: Path) -> None:
    path = tmp_path / "code.txt"
    source = "import re\n\n\ndef one():\n    return 1\n\n\ndef two():\n    return 2"
    path.write_text(source, encoding="utf-8")
    assert [chunk for chunks in file_documents([path]).values() for chunk in chunks] == [source]


def test_text_without_blank_lines_is_cut_at_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"line {number} of a long list" for number in range(2000)), encoding="utf-8")
    chunks = [chunk for chunks in file_documents([path]).values() for chunk in chunks]
    assert len(chunks) > 8
    assert all(chunk.startswith("line ") and chunk.endswith(" of a long list") for chunk in chunks)


def test_windows_are_thinned_out_evenly(tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    every = load_windows(tiny_tokenizer, LENGTH, [text_file])
    few = load_windows(tiny_tokenizer, LENGTH, [text_file], max_windows=5)
    for name in SPLITS:
        rows, thinned = every.split(name), few.split(name)
        assert len(thinned) == 5
        assert torch.equal(thinned[[0, -1]], rows[[0, -1]])
        assert torch.equal(few.documents(name)[[0, -1]], every.documents(name)[[0, -1]])


def test_jsonl_fields_become_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # U+2028 is a line separator to str.splitlines(), and is allowed in JSON strings.
    rows = [{"question": "one\u2028two", "answer": "three", "id": 4}, "plain", {"question": "five"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([*lines, "  ", ""]), encoding="utf-8")
    (chunk,) = [chunk for chunks in file_documents([path]).values() for chunk in chunks]
    assert chunk == "one\u2028two\nthree\n\nplain\n\nfive"


def fail(tmp_path: Path, content: bytes | None, name: str = "text.txt") -> str:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        file_documents([path])
    message = str(error.value)
    assert "\n" not in message
    assert name in message
    return message


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (None, "missing.txt", "is not a file; --text takes text files"),
        (b"", "empty.txt", "is empty; give a file with text"),
        (b" \n\n \n", "blank.txt", "is empty; give a file with text"),
        (b"caf\xe9", "latin.txt", "is not UTF-8 text (unexpected end of data at byte 3); convert it"),
        (b'{"a": "b"}\n{"a": \n', "broken.jsonl", "line 2 is not JSON"),
        (b'{"a": 1}\n', "numbers.jsonl", "is empty"),
        (b"", "empty.jsonl", "is empty"),
    ],
    ids=["missing", "empty", "blank", "encoding", "json", "no-text", "empty-json"],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, content: bytes | None, name: str, says: str) -> None:
    assert says in fail(tmp_path, content, name)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        file_documents([tmp_path])


def test_too_little_text_says_which_split(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short", encoding="utf-8")
    with pytest.raises(InputError, match=r"short\.txt: the \w+ split .* holds no window of 21 tokens") as error:
        load_windows(tiny_tokenizer, LENGTH, [path])
    assert "\n" not in str(error.value)
    assert "--env.prompt-tokens" in str(error.value)


def test_windows_longer_than_the_text_are_refused(tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    with pytest.raises(InputError, match="no window of 9999 tokens"):
        load_windows(tiny_tokenizer, 9999, [text_file])


def test_a_split_is_opened_when_it_is_asked_for(text_file: Path) -> None:
    class Spy:
        bos_token_id = None
        seen: list[str]

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            self.seen.append(text)
            return {"input_ids": [*range(len(text))]}

    spy = Spy()
    spy.seen = []
    windows = load_windows(spy, LENGTH, [text_file])  # type: ignore[arg-type]
    assert windows.opened == frozenset()
    assert not spy.seen
    documents = file_documents([text_file])
    assert windows.train is windows.train
    assert spy.seen == [*documents["train"]]
    assert windows.opened == {"train"}
    _ = windows.validation
    assert windows.opened == {"train", "validation"}
    assert not set(documents["test"]) & set(spy.seen)
