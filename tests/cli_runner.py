"""Runs commands as a shell does, arguments in, exit code and output out, but in this process: imports cost seconds."""

from __future__ import annotations

import io
import json
import logging
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent

# An episode of 12 tokens, 4 of them decisions; 3 rollouts of 16 env steps for each seed.
TINY_EPISODES = ("--env.prompt-tokens", 8, "--env.max-new-tokens", 4)
TINY_RUN = (
    *TINY_EPISODES,
    *("--env-steps", 48, "--ppo.num-envs", 4, "--ppo.batch-size", 8, "--ppo.num-epochs", 2),
    *("--validation-sequences", 3, "--test-sequences", 3, "--num-dials", 2, "--oracle-samples", 8),
    *("--long-tokens", 10, "--importance-windows", 10),
)


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object in the last line of stdout."""
        assert self.code == 0, f"exit code {self.code}\n{self.err}"
        value = json.loads(self.out.splitlines()[-1])
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The one line that bad input ends with; before it there may be lines of progress, on stdout is nothing."""
        lines = self.err.splitlines()
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], self.err
        assert "Traceback" not in self.err
        assert "Warning" not in self.err
        assert self.out == ""
        return lines[-1].removeprefix("error: ")


def run(main: Callable[[], int], *arguments: object, stdout: TextIO | None = None) -> Finished:
    """Calls a command's `main` with these arguments; output may go to a terminal instead of being kept."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["command", *map(str, arguments)])
    with argv, redirect_stdout(stdout or out), redirect_stderr(err), _library_messages(err):
        try:
            code = main()
        except SystemExit as exit_:  # --help, and what tyro itself refuses
            code = int(exit_.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())


@contextmanager
def _library_messages(stream: io.StringIO) -> Iterator[None]:
    """Sends what transformers logs to a stream, and puts back what commands silence in the whole process."""
    from transformers.utils import logging as transformers_logging

    handlers = [handler for handler in logging.getLogger("transformers").handlers if hasattr(handler, "setStream")]
    before = [(handler, handler.setStream(stream)) for handler in handlers]
    verbosity = transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers_logging.set_verbosity(verbosity)
    for handler, original in before:
        if original is not None:
            handler.setStream(original)


def spawn(script: str, *arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """Starts a script of the repository's root in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_text(path: Path, num_chunks: int = 40) -> Path:
    """Writes ASCII paragraphs of random words, always the same, enough for windows in every split."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 6))) for _ in range(100)]
    paragraphs = [" ".join(generator.choices(words, k=900)) for _ in range(num_chunks)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def write_sentences(path: Path, count: int) -> Path:
    """Writes sentences that the character tokenizer of the tiny models knows, always the same."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "red", "fox", "run", "far"]
    lines = [" ".join(words[(i * j) % 12] for j in range(1, 30)) + "." for i in range(count)]
    path.write_text("\n\n".join(lines))
    return path


def tree(root: Path) -> dict[str, int | None]:
    """Every file (with its size) and directory (None) below a folder."""
    return {
        path.relative_to(root).as_posix(): path.stat().st_size if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def leftovers(paths: Iterable[str]) -> list[str]:
    """Names that only an unfinished write leaves."""
    return [path for path in paths if path.endswith(".tmp")]
