"""Text as token windows, split so that policies are trained, chosen and judged on different text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flexquant_rl.engine.control.profile import num_profile_windows
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.stdlib_text import stdlib_text
from flexquant_rl.fq_env.text_files import Documents, documents_of, is_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]

_STDLIB_SPLITS: dict[Split, Literal["policy-train", "validation", "test"]] = {
    "train": "policy-train",
    "validation": "validation",
    "test": "test",
}
_MAX_WINDOWS = 8192
# Of a longer split only documents for the windows that are wanted are tokenised, a second for each megabyte.
_READ_WHOLE_BYTES = 4 << 20
_SAMPLED_DOCUMENTS = 64
# Shares of the hash space for text files, in percent; the rest is for training.
_VALIDATION_PERCENT, _TEST_PERCENT = 15, 25


class PromptWindows:
    """Windows of `prompt + continuation + 1` tokens, by split; a split is cut when it is first asked for.

    So that training never opens test text: what it does not ask for is neither tokenised nor seen.

    Args:
        cut: Gives the windows of a split, `[n, length]` int64, and the document of each, `[n]` int64; windows of
            `train` overlap by half, others are disjoint.
        source: Where the text came from, for reports.
    """

    def __init__(self, cut: Callable[[Split], tuple[Tensor, Tensor]], source: str) -> None:
        self.source = source
        self._cut = cut
        self._opened: dict[Split, tuple[Tensor, Tensor]] = {}

    @property
    def opened(self) -> frozenset[Split]:
        """The splits that have been asked for."""
        return frozenset(self._opened)

    def split(self, name: Split) -> Tensor:
        """The windows of a split, `[n, length]` int64.

        Raises:
            InputError: If it has none.
        """
        return self._open(name)[0]

    def documents(self, name: Split) -> Tensor:
        """The document of each window of a split, `[n]` int64, the unit that intervals resample.

        Windows of one document share their subject and their difficulty.

        Raises:
            InputError: If the split has no window.
        """
        return self._open(name)[1]

    def _open(self, name: Split) -> tuple[Tensor, Tensor]:
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
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    texts: Sequence[Path] = (),
    *,
    text_field: str | None = None,
    max_windows: int = _MAX_WINDOWS,
    shorter: str = "where there are episodes, shorter ones with --env.prompt-tokens and --env.max-new-tokens",
) -> PromptWindows:
    """Reads text and splits it. Each window begins with the model's BOS token where it has one.

    Args:
        tokenizer: Tokenizer of the model.
        length: Tokens per window.
        texts: Files, as for `documents_of`; none: the parts of Python's standard library that the embedded model has
            not seen.
        text_field: As for `row_text`.
        max_windows: Cap per split; windows are thinned out evenly. Of much longer files the documents are thinned out
            first, and only those that are left are tokenised.
        shorter: What to do, beside giving more text, where a split has no window, for the message.

    Raises:
        InputError: If a file is missing, unreadable or empty, or a split is too short to have a window.
    """
    source = ", ".join(path.name for path in texts) if texts else "Python standard library (held-out modules)"
    files = file_documents(texts, tokenizer=tokenizer, text_field=text_field)
    for name, documents in files.items() if texts else ():
        # A token has a byte at least. A split that fails this has no window, and is found out before it is opened.
        if max(documents.sizes, default=0) < length - 1:
            raise _no_window(source, name, documents, length, shorter)

    def cut(name: Split) -> tuple[Tensor, Tensor]:
        stride = length // 2 if name == "train" else length - 1
        parts: Sequence[str] = files[name] if texts else stdlib_documents(name)
        if sum(files[name].sizes) > _READ_WHOLE_BYTES:
            parts = thinned(tokenizer, parts, length, stride, max_windows)
        windows, documents = cut_windows(tokenizer, parts, length, stride)
        if not len(windows):
            raise _no_window(source, name, parts, length, shorter)
        return spread(windows, max_windows), spread(documents, max_windows)

    return PromptWindows(cut, source)


def thinned(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, stride: int, num_windows: int
) -> Sequence[str]:
    """Documents evenly spaced from first to last that hold somewhat more than `num_windows` windows, by a sample."""
    sample = _spaced(documents, _SAMPLED_DOCUMENTS)
    found = len(cut_windows(tokenizer, sample, length, stride)[0])
    return _spaced(documents, math.ceil(1.25 * len(sample) * num_windows / found)) if found else documents


def _spaced(documents: Sequence[str], count: int) -> Sequence[str]:
    return [documents[index] for index in spread(torch.arange(len(documents)), count).tolist()]


def _no_window(source: str, name: Split, parts: Sequence[str], length: int, shorter: str) -> InputError:
    return InputError(
        f"{source}: the {name} split ({sum(map(len, parts))} characters) holds no window of {length} tokens; "
        f"give more text (or, {shorter})"
    )


def spread(items: Tensor, count: int) -> Tensor:
    """`count` of the items along the first axis, evenly spaced from first to last; all where there are fewer."""
    return items[torch.linspace(0, len(items) - 1, min(count, len(items)), dtype=torch.float32).round().long()]


def profile_windows(model: NestedCausalLM, train: Tensor) -> Tensor:
    """What a profile reads of training windows `[n, length]`: `[m, length - 1]`, fewer for larger models."""
    read = train[:, :-1]
    return spread(read, num_profile_windows(model, read.shape[1]))


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Cuts each document on its own into windows; the remainder of a document is left out.

    Returns:
        The windows, `[n, length]` int64, and the index of each one's document, `[n]` int64.
    """
    bos = tokenizer.bos_token_id
    body = length - (bos is not None)
    rows, owners = [], []
    for index, document in enumerate(documents):
        ids = torch.tensor(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        if len(ids) >= body:
            rows.append(ids.unfold(0, body, stride))
            owners.append(torch.full((len(rows[-1]),), index))
    if not rows:
        return torch.zeros(0, length, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    windows = torch.cat(rows)
    if bos is not None:
        windows = torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)
    return windows, torch.cat(owners)


def file_documents(
    texts: Sequence[Path], *, tokenizer: PreTrainedTokenizerBase | None = None, text_field: str | None = None
) -> dict[Split, Documents]:
    """Cuts files into documents and assigns each to a split by the hash of its own text.

    Args:
        texts: Files, as for `documents_of`.
        tokenizer: As for `row_text`.
        text_field: As for `row_text`.

    Raises:
        InputError: If a file is missing, not text, or empty, or a field is named that no file can have.
    """
    if text_field is not None and not any(map(is_jsonl, texts)):
        raise InputError(f"--text-field {text_field}: no --text file is a .jsonl file; leave --text-field out")
    splits: dict[Split, Documents] = {"train": Documents(), "validation": Documents(), "test": Documents()}
    for path in texts:
        for document in documents_of(path, text_field=text_field, tokenizer=tokenizer):
            encoded = document.encode()
            position = hashlib.sha256(encoded).digest()[0] * 100 // 256
            if position < _TEST_PERCENT:
                splits["test"].append(encoded)
            elif position < _TEST_PERCENT + _VALIDATION_PERCENT:
                splits["validation"].append(encoded)
            else:
                splits["train"].append(encoded)
    return splits


def stdlib_documents(split: Split) -> list[str]:
    """The held-out standard library's files of a split; InputError where it is not installed."""
    try:
        return list(stdlib_text(_STDLIB_SPLITS[split]).values())
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
