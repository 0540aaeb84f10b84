"""Trains a precision controller: a language model and some text in, an exported policy and a comparison out.

    python train.py                                   # embedded model, a few minutes on two cores
    python train.py --model DIR --text FILE           # any Hugging Face causal LM, any text
    python train.py --resume RUN                      # after Ctrl-C or a crash

The last line of stdout is one JSON object. Exit codes: 0 done, 1 failure, 2 bad input, 130 interrupted (resumable).
"""

from __future__ import annotations

import os

# Torch's OpenMP threads spin while they wait. Without a limit that costs 8 ms per operation on a busy machine, and
# without any spinning a third of the speed on an idle one. libgomp reads this once, when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from flexquant_rl.agents.command import command, print_result
from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.evaluation.report import console_table
from flexquant_rl.agents.evaluation.rows import read_rows
from flexquant_rl.agents.runs.phases import evaluate_run, train_run
from flexquant_rl.agents.runs.run import load_run, new_run
from flexquant_rl.engine.errors import InputError


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
    if arguments.resume is None:
        with new_run(arguments.config, arguments.run) as run_dir:
            _finish(arguments.config, run_dir)
        return
    given, default = ({"run": args.run, **vars(args.config)} for args in (arguments, TrainArguments(TrainConfig())))
    others = [f"{name}={value}" for name, value in given.items() if value != default[name]]
    if others:
        raise InputError(f"--resume continues a run as it was started, but {others[0]} was given too; leave it out")
    _finish(load_run(arguments.resume), arguments.resume)


def _finish(config: TrainConfig, run_dir: Path) -> None:
    """Runs what is left of a run."""
    try:
        result = evaluate_run(config, train_run(config, run_dir), run_dir)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: python train.py --resume {run_dir}") from None
    print(console_table(read_rows(run_dir / "eval.jsonl")))
    for finding in result["findings"]:
        print(f"- {finding}")
    print_result(result)


def main() -> int:
    """The command `fq-train` and `python train.py`."""
    return command(lambda: train(tyro.cli(TrainArguments, prog="train.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
