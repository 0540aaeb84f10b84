"""How output KL is spread over the tokens of a text, and what goes with it: numbers from rows alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexquant_rl.agents.analysis.rows import PastRow, TokensRow, WindowRow
from flexquant_rl.agents.evaluation.resampling import Array

_POSITION_BINS = 8
_LEAST_OCCURRENCES = 3
"""Times that an input token must be read before its mean says anything."""
_CONTEXT_CHARACTERS = 60


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The tokens of one strategy: n windows of T judged tokens.

    Attributes:
        windows: The text.
        kl: Output KL by width, `[n, T]` nats each.
        top1: The likeliest next token by width, n tuples of T texts.
    """

    windows: Sequence[WindowRow]
    kl: dict[int, Array]
    top1: dict[int, Sequence[tuple[str, ...]]]

    @staticmethod
    def of(strategy: str, windows: Sequence[WindowRow], rows: Sequence[TokensRow]) -> TokenTable:
        """Collects the rows of a strategy."""
        by_width: dict[int, list[TokensRow]] = {}
        for row in sorted(rows, key=lambda row: (row.bit_width, row.window)):
            if row.strategy == strategy:
                by_width.setdefault(row.bit_width, []).append(row)
        return TokenTable(
            sorted(windows, key=lambda row: row.window),
            {width: np.array([row.output_kl_nats for row in own]) for width, own in by_width.items()},
            {width: [row.top1_tokens for row in own] for width, own in by_width.items()},
        )

    def lossy_widths(self) -> list[int]:
        """Widths at which anything is lost: not the reference itself."""
        return [width for width, kl in self.kl.items() if kl.mean() > 0]


def share_of_top(kl: ArrayLike, share: float) -> float:
    """Share of all KL that the tokens of most KL hold, so large a share of the tokens."""
    ordered = np.sort(np.asarray(kl, dtype=np.float64).ravel())[::-1]
    count = share * len(ordered)
    whole = int(count)
    rest = (count - whole) * ordered[whole] if whole < len(ordered) else 0.0
    return float((ordered[:whole].sum() + rest) / ordered.sum())


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's correlation, equal values at their mean rank; NaN where one of them does not vary."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64).ravel()) for values in (x, y)]
    centred = [values - values.mean() for values in ranks]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / norm if norm > 0 else float("nan")


def _ranks(values: Array) -> Array:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[index], dtype=np.float64)


def correlations(table: TokenTable, bit_width: int) -> dict[str, tuple[float, int]]:
    """Rank correlation of KL at a width with what is known of a token, and over how many tokens.

    The entropy and the probability are those of the reference's output after the token, so they are known too late to
    choose its width by; those after the token before it are not.
    """
    kl = table.kl[bit_width]
    entropy, top1, nll = (
        np.array([getattr(row, name) for row in table.windows])
        for name in ("token_entropy_nats", "top1_probability", "token_nll_nats")
    )
    position = np.broadcast_to(np.arange(kl.shape[1]), kl.shape)
    others, is_known = _mean_of_same_token(np.array([row.token_ids for row in table.windows]), kl)
    later = kl[:, 1:]
    found = {
        "entropy of the token's own output": (entropy, kl),
        "top-1 probability of its own output": (top1, kl),
        "entropy of the output before it": (entropy[:, :-1], later),
        "surprisal of the token itself": (nll[:, :-1], later),
        "KL of the token before it": (kl[:, :-1], later),
        "position in the window": (position, kl),
        "mean log KL of the same input token elsewhere": (others[is_known], kl[is_known]),
    }
    return {name: (rank_correlation(x, y), int(np.size(y))) for name, (x, y) in found.items() if np.size(y) > 2}


def _mean_of_same_token(token_ids: NDArray[np.int64], kl: Array) -> tuple[Array, NDArray[np.bool_]]:
    """For each token the mean log KL of the other places where it is read, and whether there are enough of them."""
    log_kl = np.log(np.maximum(kl, np.finfo(np.float32).tiny))
    _, index, counts = np.unique(token_ids, return_inverse=True, return_counts=True)
    index = index.reshape(token_ids.shape)
    sums = np.bincount(index.ravel(), weights=log_kl.ravel())
    number = counts[index]
    return (sums[index] - log_kl) / np.maximum(number - 1, 1), number >= _LEAST_OCCURRENCES


