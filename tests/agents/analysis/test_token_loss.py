"""Statistics of tokens against slow definitions in whole numbers and fractions, and on cases with a known answer."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexquant_rl.agents.analysis.rows import PastRow, TokensRow, WindowRow
from flexquant_rl.agents.analysis.token_loss import (
    TokenTable,
    by_entropy,
    by_position,
    classes,
    correlations,
    hardest,
    origins,
    rank_correlation,
    share_of_top,
    token_class,
)

NUMBERS = st.lists(st.integers(-4, 4), min_size=3, max_size=30)


def slow_rank_correlation(x: list[int], y: list[int]) -> float:
    """Ranks by counting what is smaller and what is equal, in fractions."""

    def ranks(values: list[int]) -> list[Fraction]:
        return [
            Fraction(2 * sum(other < value for other in values) + sum(other == value for other in values) + 1, 2)
            for value in values
        ]

    a, b = ranks(x), ranks(y)
    mean = Fraction(len(x) + 1, 2)
    product = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    squares = sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b)
    return float(product) / math.sqrt(squares) if squares else math.nan


@given(NUMBERS)
def test_rank_correlation(x: list[int]) -> None:
    y = [value * (1 if index % 3 else -1) + index % 2 for index, value in enumerate(x)]
    assert rank_correlation(x, y) == pytest.approx(slow_rank_correlation(x, y), abs=1e-12, nan_ok=True)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 20))
def test_share_of_top(values: list[int], twentieths: int) -> None:
    share = Fraction(twentieths, 20)
    left, held = share * len(values), Fraction(0)
    for value in sorted(values, reverse=True):
        taken = min(left, Fraction(1))
        held, left = held + taken * value, left - taken
    assert share_of_top(values, float(share)) == pytest.approx(float(held / sum(values)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" cat", "beginning of a word"),
        ("ing", "word or part of one, no space before"),
        ("\n\n", "line break"),
        ("  ", "space"),
        (" 17", "number"),
        ("):", "sign or symbol"),
        ("", "part of a character"),
        ("\u0301", "other"),
    ],
)
def test_token_class(text: str, kind: str) -> None:
    assert token_class(text) == kind


T = 16


@pytest.fixture
def table() -> TokenTable:
    """Two windows; at 3 bits the KL is the entropy, at 4 a hundredth, but for one hard token."""
    generator = np.random.default_rng()
    entropy = generator.permutation(2 * T).reshape(2, T) + 1.0
    windows = [
        WindowRow(
            window=index,
            source="a.txt",
            document=index,
            context="<s>",
            tokens=tuple(f" w{place}" for place in range(T)),
            token_ids=tuple(place % 4 for place in range(T)),
            token_entropy_nats=tuple(entropy[index]),
            top1_probability=tuple(1 / entropy[index]),
            top1_tokens=("yes",) * T,
            token_nll_nats=tuple(entropy[index]),
        )
        for index in (1, 0)
    ]
    low = {3: entropy, 4: entropy / 100}
    low[4] = low[4].copy()
    low[4][1, 5] = 9.0
    rows = [
        TokensRow("rtn", width, index, tuple(kl[index]), tuple(kl[index]), ("no",) * T)
        for width, kl in low.items()
        for index in (1, 0)
    ]
    rows.append(TokensRow("other", 3, 0, (7.0,) * T, (7.0,) * T, ("?",) * T))
    return TokenTable.of("rtn", windows, rows)


def test_table(table: TokenTable) -> None:
    assert [row.window for row in table.windows] == [0, 1]
    assert table.lossy_widths() == [3, 4]
    assert table.kl[3].shape == (2, T)


def test_correlations(table: TokenTable) -> None:
    found = correlations(table, 3)
    assert found["entropy of the token's own output"] == (pytest.approx(1.0), 2 * T)
    assert found["top-1 probability of its own output"] == (pytest.approx(-1.0), 2 * T)
    assert found["entropy of the output before it"][1] == 2 * (T - 1)
    assert found["mean log KL of the same input token elsewhere"][1] == 2 * T


def test_an_input_token_that_is_always_hard_tells() -> None:
    ids = tuple(place % 4 for place in range(T))
    kl = tuple(10.0**token for token in ids)
    window = WindowRow(0, "a", 0, "", ("x",) * T, ids, (1.0,) * T, (0.5,) * T, ("y",) * T, (1.0,) * T)
    found = correlations(TokenTable.of("rtn", [window], [TokensRow("rtn", 3, 0, kl, kl, ("z",) * T)]), 3)
    assert found["mean log KL of the same input token elsewhere"][0] == pytest.approx(1.0)
    assert math.isnan(found["entropy of the token's own output"][0])


def test_places_and_entropy(table: TokenTable) -> None:
    parts = by_position(table.kl[3])
    assert [(low, high) for low, high, _ in parts] == [(2 * part, 2 * part + 1) for part in range(8)]
    assert np.mean([kl for *_, kl in parts]) == pytest.approx(table.kl[3].mean())
    bins = by_entropy(table, 3, num_bins=4)
    assert bins == sorted(bins)
    assert [kl for _, kl in bins] == pytest.approx([entropy for entropy, _ in bins])


def test_origins_are_over_the_same_tokens(table: TokenTable) -> None:
    rows = [PastRow("rtn", 4, window, (5, 7), (1.0, 3.0), (0.0, 0.5)) for window in (0, 1)]
    one = origins(table, rows)[4]
    assert (one.own_step, one.past, one.num_tokens) == (2.0, 0.25, 4)
    assert one.both == pytest.approx(table.kl[4][:, [5, 7]].mean())


def test_hardest(table: TokenTable) -> None:
    (first, second) = hardest(table, 4, 2)
    assert (first.kl_nats, first.token, first.expected, first.found) == (9.0, " w5", "yes", "no")
    assert first.before == "<s> w0 w1 w2 w3 w4"
    assert first.kl_nats > second.kl_nats


def test_classes(table: TokenTable) -> None:
    assert classes(table, 4) == [("beginning of a word", 1.0, pytest.approx(1.0), pytest.approx(table.kl[4].mean()))]
