"""Intervals: bootstraps over documents, paired between policies, and over seeds; Student's t over training seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NUM_RESAMPLES = 1000
_NORMAL_975 = 1.959963984540054


def document_weights(documents: Sequence[int], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Array:
    """Weights of the sequences in each bootstrap resample of their documents.

    Sequences of one document share their subject and their difficulty, so documents are drawn, with replacement, and
    each brings all its sequences. Equal documents give equal weights: what is computed with them for two policies is
    paired.

    Args:
        documents: The document of each of n sequences.
        num_resamples: R.
        seed: Seed of the draws.

    Returns:
        `[1 + R, n]`, each row adding up to 1; row 0 takes every sequence once.
    """
    _, index = np.unique(np.asarray(documents), return_inverse=True)
    count = int(index.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=num_resamples)
    weights: Array = np.concatenate([np.ones((1, len(index))), draws[:, index].astype(np.float64)])
    return np.asarray(weights / weights.sum(1, keepdims=True), dtype=np.float64)


def seed_weights(num_seeds: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Array:
    """Weights of training seeds in each bootstrap resample, beside those of `document_weights` for the same resample.

    They are drawn on their own: a seed was judged on every document, so seeds and documents are two ways of one table.

    Args:
        num_seeds: S.
        num_resamples: R.
        seed: Seed of the draws.

    Returns:
        `[1 + R, S]`, each row adding up to 1; row 0 takes every seed once.
    """
    # A stream of its own: with that of the documents, few seeds would be drawn as their documents are.
    generator = np.random.default_rng((seed, 1))
    draws = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples)
    return np.concatenate([np.ones((1, num_seeds)), draws.astype(np.float64)]) / num_seeds


def percentile_interval(values: Array) -> tuple[float, float]:
    """The 95% interval of resampled values `[R]`."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean of n values by Student's t; n is 5 or more.

    The quantile is Fisher's expansion around the normal one, right to 0.3% from 4 degrees of freedom on.

    Raises:
        ValueError: If there are fewer than 5 values.
    """
    degrees = len(values) - 1
    if degrees < 4:
        raise ValueError(f"{len(values)} values have no t interval here; give 5 or more")
    z = _NORMAL_975
    quantile = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    quantile += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - half, mean + half
