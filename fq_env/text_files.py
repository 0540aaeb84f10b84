"""From the bytes of a text file to documents: its encoding, its rows, and where long text is cut.

A file is read block by block and its documents are kept as UTF-8, so that reading takes little more than the memory of
the file: a Python string with one emoji takes four bytes for every character.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.json_rows import field_names, row_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A document ends with the first paragraph that reaches _CHUNK_CHARS; a paragraph is cut only where it is much longer.
_CHUNK_CHARS = 4000
_LONGEST_CHARS = 2 * _CHUNK_CHARS
_BLOCK_BYTES = 1 << 18
# The byte-order mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Documents(Sequence[str]):
    """Texts, kept as UTF-8.

    Args:
        texts: The documents, without lone surrogates.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._encoded = [text.encode() for text in texts]

    def append(self, encoded: bytes) -> None:
        """Adds a document that is encoded already."""
        self._encoded.append(encoded)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each document."""
        return [*map(len, self._encoded)]

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [encoded.decode() for encoded in self._encoded[index]]
        return self._encoded[index].decode()


def documents_of(
    path: Path, *, text_field: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[str]:
    """Yields the documents of a file, of about 4,000 characters each.

    A document ends at a blank line (in a file with fewer than two of them at a line's end), in a `.jsonl` file at the
    end of a row. A paragraph or row of more than 8,000 characters is cut at a line's end, else between words.

    Args:
        path: UTF-8, or UTF-16 and UTF-32 with a byte-order mark; `.jsonl`: a JSON value in every line.
        text_field: As for `row_text`.
        tokenizer: As for `row_text`.

    Raises:
        InputError: If the file is missing, not text, or without any.
    """
    if is_jsonl(path):
        documents = _grouped(_rows(path, text_field, tokenizer), "\n\n")
    else:
        whole = (1 for _, is_whole in _pieces(_blocks(path), "\n\n") if is_whole)
        blank_lines = sum(itertools.islice(whole, 3)) - 1
        separator = "\n\n" if blank_lines >= 2 else "\n"
        documents = _grouped(_pieces(_blocks(path), separator), separator)
    first = next(documents, None)
    if first is None:
        raise InputError(_no_text(path))
    yield first
    yield from documents


def is_jsonl(path: Path) -> bool:
    """Whether each line of a file is a JSON value, by its name."""
    return path.suffix.lower() == ".jsonl"


def _no_text(path: Path) -> str:
    for _, row in _json_lines(path) if is_jsonl(path) else ():
        return f"{path} is empty of text, its rows hold {field_names(row)}; give rows with strings"
    return f"{path} is empty; give a file with text"


def _blocks(path: Path) -> Iterator[str]:
    """The text of a file, block by block, lines ended by a newline."""
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file; --text takes text files")
        with path.open("rb") as stream:
            yield from _decoded(path, stream)
    except (OSError, ValueError) as error:  # a name that no system takes, e.g. with a NUL, is a ValueError
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(path)!r} cannot be read ({reason}); --text takes text files") from error


def _decoded(path: Path, stream: io.BufferedReader) -> Iterator[str]:
    head = stream.read(4)
    stream.seek(0)
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    offset = 0
    while True:
        data = stream.read(_BLOCK_BYTES)
        begin = offset - len(decoder.getstate()[0])  # the first bytes of a character may wait from the block before
        try:
            text = newlines.decode(data, final=not data)
        except UnicodeDecodeError as error:
            name = encoding.upper().removesuffix("-SIG")
            raise InputError(
                f"{path} is not {name} text ({error.reason} at byte {begin + error.start}); convert it to UTF-8"
            ) from error
        if "\0" in text:
            raise InputError(
                f"{path} holds NUL characters, as binary files and UTF-16 without a byte-order mark do; "
                "convert it to UTF-8 text"
            )
        offset += len(data)
        yield text
        if not data:
            return


def _pieces(blocks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Splits text at a separator; with each piece whether it ends at one, and not only at the limit of its length."""
    text = ""
    for block in blocks:
        text += block
        begin = 0
        while True:
            end = text.find(separator, begin, begin + _LONGEST_CHARS + len(separator))
            # An end that is only just not there yet, as the half of a blank line, is waited for.
            if end < 0 and len(text) - begin <= _LONGEST_CHARS + len(separator):
                break
            if end < 0:
                end = _place_to_cut(text, begin)
                yield text[begin:end], False
                begin = end
            else:
                yield text[begin:end], True
                begin = end + len(separator)
        text = text[begin:]
    yield from _cut(text)


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of one paragraph, as `_pieces` yields them."""
    begin = 0
    while len(text) - begin > _LONGEST_CHARS:
        end = _place_to_cut(text, begin)
        yield text[begin:end], False
        begin = end
    yield text[begin:], True


def _place_to_cut(text: str, begin: int) -> int:
    """Where a piece of about a document's size ends that begins at `begin`: after a line, a word, else anywhere."""
    end = begin + _CHUNK_CHARS
    for mark in "\n ":
        place = text.rfind(mark, begin + _CHUNK_CHARS // 2, end)
        if place >= 0:
            return place + 1
    return end


def _grouped(pieces: Iterable[tuple[str, bool]], separator: str) -> Iterator[str]:
    """Joins pieces to documents; those that were cut off are documents of their own."""
    group, size = list[str](), 0
    for piece, is_whole in pieces:
        if not piece.strip():
            continue
        if is_whole:
            group.append(piece)
            size += len(piece)
        if group and (size >= _CHUNK_CHARS or not is_whole):
            yield separator.join(group)
            group, size = [], 0
        if not is_whole:
            yield piece
    if group:
        yield separator.join(group)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a `.jsonl` file, each with its file and line in words."""
    waiting = list[str]()  # of a line that is longer than a block
    number = 0
    # Not splitlines(): JSON strings may hold U+2028 and other separators as they are.
    for block in itertools.chain(_blocks(path), ["\n"]):
        *lines, rest = block.split("\n")
        for line in lines:
            waiting.append(line)
            number += 1
            whole = "".join(waiting)
            waiting = []
            if whole.strip():
                yield f"{path} line {number}", _parsed(whole, f"{path} line {number}")
        waiting.append(rest)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply to be read; leave the line out") from error
    except ValueError as error:  # also a number of more digits than Python reads
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise InputError(f"{where} is not JSON ({reason}); fix the line") from error


def _rows(path: Path, text_field: str | None, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[str, bool]]:
    for where, row in _json_lines(path):
        yield from _cut(row_text(row, where, text_field=text_field, tokenizer=tokenizer))
