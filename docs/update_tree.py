"""Writes the tree of files in architecture.md: every file of the package with the first sentence of its docstring.

Run `python docs/update_tree.py` after a file was added, moved or renamed, or says something else of itself.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "architecture.md"
FOLDERS = ("kernels", "engine", "fq_env", "agents")
SCRIPTS = ("train.py", "cli.py", "flexquant_rl/__init__.py")
SUFFIXES = {".py", ".cpp", ".h"}
BEGIN, END = "<!-- tree: written by docs/update_tree.py -->", "<!-- end of the tree -->"
_COLUMN, _WIDTH = 28, 100
_INDENT = "  "


def summary(path: Path) -> str:
    """What decision lives in a file: the first line of its docstring, or the first sentence of a C++ file's comment.

    Raises:
        ValueError: If a Python file has no docstring.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text, filename=str(path)))
        if not docstring:
            raise ValueError(f"{path} has no docstring; say in its first line what decision lives there")
        return docstring.splitlines()[0]
    comment = re.match(r"(?://.*\n)+", text)
    if comment is None:
        return f"See {path.with_suffix('.h').name}."
    words = " ".join(line.removeprefix("//").strip() for line in comment[0].splitlines())
    return re.split(r"(?<=\.)\s", words, maxsplit=1)[0]


def entries(folder: Path, depth: int) -> Iterator[str]:
    """The lines of a folder: its own, those of its files, then those of its folders."""
    yield f"{_INDENT * depth}{folder.name}/"
    inside = sorted(folder.iterdir())
    for path in inside:
        if path.suffix in SUFFIXES and path.is_file():
            yield from entry(path, path.name, depth + 1)
    for path in inside:
        if path.is_dir() and any(file.suffix in SUFFIXES for file in path.rglob("*")):
            yield from entries(path, depth + 1)


def entry(path: Path, name: str, depth: int) -> list[str]:
    """The lines of a file."""
    first = f"{_INDENT * depth}{name}".ljust(_COLUMN - 1) + " "
    return textwrap.wrap(
        summary(path), _WIDTH, initial_indent=first, subsequent_indent=" " * _COLUMN, break_on_hyphens=False
    )


def tree() -> str:
    """The whole block of the document, its first and last line included."""
    lines = [line for folder in FOLDERS for line in entries(ROOT / folder, 0)]
    lines += [line for name in SCRIPTS for line in entry(ROOT / name, name, 0)]
    return "\n".join([BEGIN, "", "```text", *lines, "```", "", END])


def with_tree(document: str) -> str:
    """A document with its block replaced by the tree as the files are now.

    Raises:
        ValueError: If it has no such block.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{DOCUMENT} has no block between {BEGIN!r} and {END!r}; put these two lines back")
    return before + tree() + after


if __name__ == "__main__":
    old = DOCUMENT.read_text(encoding="utf-8")
    new = with_tree(old)
    DOCUMENT.write_text(new, encoding="utf-8")
    sys.stdout.write(f"{DOCUMENT.name}: {'unchanged' if new == old else 'updated'}\n")
