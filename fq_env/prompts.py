"""Text as token windows, split so that policies are trained, chosen and judged on different text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
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
PROFILE_WINDOWS = 12
"""Training windows that a profile's sensitivities are measured on, `spread` over the text."""
_CHUNK_CHARS = 4000
_MAX_WINDOWS = 8192
# Shares of the hash space for text files, in percent; the rest is for training.
_VALIDATION_PERCENT, _TEST_PERCENT = 15, 25


class PromptWindows:
    """Windows of `prompt + continuation + 1` tokens, by split; a split is cut when it is first asked for.

    So that training never opens test text: what it does not ask for is neither tokenised nor seen.

    Args:
        cut: Gives the windows of a split, `[n, length]` int64; those of `train` overlap by half, others are disjoint.
        source: Where the text came from, for reports.
    """

    def __init__(self, cut: Callable[[Split], Tensor], source: str) -> None:
        self.source = source
        self._cut = cut
        self._opened: dict[Split, Tensor] = {}

    @property
    def opened(self) -> frozenset[Split]:
        """The splits that have been asked for."""
        return frozenset(self._opened)

    def split(self, name: Split) -> Tensor:
        """The windows of a split, `[n, length]` int64.

        Raises:
            InputError: If it has none.
        """
        if name not in self._opened:
            self._opened[name] = self._cut(name)
        return self._opened[name]

    @property
    def train(self) -> Tensor:
        """Windows to train on."""
        return self.split("train")

    @property
    def validation(self) -> Tensor:
        """Windows to choose by."""
        return self.split("validation")

    @property
    def test(self) -> Tensor:
        """Windows to judge on."""
        return self.split("test")


def load_windows(
    tokenizer: PreTrainedTokenizerBase, length: int, texts: Sequence[Path] = (), *, max_windows: int = _MAX_WINDOWS
) -> PromptWindows:
    """Reads text and splits it. Each window begins with the model's BOS token where it has one.

    Args:
        tokenizer: Tokenizer of the model.
        length: Tokens per window.
        texts: Files (`.jsonl`: the string fields of each row; anything else: plain text); none: the parts of Python's
            standard library that the embedded model has not seen.
        max_windows: Cap per split; windows are thinned out evenly.

    Raises:
        InputError: If a file is missing, unreadable or empty, or a split is too short to have a window.
    """
    source = ", ".join(path.name for path in texts) if texts else "Python standard library (held-out modules)"
    documents = file_documents(texts) if texts else None
    for name, parts in (documents or {}).items():
        # A token has a byte at least. A split that fails this has no window, and is found out before it is opened.
        if max((len(part.encode()) for part in parts), default=0) < length - 1:
            raise _no_window(source, name, parts, length)

    def cut(name: Split) -> Tensor:
        parts = _stdlib_documents(name) if documents is None else documents[name]
        windows = cut_windows(tokenizer, parts, length, length // 2 if name == "train" else length - 1)
        if not len(windows):
            raise _no_window(source, name, parts, length)
        return spread(windows, max_windows)

    return PromptWindows(cut, source)


def _no_window(source: str, name: Split, parts: Sequence[str], length: int) -> InputError:
    return InputError(
        f"{source}: the {name} split ({sum(map(len, parts))} characters) holds no window of {length} tokens; "
        "give more text, or shorter episodes with --env.prompt-tokens and --env.max-new-tokens"
    )


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


def _stdlib_documents(split: Split) -> list[str]:
    try:
        return list(stdlib_text(_STDLIB_SPLITS[split]).values())
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
