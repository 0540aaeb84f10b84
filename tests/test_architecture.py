"""The tree of files in docs/architecture.md is what the files say of themselves."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def update_tree() -> ModuleType:
    """The script that writes the tree."""
    spec = importlib.util.spec_from_file_location("update_tree", ROOT / "docs" / "update_tree.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tree_is_up_to_date(update_tree: ModuleType) -> None:
    document = update_tree.DOCUMENT.read_text(encoding="utf-8")
    if update_tree.with_tree(document) == document:
        return
    pytest.fail("docs/architecture.md does not show the files as they are; run: python docs/update_tree.py")


def test_the_tree_shows_every_file(update_tree: ModuleType) -> None:
    lines = update_tree.tree().splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    for folder in update_tree.FOLDERS:
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in update_tree.SUFFIXES]
        assert len(files) > 4
        for path in files:
            assert path.name in names, path
    assert max(map(len, lines)) <= 100


def test_files_that_documents_name_exist() -> None:
    # Capitals stand for a name: `bench_OP.py` is no file.
    source = re.compile(r"`((?:kernels|engine|fq_env|agents|tests|docs|benchmarks)/[a-z0-9_/]+\.(?:py|cpp|h))`")
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    found = {
        (path.name, name)
        for path in documents
        if path.name != "LOG.md"  # history may name what is gone
        for name in source.findall(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 40
    # The reader of extending.md writes these.
    found -= {
        ("extending.md", name) for name in ("agents/policies/periodic.py", "tests/agents/policies/test_periodic.py")
    }
    assert not [f"{document}: {name}" for document, name in sorted(found) if not (ROOT / name).exists()]


def test_what_a_file_says_of_itself(update_tree: ModuleType, tmp_path: Path) -> None:
    for name, text, expected in (
        ("a.py", '"""First line: one decision.\n\nMore.\n"""\n', "First line: one decision."),
        ("a.cpp", "// One decision, on\n// two lines. More.\n#include <x>\n", "One decision, on two lines."),
        ("b.cpp", '#include "b.h"\n// later\n', "See b.h."),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        assert update_tree.summary(path) == expected
    silent = tmp_path / "silent.py"
    silent.write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no docstring; say in its first line"):
        update_tree.summary(silent)


def test_a_document_without_the_block_is_refused(update_tree: ModuleType) -> None:
    with pytest.raises(ValueError, match="put these two lines back"):
        update_tree.with_tree("# Architecture\n")
    assert "update_tree" not in sys.modules
