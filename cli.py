"""The `fq` command: reads options, then loads what the command needs.

Usage errors and --help answer at once, because nothing that is slow is imported before the options are read.
"""

from __future__ import annotations

import os
import sys
from typing import Any

# See train.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from flexquant_rl import __version__
from flexquant_rl.agents.commands.options import (
    AnalyseOptions,
    BenchCommand,
    CombineOptions,
    DemoOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    InspectOptions,
    ProfileOptions,
    QuantizeOptions,
    RecordOptions,
    ServeOptions,
    SweepOptions,
    TasksOptions,
    TrainOptions,
)
from flexquant_rl.agents.commands.parsing import parse_command
from flexquant_rl.agents.commands.process import ENDINGS, command, run_command

COMMANDS: dict[str, type[Any]] = {
    "quantize": QuantizeOptions,
    "analyse": AnalyseOptions,
    "profile": ProfileOptions,
    "record": RecordOptions,
    "train": TrainOptions,
    "sweep": SweepOptions,
    "evaluate": EvaluateOptions,
    "tasks": TasksOptions,
    "export": ExportOptions,
    "combine": CombineOptions,
    "generate": GenerateOptions,
    "serve": ServeOptions,
    "inspect": InspectOptions,
    "demo": DemoOptions,
    "bench": BenchCommand,
}
"""Options of every command; what it does is the function of its name in `agents/commands`, in the file of its name."""

DESCRIPTION = f"""Precision control for LLM inference: nested weights, learned bit-widths.

`fq COMMAND --help` lists the options of a command, `fq --version` the version.

{ENDINGS}"""


def main() -> int:
    """The command `fq`."""
    return command(lambda: run_command(*parse_command("fq", __version__, DESCRIPTION, COMMANDS, sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
