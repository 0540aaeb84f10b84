"""Text as token windows, split so that policies are trained, chosen and judged on different text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.stdlib_text import stdlib_text

Split = Literal["train", "validation", "test"]

_STDLIB_SPLITS: dict[Split, Literal["policy-train", "validation", "test"]] = {
    "train": "policy-train",
    "validation": "validation",
    "test": "test",
}
_CHUNK_CHARS = 4000
_MAX_WINDOWS = 8192
# Shares of the hash space for text files, in percent; the rest is for training.
_VALIDATION_PERCENT, _TEST_PERCENT = 15, 25


@dataclass(frozen=True)
class PromptWindows:
    """Windows of `prompt + continuation + 1` tokens, by split.

    Attributes:
        train: `[n, length]` int64, half overlapping.
        validation: `[n, length]` int64, disjoint windows.
        test: `[n, length]` int64, disjoint windows.
        source: Where the text came from, for reports.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    source: str

    def split(self, name: Split) -> Tensor:
        """The windows of a split."""
        windows: Tensor = getattr(self, name)
        return windows


def load_windows(
    tokenizer: PreTrainedTokenizerBase, length: int, texts: Sequence[Path] = (), *, max_windows: int = _MAX_WINDOWS
) -> PromptWindows:
    """Reads text, splits it and cuts it into windows, each beginning with the model's BOS token where it has one.

    Args:
        tokenizer: Of the model.
        length: Tokens per window.
        texts: Files (`.jsonl`: the string fields of each row; anything else: plain text); none: the parts of Python's
            standard library that the embedded model has not seen.
        max_windows: Cap per split; windows are thinned out evenly.

    Raises:
        InputError: If a file is missing, unreadable or empty, or a split has no window.
    """
    documents = file_documents(texts) if texts else _stdlib_documents()
    source = ", ".join(path.name for path in texts) if texts else "Python standard library (held-out modules)"
    found = {}
    for split, parts in documents.items():
        stride = length // 2 if split == "train" else length - 1
        windows = cut_windows(tokenizer, parts, length, stride)
        if not len(windows):
            raise InputError(
                f"{source}: the {split} split ({sum(map(len, parts))} characters) holds no window of {length} tokens; "
                "give more text, or shorter episodes with --env.prompt-tokens and --env.max-new-tokens"
            )
        found[split] = spread(windows, max_windows)
    return PromptWindows(found["train"], found["validation"], found["test"], source)


def spread(items: Tensor, count: int) -> Tensor:
    """`count` of the items along the first axis, evenly spaced from first to last; all where there are fewer."""
    return items[torch.linspace(0, len(items) - 1, min(count, len(items))).round().long()]


def cut_windows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, stride: int) -> Tensor:
    """Cuts each document on its own into windows, `[n, length]` int64; the remainder of a document is left out."""
    bos = tokenizer.bos_token_id
    body = length - (bos is not None)
    rows = []
    for document in documents:
        ids = torch.tensor(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        if len(ids) >= body:
            rows.append(ids.unfold(0, body, stride))
    if not rows:
        return torch.zeros(0, length, dtype=torch.int64)
    windows = torch.cat(rows)
    if bos is not None:
        windows = torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)
    return windows


def file_documents(texts: Sequence[Path]) -> dict[Split, list[str]]:
    """Cuts files into chunks at blank lines and assigns each chunk to a split by the hash of its own text.

    Raises:
        InputError: If a file is missing, not text, or empty.
    """
    splits: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    for path in texts:
        for chunk in _chunks(_read(path)):
            position = hashlib.sha256(chunk.encode()).digest()[0] * 100 // 256
            if position < _TEST_PERCENT:
                splits["test"].append(chunk)
            elif position < _TEST_PERCENT + _VALIDATION_PERCENT:
                splits["validation"].append(chunk)
            else:
                splits["train"].append(chunk)
    return splits


def _stdlib_documents() -> dict[Split, list[str]]:
    try:
        return {name: list(stdlib_text(split).values()) for name, split in _STDLIB_SPLITS.items()}
    except FileNotFoundError as error:
        raise InputError(str(error)) from error


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path} is not a file; --text takes text files")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    if path.suffix == ".jsonl":
        lines = text.split("\n")  # not splitlines(): JSON strings may hold U+2028 and other separators as they are
        text = "\n\n".join(_jsonl_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not text.strip():
        raise InputError(f"{path} is empty; give a file with text")
    return text


def _jsonl_row(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {number} is not JSON ({error.msg}); fix the line") from error
    return "\n".join(value for value in row.values() if isinstance(value, str)) if isinstance(row, dict) else str(row)


def _chunks(text: str) -> list[str]:
    """Chunks of about `_CHUNK_CHARS` characters that end at a blank line where there is one, else at a line's end."""
    separator = "\n\n" if text.count("\n\n") >= 2 else "\n"
    paragraphs = text.split(separator)
    chunks, current, size = [], list[str](), 0
    for paragraph in paragraphs:
        if not paragraph.strip():
            continue
        current.append(paragraph)
        size += len(paragraph)
        if size >= _CHUNK_CHARS:
            chunks.append(separator.join(current))
            current, size = [], 0
    if current:
        chunks.append(separator.join(current))
    return chunks
