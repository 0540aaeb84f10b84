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

from flexquant_rl import __version__
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

DESCRIPTION = """Precision control for LLM inference: nested weights, learned bit-widths.

`fq COMMAND --help` lists the options of a command, `fq --version` the version.

The last line of stdout is one JSON object.

Exit: 0 done, 1 failure, 2 bad input, 130 Ctrl-C, 141 closed pipe, 143 SIGTERM."""


def run(name: str, options: object) -> None:
    """Imports a command and runs it."""
    module = importlib.import_module(f"flexquant_rl.agents.commands.{name}")
    function: Callable[[object], None] = getattr(module, name)
    function(options)


def main() -> int:
    """The command `fq`."""
    return command(lambda: run(*parse_command("fq", __version__, DESCRIPTION, COMMANDS, sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
