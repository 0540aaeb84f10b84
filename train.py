"""Trains a precision controller: a language model and some text in, an exported policy and a comparison out.

    python train.py                                   # embedded model, a few minutes on two cores
    python train.py --model DIR --text FILE           # any Hugging Face causal LM, any text
    python train.py --resume RUN                      # after Ctrl-C or a crash

The last line of stdout is one JSON object. Exit codes: 0 done, 1 failure, 2 bad input, 130 interrupted (resumable).
"""

from __future__ import annotations

import os

# Torch's OpenMP threads spin while they wait, which on a busy machine costs 8 ms per operation; libgomp reads this once,
# when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from flexquant_rl.agents.command import command, print_result
from flexquant_rl.agents.report import console_table
from flexquant_rl.agents.rows import read_rows
from flexquant_rl.agents.run import load_run, start_run, train_run
from flexquant_rl.agents.training import TrainConfig


@dataclass(frozen=True)
class TrainArguments:
    """Trains a precision controller with PPO and compares it with heuristics on held-out text."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """What to train."""
    run: Path | None = None
    """Directory of the run; default: runs/<model>-<time>."""
    resume: Path | None = None
    """Continue this run; its own configuration holds, other options are refused."""


def train(arguments: TrainArguments) -> None:
    """Starts or continues a run and prints the table and the JSON line."""
    if arguments.resume is not None:
        if replace(arguments, resume=None) != TrainArguments(TrainConfig()):
            from flexquant_rl.engine.errors import InputError

            raise InputError("--resume takes no other options: the run continues as it was started")
        run_dir, config = arguments.resume, load_run(arguments.resume)
    else:
        config = arguments.config
        run_dir = start_run(config, arguments.run)
    try:
        result = train_run(config, run_dir)
    except KeyboardInterrupt:
        print(f"interrupted; continue with: python train.py --resume {run_dir}", file=sys.stderr)
        raise
    print(console_table(read_rows(run_dir / "eval.jsonl")))
    for finding in result["findings"]:
        print(f"- {finding}")
    print_result(result)


def main() -> int:
    """The command `fq-train` and `python train.py`."""
    return command(lambda: train(tyro.cli(TrainArguments, prog="train.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
