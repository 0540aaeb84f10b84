"""The split of the standard library by module name."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env import prompts
from flexquant_rl.fq_env.stdlib_text import StdlibSplit, split_of, stdlib_files, stdlib_text

HELD_OUT: tuple[StdlibSplit, ...] = ("policy-train", "validation", "test")


# The embedded model and every published number rest on these: a change means training it again.
@pytest.mark.parametrize(
    ("module", "split"),
    [
        ("asyncio", "model-train"),
        ("argparse", "model-train"),
        ("unittest", "model-train"),
        ("_pydecimal", "model-train"),
        ("configparser", "policy-train"),
        ("statistics", "policy-train"),
        ("random", "policy-train"),
        ("tkinter", "policy-train"),
        ("ast", "validation"),
        ("collections", "validation"),
        ("datetime", "validation"),
        ("contextlib", "test"),
        ("inspect", "test"),
        ("subprocess", "test"),
        ("textwrap", "test"),
    ],
)
def test_split_is_pinned(module: str, split: StdlibSplit) -> None:
    assert split_of(module) == split


def make_library(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


def test_tests_and_submodules_belong_to_their_module(tmp_path: Path) -> None:
    names = ["re.py", "re/_parser.py", "test/test_re.py", "test/test_json/test_tool.py", "json/tool.py", "abc.py"]
    root = make_library(tmp_path, dict.fromkeys([*names, "site-packages/x.py", "re/__pycache__/x.py"], "x = 1\n"))
    modules = {file.path.relative_to(root).as_posix(): file.module for file in stdlib_files(root)}
    assert modules == {
        "re.py": "re",
        "re/_parser.py": "re",
        "test/test_re.py": "re",
        "test/test_json/test_tool.py": "json",
        "json/tool.py": "json",
        "abc.py": "abc",
    }


def test_test_folders_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    names = ["textwrap.py", "test/test_textwrap.py", "re/tests/data.py"]
    root = make_library(tmp_path, dict.fromkeys(names, "x = 1\n"))
    assert list(stdlib_text("test", root)) == ["textwrap.py"]
    assert set(stdlib_text("test", root, with_tests=True)) == set(names)


def test_unreadable_and_empty_files_are_left_out(tmp_path: Path) -> None:
    root = make_library(tmp_path, {"textwrap.py": "x = 1\n", "inspect.py": " \n"})
    (root / "subprocess.py").write_bytes(b"# caf\xe9\n")
    assert stdlib_text("test", root) == {"textwrap.py": "x = 1\n"}


@pytest.fixture(scope="module")
def held_out() -> dict[StdlibSplit, dict[str, str]]:
    """This interpreter's library, by split."""
    return {split: stdlib_text(split) for split in HELD_OUT}


def test_splits_are_disjoint_and_not_empty(held_out: dict[StdlibSplit, dict[str, str]]) -> None:
    paths = [path for texts in held_out.values() for path in texts]
    assert len(paths) == len(set(paths))
    for split, texts in held_out.items():
        modules = {path.split("/")[0].removesuffix(".py") for path in texts}
        assert {split_of(module) for module in modules} == {split}
        assert len(modules) >= 5
        assert sum(map(len, texts.values())) > 100_000


def test_no_module_fills_a_split(held_out: dict[StdlibSplit, dict[str, str]]) -> None:
    for split, texts in held_out.items():
        sizes: dict[str, int] = {}
        for path, source in texts.items():
            module = path.split("/")[0]
            sizes[module] = sizes.get(module, 0) + len(source)
        assert max(sizes.values()) < 0.6 * sum(sizes.values()), split


def test_reading_twice_gives_the_same(held_out: dict[StdlibSplit, dict[str, str]]) -> None:
    assert list(stdlib_text("test").items()) == list(held_out["test"].items())


def test_a_library_without_source_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.pyc").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds no \.py files.*pass --text FILE"):
        stdlib_files(tmp_path)

    def without_source(split: StdlibSplit) -> dict[str, str]:
        return stdlib_text(split, tmp_path)

    monkeypatch.setattr(prompts, "stdlib_text", without_source)
    with pytest.raises(InputError, match="pass --text FILE") as error:
        _ = prompts.load_windows(None, 8).train  # type: ignore[arg-type]  # it must not come to the tokenizer
    assert "\n" not in str(error.value)
