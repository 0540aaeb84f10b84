"""Windows to fit weights to: shares of several files, splits, and what is refused."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.calibration import Calibration
from flexquant_rl.fq_env.calibration_text import CalibrationText, shares
from flexquant_rl.fq_env.prompts import Split

TOKENS = 32


def write(path: Path, letter: str, documents: int) -> Path:
    """Documents of words of one letter; no two windows are alike."""
    generator = random.Random(letter)
    lengths = [[generator.randint(1, 9) for _ in range(800)] for _ in range(documents)]
    path.write_text("\n\n".join(" ".join(letter * length for length in words) for words in lengths))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A long file of `a` and a short one of `b`."""
    return write(tmp_path / "a.txt", "a", 60), write(tmp_path / "b:2.txt", "b", 12)


def share_of(windows: torch.Tensor, letter: str) -> float:
    """Share of the windows that are of a file of this letter."""
    return float((windows == ord(letter)).any(1).double().mean())


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(("weights", "share"), [((1, 1), 0.5), ((1, 3), 0.75), ((0.9, 0.1), 0.1)])
def test_each_file_gives_its_share(
    files: tuple[Path, Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    weights: tuple[float, ...],
    share: float,
    split: Split,
) -> None:
    windows = CalibrationText(files, weights).windows(tiny_tokenizer, split, TOKENS, 40)
    assert windows.shape == (40, TOKENS)
    assert share_of(windows, "b") == pytest.approx(share)
    assert share_of(windows, "a") == pytest.approx(1 - share)


def test_without_weights_files_count_as_they_are_long(
    files: tuple[Path, Path], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    moments, windows = CalibrationText(files).fitting_windows(tiny_tokenizer, 128, 200)
    assert (moments.shape, windows.shape) == ((64, 128), (200, 128))
    assert 0.05 < share_of(windows, "b") < 0.4
    for steps in (0, 40):  # whatever is tuned, moments are of the same text
        assert all(
            torch.equal(moments, one) for one in CalibrationText(files).fitting_windows(tiny_tokenizer, 128, steps)
        )
    weighted = CalibrationText(files, (1, 3)).fitting_windows(tiny_tokenizer, 128, 200)
    assert share_of(weighted[0], "b") == pytest.approx(0.75, abs=0.02)


def test_a_short_file_gives_windows_several_times(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = CalibrationText((write(tmp_path / "a.txt", "a", 60), write(tmp_path / "b.txt", "b", 5)), (1, 7))
    windows = text.windows(tiny_tokenizer, "train", 1000, 64)
    of_b = windows[(windows == ord("b")).any(1)]
    assert len(of_b) == 56
    counts = of_b.unique(dim=0, return_counts=True)[1]
    assert len(counts) < 20
    assert counts.max() - counts.min() <= 1
    alone = CalibrationText(text.files[1:], (1,)).windows(tiny_tokenizer, "train", 1000, 64)
    assert len(alone.unique(dim=0)) == len(alone) == len(counts), "nothing is given twice without need"


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 300))
def test_shares(weights: list[float], count: int) -> None:
    numbers = shares(tuple(weights), count)
    assert sum(numbers) == max(count, len(weights))
    assert min(numbers) >= 1
    if all(count * weight / sum(weights) >= 1 for weight in weights):
        assert all(
            abs(number - count * weight / sum(weights)) < 1 + 1e-9
            for number, weight in zip(numbers, weights, strict=True)
        )


def test_facts_name_the_files(files: tuple[Path, Path]) -> None:
    facts = CalibrationText(files, (2, 1)).facts(Calibration(9, "abc"))
    assert facts == Calibration(9, "abc", ("a.txt", "b:2.txt"), (2, 1))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1,), "--calibration-weights 1: 1 numbers for 2 files of --calibration; give one for each file"),
        ((1, 0), "--calibration-weights 1 0: each must be a positive number; leave a file out"),
        ((1, -2), "--calibration-weights 1 -2: each must be a positive number"),
        ((1, math.nan), "--calibration-weights 1 nan: each must be a positive number"),
        ((math.inf, 1), "--calibration-weights inf 1: each must be a positive number"),
    ],
)
def test_bad_weights(files: tuple[Path, Path], weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationText(files, weights).check()


def test_bad_files(files: tuple[Path, Path], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="none.txt is not a file; --calibration takes text files"):
        CalibrationText((tmp_path / "none.txt",)).check()
    with pytest.raises(InputError, match="1 numbers for 0 files"):
        CalibrationText((), (1,)).check()
    short = tmp_path / "short.txt"
    short.write_text("too short")
    text = CalibrationText((files[0], short), (1, 1))
    with pytest.raises(InputError, match=r"short.txt: its training split .* no window of 32 tokens; give more text"):
        text.windows(tiny_tokenizer, "train", TOKENS, 40)
