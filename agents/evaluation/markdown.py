"""Pieces of Markdown that reports are made of: rows of tables, lists, facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table_row(cells: Sequence[str]) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |"


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is at the left, the others at the right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join(map(table_row, (header, rule, *rows)))


def escape(text: str) -> str:
    """A text that stays in its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)


def facts_table(facts: Mapping[str, object]) -> str:
    """Names and values; underscores become spaces."""
    lines = [table_row(["what", "value"]), table_row([":--", ":--"])]
    lines += [table_row([escape(name.replace("_", " ")), escape(_fact(value))]) for name, value in facts.items()]
    return "\n".join(lines)


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)
