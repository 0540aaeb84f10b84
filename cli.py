"""The `fq` command: reads options, then loads what the command needs.

Usage errors and --help answer at once, because nothing that is slow is imported before the options are read.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

# See train.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from flexquant_rl.agents.commands.options import (
    BenchCommand,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    ProfileOptions,
    QuantizeOptions,
    TrainOptions,
)
from flexquant_rl.agents.commands.parsing import parse_command
from flexquant_rl.agents.commands.process import command

COMMANDS: dict[str, type[Any]] = {
    "quantize": QuantizeOptions,
    "profile": ProfileOptions,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "export": ExportOptions,
    "generate": GenerateOptions,
    "bench": BenchCommand,
}
"""Options of every command; what it does is the function of its name in `agents/commands`, in the file of its name."""

DESCRIPTION = """Quantise, profile, train, evaluate, export, generate, benchmark: precision control for LLM inference.

`fq COMMAND --help` lists a command's options, `fq --version` prints the version. The last line of stdout is one JSON
object. Exit codes: 0 done, 1 failure, 2 bad input, 130 interrupted."""


def run(name: str, options: object) -> None:
    """Imports a command and runs it."""
    module = importlib.import_module(f"flexquant_rl.agents.commands.{name}")
    function: Callable[[object], None] = getattr(module, name)
    function(options)


def main() -> int:
    """The command `fq`."""
    return command(lambda: run(*parse_command("fq", DESCRIPTION, COMMANDS, sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
