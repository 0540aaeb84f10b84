"""The text that weights are fitted to: windows of one split of some files, each file with its share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.calibration import Calibration
from flexquant_rl.fq_env.prompts import Split, cut_windows, file_documents, spread, stdlib_documents, thinned
from flexquant_rl.fq_env.text_files import is_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a window, and windows that moments are taken of: 16,384 tokens are 23 for each input of the embedded model's
# widest linear.
_WINDOW_TOKENS, _MOMENT_WINDOWS = 256, 64
# Windows that decide what is kept of tuning: a pass over them takes about as long as two steps.
_HELD_OUT_WINDOWS = 8


@dataclass(frozen=True)
class CalibrationText:
    """Files that weights are fitted to.

    Attributes:
        files: Text files; none stands for the held-out standard library.
        weights: How much of the windows each file gives, one positive number for each; none: as much as it is long.
        text_field: As for `row_text`, in files that have rows.
    """

    files: tuple[Path, ...] = ()
    weights: tuple[float, ...] = ()
    text_field: str | None = None

    def check(self) -> None:
        """Raises InputError if a file is missing or the weights are not one positive number for each."""
        for path in self.files:
            if not path.is_file():
                raise InputError(f"{path} is not a file; --calibration takes text files")
        if not self.weights:
            return
        given = " ".join(f"{weight:g}" for weight in self.weights)
        if len(self.weights) != len(self.files):
            raise InputError(
                f"--calibration-weights {given}: {len(self.weights)} numbers for {len(self.files)} files of "
                "--calibration; give one for each file, or none"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise InputError(
                f"--calibration-weights {given}: each must be a positive number; leave a file out that shall count "
                "nothing"
            )

    def fitting_windows(
        self, tokenizer: PreTrainedTokenizerBase, context: int, tune_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Windows of training text, `[n, T]` and `[m, T]` int64: to take moments of, and to tune on in so many steps.

        Moments are taken of the same windows whatever is tuned.

        Args:
            tokenizer: Tokenizer of the model.
            context: Tokens that the model can attend to.
            tune_steps: 0 where nothing is tuned.

        Raises:
            InputError: As `windows`.
        """
        tokens = min(_WINDOW_TOKENS, context)
        moments = self.windows(tokenizer, "train", tokens, _MOMENT_WINDOWS)
        if tune_steps <= _MOMENT_WINDOWS:
            return moments, moments
        return moments, self.windows(tokenizer, "train", tokens, tune_steps)

    def held_out_windows(self, tokenizer: PreTrainedTokenizerBase, context: int) -> Tensor:
        """Windows of validation text, `[n, T]` int64, that decide what is kept of tuning."""
        return self.windows(tokenizer, "validation", min(_WINDOW_TOKENS, context), _HELD_OUT_WINDOWS)

    def windows(self, tokenizer: PreTrainedTokenizerBase, split: Split, tokens: int, count: int) -> Tensor:
        """Windows of a split, `[n, tokens]` int64, evenly spaced over it; `count`, or what there is.

        With weights each file gives its share, and one that has fewer windows than that gives them several times.

        Raises:
            InputError: If the split, or with weights that of one file, has no window.
        """
        self.check()
        if not self.weights:
            return spread(self._cut(tokenizer, self.files, split, tokens, count), count)
        parts = [
            self._cut(tokenizer, (file,), split, tokens, number)
            for file, number in zip(self.files, shares(self.weights, count), strict=True)
        ]
        # Not more than the file that has most for its share can give without giving a window twice.
        most = max(len(part) * sum(self.weights) / weight for part, weight in zip(parts, self.weights, strict=True))
        numbers = shares(self.weights, min(count, math.ceil(most)))
        return torch.cat([_exactly(part, number) for part, number in zip(parts, numbers, strict=True)])

    def facts(self, calibration: Calibration) -> Calibration:
        """The description of these windows with the names and weights of the files."""
        return Calibration(
            calibration.num_tokens, calibration.sha256, tuple(path.name for path in self.files), self.weights
        )

    def _cut(
        self, tokenizer: PreTrainedTokenizerBase, files: tuple[Path, ...], split: Split, tokens: int, count: int
    ) -> Tensor:
        """The windows of some files together: all, or of long files somewhat more than `count`."""
        # One set of files may have rows and another none.
        field = self.text_field if any(map(is_jsonl, files)) else None
        documents = (
            file_documents(files, tokenizer=tokenizer, text_field=field)[split] if files else stdlib_documents(split)
        )
        chosen = thinned(tokenizer, documents, tokens, tokens - 1, count)
        windows, _ = cut_windows(tokenizer, chosen, tokens, tokens - 1)
        if not len(windows):
            name = "training" if split == "train" else split
            where = f"{files[0]}: its" if len(files) == 1 else "the calibration text's"
            without = "" if split == "train" else ", or --tune-steps 0, which needs no such split"
            raise InputError(
                f"{where} {name} split ({sum(map(len, documents))} characters) holds no window of {tokens} tokens; "
                f"give more text with --calibration FILE{without}"
            )
        return windows


def shares(weights: tuple[float, ...], count: int) -> list[int]:
    """Whole numbers in these shares that add up to `count` (or one each, where that is more): largest remainders."""
    exact = [count * weight / sum(weights) for weight in weights]
    numbers = [max(1, math.floor(number)) for number in exact]
    behind = sorted(range(len(weights)), key=lambda index: numbers[index] - exact[index])
    for index in behind[: max(0, count - sum(numbers))]:
        numbers[index] += 1
    while sum(numbers) > max(count, len(numbers)):  # those that were raised to one have taken from the largest
        numbers[numbers.index(max(numbers))] -= 1
    return numbers


def _exactly(windows: Tensor, count: int) -> Tensor:
    """`count` windows, evenly spaced; all of them as often as each other, but for one, where there are fewer."""
    return spread(windows, count) if count <= len(windows) else windows[torch.arange(count) * len(windows) // count]
