"""`train.py` and `fq train`: a run from its options to its table."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from flexquant_rl.agents.commands.options import TrainOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.evaluation.report import console_table
from flexquant_rl.agents.evaluation.rows import ROWS_FILE, read_rows
from flexquant_rl.agents.runs.phases import evaluate_run, train_run
from flexquant_rl.agents.runs.run import load_run, locked_run, new_run
from flexquant_rl.agents.runs.verified_run import run_verified
from flexquant_rl.engine.errors import InputError


def train(options: TrainOptions) -> None:
    """Starts or continues a run and prints the table and the JSON line."""
    if options.resume is None:
        with new_run(options.config, options.run) as run_dir:
            _finish(options.config, run_dir)
        return
    given, default = ({"run": args.run, **vars(args.config)} for args in (options, TrainOptions(TrainConfig())))
    others = [f"{name}={value}" for name, value in given.items() if value != default[name]]
    if others:
        raise InputError(f"--resume continues a run as it was started, but {others[0]} was given too; leave it out")
    config = load_run(options.resume)
    with locked_run(options.resume):
        _finish(config, options.resume)


def _program() -> str:
    """How the user has started this."""
    return {"fq": "fq train", "fq-train": "fq-train"}.get(Path(sys.argv[0]).name, "python train.py")


def _finish(config: TrainConfig, run_dir: Path) -> None:
    """Runs what is left of a run."""
    try:
        if config.task == "verified":
            print_drafts(*run_verified(config, run_dir))
            return
        result = evaluate_run(config, train_run(config, run_dir), run_dir)
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(f"continue with: {_program()} --resume {shlex.quote(str(run_dir))}") from interruption
    print_outcome(run_dir, result)


def print_drafts(tables: str, result: dict[str, Any]) -> None:
    """The tables of a run of drafts, its findings and the JSON line."""
    print(tables)
    for finding in result["findings"]:
        print(f"- {finding}")
    print_result(result)


def print_outcome(run_dir: Path, result: dict[str, Any]) -> None:
    """The table of a run or a sweep, its findings and the JSON line."""
    print(console_table(read_rows(run_dir / ROWS_FILE)))
    for finding in result["findings"]:
        print(f"- {finding}")
    print_result(result)
