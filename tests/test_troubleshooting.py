"""docs/troubleshooting.md quotes messages as the code has them, and every table of it says what to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "troubleshooting.md"
VALUE = "…"


def rows(heading: str) -> list[list[str]]:
    """The cells of the rows of all tables with this first heading."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE):
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        if cells[0][0] == heading:
            found += cells[2:]
    return found


QUOTED = [row[0].strip("`") for row in rows("it says")]


@cache
def messages() -> str:
    """All text in the code, one string a line; for what is filled in stands VALUE."""
    files = [ROOT / "train.py", ROOT / "cli.py"]
    files += [path for folder in ("kernels", "engine", "fq_env", "agents") for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(text for path in files for text in strings(path.read_text(encoding="utf-8")))


def strings(source: str) -> Iterator[str]:
    """The strings of some code, those that stand side by side joined."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_tables_are_found() -> None:
    assert len(QUOTED) > 30
    assert len({*QUOTED}) == len(QUOTED)
    assert len(rows("what you see")) > 5


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_in_the_code(quoted: str) -> None:
    assert quoted in messages()


def test_every_row_has_a_reason_and_a_way_out() -> None:
    for row in rows("it says") + rows("what you see"):
        assert len(row) == 3, row
        assert all(len(cell) > 5 for cell in row), row


def test_another_message_is_not_found() -> None:
    assert "has no tokenizer (no tokenizer.json or tokenizer.json)" not in messages()
    assert [*strings('print(f"a {b:.2f} c"\n  "d", """e""")')][:2] == ["a … cd", "e"]


def test_the_exit_codes_are_those_of_the_commands() -> None:
    from flexquant_rl.agents.commands import process

    codes = {int(number) for row in rows("exit code") for number in row[0].split(",")}
    names = ("DONE", "FAILURE", "BAD_INPUT", "INTERRUPTED", "READER_GONE", "TERMINATED")
    assert codes == {getattr(process, name) for name in names}
