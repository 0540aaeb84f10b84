"""Shell blocks of the documents: their command lines, and each of them parsed by its own program's parser."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

from cli_runner import run
from tensorboard import program
from tensorboard.plugins.core.core_plugin import CorePluginLoader

from flexquant_rl import __version__, cli
from flexquant_rl.agents.commands.options import SweepOptions, TrainOptions
from flexquant_rl.agents.commands.parsing import parse, parse_command
from flexquant_rl.agents.config import check_config

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
_VARIABLE = re.compile(r"[A-Z][A-Z_]*=.*", flags=re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A fenced block of a document."""

    language: str
    text: str


def fences(document: Path) -> list[Fence]:
    """All fenced blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    found = [Fence(*match.groups()) for match in _FENCE.finditer(text)]
    assert 2 * len(found) == len(re.findall(r"^ *```", text, flags=re.MULTILINE)), f"{document}: a fence has no partner"
    return found


def command_lines(block: str) -> list[list[str]]:
    """The words of each command of a shell block: comments and variables in front left out, long lines joined."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := _without_variables(line))]


def _without_variables(words: list[str]) -> list[str]:
    return list(dropwhile(_VARIABLE.fullmatch, words))


def options_of(words: Sequence[str]) -> tuple[str, Any] | None:
    """The command's name and its options where it is one of ours, `fq ...` or `python train.py ...`; else None.

    Raises:
        AssertionError: If its own parser refuses it.
    """
    parsed: list[tuple[str, Any]] = []

    def fq() -> int:
        parsed.append(parse_command("fq", __version__, cli.DESCRIPTION, cli.COMMANDS, words[1:]))
        return 0

    def train() -> int:
        parsed.append(("train", parse(TrainOptions, "train.py", None, words[2:])))
        return 0

    if words[0] != "fq" and list(words[:2]) != ["python", "train.py"]:
        return None
    finished = run(fq if words[0] == "fq" else train)
    assert finished.code == 0, f"{shlex.join(words)}\n{finished.err}"
    return parsed[0]


def check_parses(words: Sequence[str]) -> None:
    """Asserts that a command line is one that its program takes. Nothing is run, written or downloaded.

    Raises:
        AssertionError: If it is not, or if nothing is known of the program.
    """
    found = options_of(words)
    if found is not None:
        if isinstance(found[1], TrainOptions | SweepOptions):
            check_config(found[1].config)
        return
    program_name, *arguments = words
    check = {
        "make": _check_make,
        "pip": _check_pip,
        "pytest": _check_pytest,
        "python": _check_script,
        ".venv/bin/python": _check_script,
        "tensorboard": _check_tensorboard,
        "lm-eval": _check_lm_eval,
    }.get(program_name)
    assert check is not None, f"nothing here knows how to parse: {shlex.join(words)}"
    check(arguments)


def _check_make(arguments: list[str]) -> None:
    dry = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr


def _check_pip(arguments: list[str]) -> None:
    """Extras and files exist; pip itself would ask an index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert arguments[0] == "install"
    files = [word for option, word in pairwise(arguments) if option == "-r"]
    assert all((ROOT / name).is_file() for name in files), files
    options = {word for word in arguments if word.startswith("-")}
    assert options <= {"-r", "--editable", "--no-deps"}, options
    for word in set(arguments[1:]) - options - set(files):
        package, _, extras = word.removesuffix("]").partition("[")
        assert package in (project["name"], "."), word
        assert set(filter(None, extras.split(","))) <= project["optional-dependencies"].keys(), word


def _check_pytest(arguments: list[str]) -> None:
    assert {word for word in arguments if word.startswith("-")} <= {"-s", "-k"}
    chosen = [word for option, word in pairwise(arguments) if option == "-k"]
    files = [word for word in arguments if not word.startswith("-") and word not in chosen]
    assert files
    assert all((ROOT / name).is_file() for name in files), files
    tests = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    assert all(re.search(rf"def test_\w*{word}", tests) for word in chosen), chosen


def _check_script(arguments: list[str]) -> None:
    """A script of ours, and options that it names."""
    path = ROOT / arguments[0]
    assert path.is_file(), arguments[0]
    text = path.read_text(encoding="utf-8")
    for option in arguments[1:]:
        name = option.lstrip("-").replace("-", "_")
        assert not option.startswith("--") or re.search(rf"{re.escape(option)}\b|\b{name}\b", text), option


def _check_tensorboard(arguments: list[str]) -> None:
    program.TensorBoard(plugins=[CorePluginLoader()]).configure(["tensorboard", *arguments])


def _check_lm_eval(arguments: list[str]) -> None:
    """By its help where it is installed; what the options say is run in tests/agents/tasks/test_harness.py."""
    assert arguments[:3] == ["run", "--model", "flexquant"]
    try:
        shown = subprocess.run(["lm-eval", "run", "--help"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return
    assert all(option in shown for option in arguments if option.startswith("--"))
