"""The documents tell the truth: links lead somewhere, commands and options exist, examples print what they say."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
from functools import cache, partial
from pathlib import Path
from runpy import run_path
from unittest import mock

import pytest
from cli_runner import run

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cff", ".c", ".cpp", ".h", ".sh", ".csv", ""}
MACHINE_FOLDERS = ("work", "root", "farm", "home", "Users")
MACHINE_PATH = re.compile(rf"(?<![\w.~$}}/-])/(?:{'|'.join(MACHINE_FOLDERS)})\b")


def identifier(path: Path) -> str:
    """A test id: the path inside the repository."""
    return path.relative_to(ROOT).as_posix()


def tracked_files() -> list[Path]:
    """Every file that git tracks or would add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


MAX_PROSE_COLUMNS = 100


def wide_lines(text: str) -> list[int]:
    """Numbers of the lines of prose that are too wide. Tables, code, headings with links and single words are none."""
    found, is_code = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        cannot_wrap = is_code or line.startswith("|") or (line.startswith("#") and "](" in line) or " " not in line
        if len(line) > MAX_PROSE_COLUMNS and not cannot_wrap:
            found.append(number)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=identifier)
def test_prose_is_wrapped(document: Path) -> None:
    found = wide_lines(document.read_text(encoding="utf-8"))
    assert not found, f"{identifier(document)}: wrap at {MAX_PROSE_COLUMNS} columns the lines {found}"


def test_wide_prose_is_recognised() -> None:
    words = "word " * 30
    assert wide_lines(f"| {words} |\n# [{words}](x)\n```text\n{words}\n```\n{'x' * 200}\n- {words}\n") == [7]


def without_code(text: str) -> str:
    """Removes fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+\s+(.*?)\s*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> list[str]:
    """The targets of a document's links."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text(encoding="utf-8")))


def test_the_documents_are_found() -> None:
    names = {identifier(document) for document in DOCUMENTS}
    assert names >= {"README.md", "CHANGELOG.md", "docs/architecture.md", "docs/kernels.md", "docs/weights.md"}
    targets = {target for document in DOCUMENTS for target in links(document)}
    assert any("#" in target for target in targets), "no link to a heading is understood"
    assert any("#" not in target for target in targets), "no link to a file is understood"


@pytest.mark.parametrize("document", DOCUMENTS, ids=identifier)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target in links(document):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{identifier(document)} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{identifier(document)} links to {target}: no such heading"


def test_no_machine_paths() -> None:
    found = []
    files = tracked_files()
    assert {ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "kernels" / "gemv.py", Path(__file__)} <= {*files}
    for path in files:
        if path.suffix not in TEXT_SUFFIXES or path.stat().st_size > 1_000_000:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{identifier(path)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", MACHINE_FOLDERS)
def test_machine_paths_are_recognised(folder: str) -> None:
    assert all(MACHINE_PATH.search(text) for text in (f"at /{folder}/x", f"'/{folder}'", f"=/{folder}/me"))
    others = (f"https://example.org/{folder}/", f"net/{folder}", f"a/{folder}s", f"$OUT/{folder}/", f"/{folder}s/x")
    assert not any(MACHINE_PATH.search(text) for text in others)


def code_lines(document: Path) -> list[str]:
    """The shell lines of a document: fenced blocks and inline code, continuation lines joined."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|sh|console|shell|)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    lines = [line.split(" #")[0].strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in [*lines, *inline] if line]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Every call of a program in the documents for users: its first argument, and the options on the line."""
    found = []
    for document in DOCUMENTS:
        if document.name == "LOG.md":  # history may name what is gone
            continue
        for line in code_lines(document):
            for match in re.finditer(rf"(?:^|[;&|]\s*|\s){program}(?:\s+([\w-]+))?(?=\s|$)([^;&|]*)", line):
                found.append((match[1] or "", re.findall(r"(?<!\S)(--[a-z][\w-]*)", match[2])))
    assert found, f"no document calls {program}: the pattern no longer understands them"
    return found


@cache
def help_text(script: str, *arguments: str) -> str:
    """What a script prints for `--help`, started as `python SCRIPT` does but in this process."""
    start = partial(run_path, str(ROOT / script), run_name="__main__")
    with mock.patch.dict(os.environ, COLUMNS="200", NO_COLOR="1"):
        finished = run(start, *arguments, "--help")
    assert finished.code == 0, f"{script} {' '.join(arguments)} --help: {finished.err}"
    return re.sub(r"\x1b\[[0-9;]*m", "", finished.out)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for target, _ in commands("make"):
        assert not target or target in targets, f"make {target}"


def test_fq_commands_exist() -> None:
    assert any(options for _, options in commands("fq"))
    for name, options in commands("fq"):
        if name:
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", help_text("cli.py")), f"fq {name}"
            if name != "bench":
                check_options(f"fq {name}", options, help_text("cli.py", name))


def test_benchmarks_exist() -> None:
    for name, options in commands("fq bench"):
        if name:
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", help_text("cli.py", "bench")), name
            check_options(f"fq bench {name}", options, help_text("cli.py", "bench", name))


def test_train_options_exist() -> None:
    calls = [options for _, options in commands(r"(?:(?:python )?train\.py|fq-train)") if options]
    assert calls
    for options in calls:
        check_options("train.py", options, help_text("train.py"))


def check_options(command: str, options: list[str], text: str) -> None:
    """Asserts that a command's help names the options."""
    for option in options:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{command} has no option {option}"


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if "```pycon" in path.read_text(encoding="utf-8")], ids=identifier
)
def test_examples_print_what_they_say(document: Path) -> None:
    blocks = re.findall(r"^```pycon\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, identifier(document), str(document), 0)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)
