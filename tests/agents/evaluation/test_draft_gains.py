"""Gains of policies of drafts: intervals over documents and seeds together, by plain loops and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flexquant_rl.agents.evaluation.draft_rows import DraftRow, gain
from flexquant_rl.agents.evaluation.resampling import ENOUGH_SEEDS, document_weights, interval_method, seed_weights

DOCUMENTS = (0, 0, 1, 2, 3, 4, 5, 5, 6, 7)


def row(times: np.ndarray, documents: tuple[int, ...] = DOCUMENTS, *, seed: int | None = None) -> DraftRow:
    """A row whose sequences took these times; what `gain` does not read says nothing."""
    return DraftRow(
        **{"policy": "p", "family": "p", "kind": "rule" if seed is None else "learned", "seed": seed},
        **dict.fromkeys(("speedup_modelled", "speedup_low", "speedup_high", "tokens_per_pass"), 1.0),
        **dict.fromkeys(("speedup_measured", "speedup_validation", "accepted_share")),
        **{"drafts_per_token": 0.0, "verify_width": 8, "output_kl_nats": 0.0, "num_sequences": len(times)},
        **{"num_tokens": len(times), "cost_source": "modelled", "sequence_time_steps": tuple(times.tolist())},
        **{"sequence_tokens": (1,) * len(times), "sequence_documents": documents},
    )


@pytest.fixture
def times() -> np.ndarray:
    """`[1 + 6, n]`: of the policy that others are compared with, and of six seeds."""
    generator = np.random.default_rng(4)
    base = generator.uniform(5, 9, len(DOCUMENTS))
    return np.concatenate([base[None], base * generator.normal(0.97, 0.05, (6, len(DOCUMENTS)))])


def test_documents_and_seeds_are_drawn_together(times: np.ndarray) -> None:
    """As a loop over resamples: seeds that were drawn, on documents that were drawn, the same for both policies."""
    base, *seeds = times
    documents, drawn = document_weights(DOCUMENTS)[1:], seed_weights(len(seeds))[1:]
    values = []
    for of_sequences, of_seeds in zip(documents, drawn, strict=True):
        ratios = [math.log((of_sequences @ base) / (of_sequences @ own)) for own in seeds]
        values.append(math.exp(sum(share * ratio for share, ratio in zip(of_seeds, ratios, strict=True))))
    found = gain([row(own, seed=index) for index, own in enumerate(seeds)], row(base))
    assert found.low is not None
    assert found.high is not None
    np.testing.assert_allclose((found.low, found.high), np.quantile(values, (0.025, 0.975)), rtol=1e-3)
    assert found.by_seed == pytest.approx([base.sum() / own.sum() for own in seeds])
    assert "95% interval over documents and training seeds" in found.words()
    assert "significant" not in found.words()


def test_seeds_that_agree_leave_the_noise_of_the_text(times: np.ndarray) -> None:
    """Clones of one rule are as sure of each other as of nothing else: that they agree shows no gain on other text."""
    base, own = times[:2]
    clones = [row(own, seed=index) for index in range(ENOUGH_SEEDS)]
    one, five = gain(clones[:1], row(base)), gain(clones, row(base))
    assert (five.low, five.high) == pytest.approx((one.low, one.high))
    assert five.low is not None
    assert five.high is not None
    assert five.high - five.low > 0.01


def test_documents_that_agree_leave_the_noise_of_seeds() -> None:
    base = np.full(len(DOCUMENTS), 6.0)
    speeds = (1.02, 1.04, 0.99, 1.03, 1.1)
    found = gain([row(base / speed, seed=index) for index, speed in enumerate(speeds)], row(base))
    assert found.low is not None
    assert found.high is not None
    assert 0.99 < found.low < found.value < found.high < 1.1


def test_few_seeds_are_these_very_seeds_on_other_documents(times: np.ndarray) -> None:
    base, *seeds = times
    rows = [row(own, seed=index) for index, own in enumerate(seeds[: ENOUGH_SEEDS - 1])]
    found = gain(rows, row(base))
    assert "(95% interval over documents " in found.words()
    assert "the seeds" not in found.words()
    text, about_seeds = interval_method(8, len(rows))
    assert "resample the 8 documents" in text
    assert "With 4 training seeds nothing is said about another training" in about_seeds
    assert "draw the 5 training seeds too" in interval_method(8, ENOUGH_SEEDS)[1]
    assert len(interval_method(8, 0)) == 1


def test_one_document_gives_no_interval_however_many_seeds(times: np.ndarray) -> None:
    base, *seeds = (own[:2] for own in times)
    found = gain([row(own, (3, 3), seed=index) for index, own in enumerate(seeds)], row(base, (3, 3)))
    assert (found.low, found.high) == (None, None)
    assert found.verdict == "cannot be told apart from"


def test_seeds_are_not_drawn_as_documents_are() -> None:
    """With as many seeds as documents the two must not be one draw."""
    documents, seeds = document_weights(range(5)), seed_weights(5)
    assert documents.shape == seeds.shape
    np.testing.assert_allclose(seeds.sum(1), 1)
    np.testing.assert_array_equal(seeds[0], np.full(5, 0.2))
    correlations = [np.corrcoef(documents[1:, index], seeds[1:, index])[0, 1] for index in range(5)]
    assert abs(np.mean(correlations)) < 0.1