def by_position(kl: Array) -> list[tuple[int, int, float]]:
    """First and last position (from 0) of equal parts of the windows, and the mean KL there."""
    parts = np.array_split(np.arange(kl.shape[1]), min(_POSITION_BINS, kl.shape[1]))
    return [(int(part[0]), int(part[-1]), float(kl[:, part].mean())) for part in parts]


def by_entropy(table: TokenTable, bit_width: int, num_bins: int = 10) -> list[tuple[float, float]]:
    """Mean entropy of the reference's output and mean KL, in equal parts of the tokens ordered by the entropy."""
    entropy = np.array([row.token_entropy_nats for row in table.windows]).ravel()
    kl, order = table.kl[bit_width].ravel(), np.argsort(entropy)
    parts = np.array_split(order, min(num_bins, len(order)))
    return [(float(entropy[part].mean()), float(kl[part].mean())) for part in parts]


@dataclass(frozen=True)
class Origin:
    """Mean KL of one width by where it comes from, nats.

    Attributes:
        own_step: Of tokens read at the width behind a past of the reference.
        past: Of tokens that the reference reads behind a past of the width.
        both: Of tokens read at the width behind a past of the width: what decoding at it gives.
        num_tokens: Tokens that the three means are over.
    """

    own_step: float
    past: float
    both: float
    num_tokens: int


def origins(table: TokenTable, rows: Sequence[PastRow]) -> dict[int, Origin]:
    """Where the KL of each width comes from, over the tokens of the rows."""
    found = {}
    for width in sorted({row.bit_width for row in rows}):
        own = [row for row in rows if row.bit_width == width]
        both = [table.kl[width][row.window, place] for row in own for place in row.places]
        found[width] = Origin(
            float(np.mean([row.own_step for row in own])),
            float(np.mean([row.past for row in own])),
            float(np.mean(both)),
            len(both),
        )
    return found


def classes(table: TokenTable, bit_width: int) -> list[tuple[str, float, float, float]]:
    """Kinds of input tokens by their text, most KL first: name, share of tokens, share of KL, mean KL."""
    kinds = np.array([[token_class(text) for text in row.tokens] for row in table.windows])
    kl = table.kl[bit_width]
    found = [
        (
            str(kind),
            float((kinds == kind).mean()),
            float(kl[kinds == kind].sum() / kl.sum()),
            float(kl[kinds == kind].mean()),
        )
        for kind in np.unique(kinds)
    ]
    return sorted(found, key=lambda entry: -entry[2])


def token_class(text: str) -> str:
    """What kind of token a text is."""
    core = text.strip()
    if not text:
        return "part of a character"
    if not core:
        return "line break" if "\n" in text or "\r" in text else "space"
    if core[0].isdigit():
        return "number"
    if core[0].isalpha() or core[0] == "_":
        return "beginning of a word" if text[0].isspace() else "word or part of one, no space before"
    category = unicodedata.category(core[0])
    return "sign or symbol" if category[0] in "PS" else "other"


@dataclass(frozen=True)
class HardToken:
    """A token of much KL.

    Attributes:
        kl_nats: Its KL.
        before: The text before it, its end.
        token: The token that was read.
        expected: What the reference finds likeliest next.
        expected_probability: How likely.
        found: What the quantised model finds likeliest next.
    """

    kl_nats: float
    before: str
    token: str
    expected: str
    expected_probability: float
    found: str


def hardest(table: TokenTable, bit_width: int, count: int) -> list[HardToken]:
    """The tokens of most KL at a width."""
    kl = table.kl[bit_width]
    places = np.dstack(np.unravel_index(np.argsort(-kl, axis=None)[:count], kl.shape))[0]
    found = []
    for window, place in places.tolist():
        row = table.windows[window]
        before = row.context + "".join(row.tokens[:place])
        found.append(
            HardToken(
                float(kl[window, place]),
                before[-_CONTEXT_CHARACTERS:],
                row.tokens[place],
                row.top1_tokens[place],
                row.top1_probability[place],
                table.top1[bit_width][window][place],
            )
        )
    return found
