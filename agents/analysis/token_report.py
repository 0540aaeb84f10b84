"""The part of an analysis' report that is about tokens: spread, origin, what goes with it, the hardest ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flexquant_rl.agents.analysis.rows import Plan
from flexquant_rl.agents.analysis.token_loss import (
    Origin,
    TokenTable,
    by_position,
    classes,
    correlations,
    hardest,
    share_of_top,
)
from flexquant_rl.agents.evaluation.markdown import escape, table_of

TOKENS_PICTURE = "tokens.png"
_NUM_EXAMPLES = 12


def token_sections(plan: Plan, table: TokenTable, origin: dict[int, Origin], examined: str) -> list[str]:
    """Which tokens of a strategy lose, and what goes with it; nothing where nothing is lost."""
    width = focus_width(plan, table)
    if width is None:
        return []
    widths = table.lossy_widths()
    return [
        f"## Tokens of `{examined}`",
        f"![KL over tokens, positions, origins and entropy]({TOKENS_PICTURE})",
        _by_width_table(
            widths,
            {
                "KL held by the hardest tenth (%)": lambda b: f"{100 * share_of_top(table.kl[b], 0.1):.0f}",
                "KL held by the easier half (%)": lambda b: f"{100 * (1 - share_of_top(table.kl[b], 0.5)):.1f}",
                "mean KL (nats)": lambda b: kl_text(float(table.kl[b].mean())),
            },
        ),
        *_origin_sections(origin),
        "### What goes with it",
        _correlation_table(table, widths),
        f"### By position, {width} bits",
        table_of(
            ("judged tokens", "mean KL (nats)"),
            [
                (f"{low + plan.first} to {high + plan.first}", kl_text(kl))
                for low, high, kl in by_position(table.kl[width])
            ],
        ),
        f"### By the text of the token that is read, {width} bits",
        table_of(
            ("token", "share of tokens (%)", "share of KL (%)", "mean KL (nats)"),
            [
                (name, f"{100 * tokens:.1f}", f"{100 * kl:.1f}", kl_text(mean))
                for name, tokens, kl, mean in classes(table, width)
            ],
        ),
        f"### The hardest tokens, {width} bits",
        "The token is read at the end of the text before it; then the model predicts the next one.",
        table_of(
            ("KL (nats)", "text before", "token", "the reference expects", "the quantised model"),
            [
                (
                    f"{token.kl_nats:.2f}",
                    _code(token.before),
                    _code(token.token),
                    f"{_code(token.expected)} ({token.expected_probability:.0%})",
                    _code(token.found),
                )
                for token in hardest(table, width, _NUM_EXAMPLES)
            ],
        ),
    ]


def _origin_sections(origin: dict[int, Origin]) -> list[str]:
    if not origin:
        return []
    lines: dict[str, Callable[[int], str]] = {
        "own step only, clean past (nats)": lambda width: kl_text(origin[width].own_step),
        "past only, clean step (nats)": lambda width: kl_text(origin[width].past),
        "both: what decoding gives (nats)": lambda width: kl_text(origin[width].both),
    }
    count = max(one.num_tokens for one in origin.values())
    return [
        "### Past and own step",
        _by_width_table(list(origin), lines),
        f"Means over {count} tokens. The two need not add up: their errors may cancel or feed each other.",
    ]


def _by_width_table(widths: Sequence[int], lines: dict[str, Callable[[int], str]]) -> str:
    return table_of(
        ("", *(f"{width} bits" for width in widths)),
        [(name, *(cell(width) for width in widths)) for name, cell in lines.items()],
    )


def _correlation_table(table: TokenTable, widths: Sequence[int]) -> str:
    found = {width: correlations(table, width) for width in widths}
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    counts = {name: next(one[name][1] for one in found.values() if name in one) for name in names}
    return table_of(
        ("rank correlation of a token's KL with", "tokens", *(f"{width} bits" for width in widths)),
        [(name, f"{counts[name]:,}", *(_correlation(found[width].get(name)) for width in widths)) for name in names],
    )


def _correlation(value: tuple[float, int] | None) -> str:
    return "" if value is None or math.isnan(value[0]) else f"{value[0]:+.2f}"


def focus_width(plan: Plan, table: TokenTable) -> int | None:
    """The width that tables of one width show: that of the single matrices, if it loses anything."""
    widths = table.lossy_widths()
    return None if not widths else min(widths, key=lambda width: abs(width - plan.part_width))


def kl_text(value: float) -> str:
    """Three digits."""
    return "0" if value == 0 else f"{value:#.3g}".rstrip(".")


def _code(text: str) -> str:
    """Text as code in a cell: white space that Markdown would lose is shown."""
    shown = text.replace("\n", "\N{RETURN SYMBOL}").replace("\r", "").replace("\t", "\N{RIGHTWARDS ARROW}")
    kept = shown.strip(" ")
    ends = (len(shown) - len(shown.lstrip(" ")), len(shown.rstrip(" ")))
    shown = (
        shown
        if kept == shown
        else "".join(
            "\N{MIDDLE DOT}" if char == " " and not ends[0] <= index < ends[1] else char
            for index, char in enumerate(shown)
        )
    )
    shown = "".join(char if char.isprintable() else "\N{WHITE SQUARE}" for char in shown).replace("`", "'")
    return f"`{escape(shown)}`" if shown else ""
