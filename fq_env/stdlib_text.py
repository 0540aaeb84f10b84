"""Python's standard library as text, split by module so that no split ever sees another one's source.

The unit of the split is the *top-level module* (`asyncio`, `json`, ...): its hash alone decides, so the split is the
same on every machine and for every Python version, and the embedded model, the policy and the final numbers use
disjoint text. `test_x.py` and `test_x_y.py` belong to `x`: a model that has read the tests of a held-out module has
half read it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

StdlibSplit = Literal["model-train", "policy-train", "validation", "test"]

# Shares of the hash space, in percent; the rest is what the embedded model was trained on.
_HELD_OUT_PERCENT: tuple[tuple[StdlibSplit, int], ...] = (
    ("policy-train", 10),
    ("validation", 5),
    ("test", 7),
)
# Chosen once, before anything was trained, so that no single module fills a split.
_SPLIT_SALT = 16
# Tables and third-party bundles, not prose in Python: useless as prompts, so never held out.
_NEVER_HELD_OUT = frozenset(
    {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "unittest", "test", "site-packages"}
)
_MAX_MODULE_BYTES = 400_000
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class StdlibFile:
    """One source file of the standard library.

    Attributes:
        module: Top-level module that decides the split (`test/test_json/x.py` -> `json`).
        path: The file.
    """

    module: str
    path: Path


def split_of(module: str) -> StdlibSplit:
    """Returns the split of a top-level standard-library module; a pure function of its name."""
    if module in _NEVER_HELD_OUT or module.startswith("_"):
        return "model-train"
    digest = hashlib.sha256(f"flexquant-rl/stdlib/{_SPLIT_SALT}/{module}".encode()).digest()
    position = int.from_bytes(digest[:4], "big") % 100
    for split, percent in _HELD_OUT_PERCENT:
        if position < percent:
            return split
        position -= percent
    return "model-train"


def _top_level_module(relative: Path) -> str:
    """`test_zipfile64` tests `zipfile` and `test_httplib` tests `http`: the longest module name that begins it."""
    parts = relative.with_suffix("").parts
    if parts[0] != "test" or len(parts) == 1:
        return parts[0]
    subject = parts[1].removeprefix("test_")
    return max((name for name in sys.stdlib_module_names if subject.startswith(name)), key=len, default=subject)


def stdlib_files(root: Path | None = None) -> list[StdlibFile]:
    """Lists the standard library's source files in a stable order.

    Args:
        root: The library folder; default: the running interpreter's.

    Raises:
        FileNotFoundError: If the folder has no Python source (some systems ship only compiled modules).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]  # far more files than all the rest
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [
        StdlibFile(_top_level_module(path.relative_to(root)), path)
        for path in sorted(paths)
        if path.stat().st_size <= _MAX_MODULE_BYTES
    ]
    if not files:
        raise FileNotFoundError(
            f"{root} holds no .py files: this Python ships without its standard library's source; "
            "pass --text FILE instead"
        )
    return files


def stdlib_text(split: StdlibSplit, root: Path | None = None, *, with_tests: bool = False) -> dict[str, str]:
    """Reads one split of the standard library.

    Args:
        split: Which split.
        root: The library folder; default: the running interpreter's.
        with_tests: Whether to include test folders, which only the model's training does.

    Returns:
        `{path relative to the library: source}`, in a stable order; undecodable and empty files are left out.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, str] = {}
    for file in stdlib_files(root):
        relative = file.path.relative_to(root)
        if split_of(file.module) != split or (not with_tests and {"test", "tests"} & set(relative.parts)):
            continue
        try:
            source = file.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a handful of test files in other encodings, there on purpose
            continue
        if source.strip():
            texts[relative.as_posix()] = source
    return texts
