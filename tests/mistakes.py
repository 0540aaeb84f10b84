"""What the tests of bad input share: good inputs, a command with a mistake in it, and what must become of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli_runner import run, tree

from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.runs.run import new_run


@dataclass(frozen=True)
class Inputs:
    """Good inputs, shared by all cases and only read, and a folder for a case's own bad ones, which is its cwd too."""

    model: Path
    nested: Path
    text: Path
    policy: Path
    own: Path

    def copy(self, source: Path) -> Path:
        """A copy of a directory to damage."""
        return shutil.copytree(source, self.own / source.name)

    def write(self, name: str, content: bytes) -> Path:
        """A file of the case's own."""
        path = self.own / name
        path.write_bytes(content)
        return path


@dataclass(frozen=True)
class Mistake:
    """A command line, and what its error must say: the offending value and a fix."""

    main: Callable[[], int]
    arguments: tuple[object, ...]
    value: str
    fix: str


class Cases:
    """The cases of a test file, as a decorator that adds one; its name is the test's id."""

    def __init__(self) -> None:
        self.builders: list[Callable[[Inputs], Mistake]] = []

    def __call__(self, build: Callable[[Inputs], Mistake]) -> Callable[[Inputs], Mistake]:
        """Adds a case."""
        self.builders.append(build)
        return build


def check_mistake(mistake: Mistake, inputs: Inputs) -> None:
    """Runs the command and asserts that one line says what is wrong and what helps, and that no file has changed."""
    good = [tree(path) for path in (inputs.model, inputs.nested, inputs.policy)]
    before = tree(inputs.own)
    finished = run(mistake.main, *mistake.arguments)
    assert mistake.value in finished.error
    assert mistake.fix in finished.error
    assert tree(inputs.own) == before
    assert [tree(path) for path in (inputs.model, inputs.nested, inputs.policy)] == good


def make_run(inputs: Inputs, name: str = "run") -> Path:
    """The directory of a run that has not left a result yet."""
    with new_run(TrainConfig(model=str(inputs.model), text=(str(inputs.text),)), inputs.own / name) as run_dir:
        return run_dir


def damage(path: Path, kind: str) -> None:
    """Cuts the end off a file, or flips one bit in its last quarter."""
    content = bytearray(path.read_bytes())
    if kind == "cut":
        del content[-100:]
    else:
        content[-len(content) // 8] ^= 4
    path.write_bytes(content)
