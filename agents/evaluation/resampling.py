"""Intervals: bootstraps over documents, paired between policies, and over training seeds in the same resamples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NUM_RESAMPLES = 1000
ENOUGH_SEEDS = 5
"""Training seeds from which on they are drawn too, and a comparison may be called significant."""


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
    A resample draws one seed less than there are: S of S would call the mean of few seeds surer than it is, S - 1 of S
    give the mean the variance that the S values let one expect (Rao and Wu 1988).

    Args:
        num_seeds: S, at least 2.
        num_resamples: R.
        seed: Seed of the draws.

    Returns:
        `[1 + R, S]`, each row adding up to 1; row 0 takes every seed once.
    """
    # A stream of its own: with that of the documents, few seeds would be drawn as their documents are.
    generator = np.random.default_rng((seed, 1))
    draws = generator.multinomial(num_seeds - 1, np.full(num_seeds, 1 / num_seeds), size=num_resamples)
    return np.concatenate([np.full((1, num_seeds), 1 / num_seeds), draws.astype(np.float64) / (num_seeds - 1)])


def mean_over_seeds(values: Array) -> Array:
    """The mean over training seeds on the text and in each resample of its documents, `[S, 1 + R]` -> `[1 + R]`.

    From `ENOUGH_SEEDS` on each resample draws the seeds too. Alone they would say little: all begin as clones of one
    policy and are judged on one text.
    """
    if len(values) < ENOUGH_SEEDS:
        return np.asarray(values.mean(0), dtype=np.float64)
    weights = seed_weights(len(values), num_resamples=values.shape[1] - 1)
    return np.asarray((weights.T * values).sum(0), dtype=np.float64)


def interval_method(num_documents: int, num_seeds: int) -> list[str]:
    """What intervals of paired comparisons cover, in whole sentences.

    Args:
        num_documents: Documents of the test text.
        num_seeds: Training seeds of the learned policies; 0 where none is learned.
    """
    lines = [f"Intervals resample the {num_documents} documents of the test text, the same ones for both policies."]
    if num_seeds >= ENOUGH_SEEDS:
        lines.append(
            f"Those of the learned policy against another draw the {num_seeds} training seeds too, with replacement "
            "and in the same resample: they cover other documents of these texts and other seeds of this training. "
            "They do not cover what all seeds share: the policy to begin from, the training text, the cost table."
        )
    elif num_seeds:
        lines.append(
            f"With {num_seeds} training seed{'s' if num_seeds > 1 else ''} nothing is said about another training: "
            "intervals of the learned policy are those of these very seeds on other documents."
        )
    return lines


def percentile_interval(values: Array) -> tuple[float, float]:
    """The 95% interval of resampled values `[R]`."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
