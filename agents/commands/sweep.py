"""`fq sweep`: seeds times configurations, trained side by side; validation text chooses, test text judges once."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexquant_rl.agents.commands.options import SweepOptions
from flexquant_rl.agents.commands.train import print_outcome
from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.preparation import check_budgets, prepare
from flexquant_rl.agents.progress import say
from flexquant_rl.agents.runs.importance import TOKEN_DIR, load_importance
from flexquant_rl.agents.runs.phases import evaluate_run, export_best
from flexquant_rl.agents.runs.ray_trials import Workers, run_trials
from flexquant_rl.agents.runs.run import Swept, load_sweep, locked_run, new_run
from flexquant_rl.agents.runs.sweep import (
    Scored,
    check_swept,
    described,
    make_trial,
    notes,
    parse_settings,
    scored,
    trials,
)
from flexquant_rl.engine.errors import InputError


def sweep(options: SweepOptions) -> None:
    """Starts or continues a sweep and prints the table and the JSON line."""
    if options.resume is None:
        if options.config.task != "lossy":
            raise InputError(f"--task {options.config.task}: a sweep is of the lossy task; use train.py --seeds")
        swept = parse_settings(options.settings)
        check_swept(options.config, swept)
        workers = _workers(options, options.config)
        with new_run(options.config, options.run, swept) as sweep_dir:
            _run(options.config, swept, workers, sweep_dir)
        return
    default = SweepOptions(TrainConfig())
    given = [name for name in ("config", "settings", "run") if getattr(options, name) != getattr(default, name)]
    if given:
        raise InputError(
            "--resume continues a sweep as it was started; leave every option out but --workers, --cpus, --gpus and "
            "--address"
        )
    config, swept_before = load_sweep(options.resume)
    check_swept(config, swept_before)
    workers = _workers(options, config)
    with locked_run(options.resume):
        _run(config, swept_before, workers, options.resume)


def _workers(options: SweepOptions, config: TrainConfig) -> Workers:
    """Where the trials run, checked."""
    gpus = options.gpus if options.gpus is not None else float(config.device == "cuda")
    workers = Workers(options.address, options.workers, options.cpus, gpus)
    workers.check()
    return workers


def _run(config: TrainConfig, swept: Swept, workers: Workers, sweep_dir: Path) -> None:
    """Runs what is left of a sweep."""
    try:
        result = _finish(config, swept, workers, sweep_dir)
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(f"continue with: fq sweep --resume {shlex.quote(str(sweep_dir))}") from interruption
    print_outcome(sweep_dir, result)


def _finish(config: TrainConfig, swept: Swept, workers: Workers, sweep_dir: Path) -> dict[str, Any]:
    prepared = prepare(config, sweep_dir)
    check_budgets(config, prepared)
    importances = load_importance(config, prepared, sweep_dir)
    every = trials(config, swept, sweep_dir)
    left = [trial for trial in every if not trial.is_finished]
    failed: dict[str, str] = {}
    if left:
        say(f"training {len(left)} of {len(every)} trials")
        for trial in left:
            make_trial(trial, sweep_dir)
        failed = run_trials(left, workers)
        # What was chosen among fewer trials is chosen again.
        for chosen in ("policy", TOKEN_DIR):
            shutil.rmtree(sweep_dir / chosen, ignore_errors=True)
    found = scored(config, swept, sweep_dir, prepared, importances)
    if not found:
        name, error = next(iter(failed.items()), ("", "no trial has a policy"))
        raise InputError(
            f"no configuration has finished with all its seeds ({name}: {error}); the trials' train.log says more, "
            f"fq sweep --resume {shlex.quote(str(sweep_dir))} tries again"
        )
    best = found[0]
    say(f"validation text chose {described(best.settings)}: {best.mean:+.4f} over static")
    trained = export_best(best.config, prepared, best.results, sweep_dir, importances)
    result = evaluate_run(best.config, trained, sweep_dir, notes(found, failed))
    return {**result, "sweep": _summary(found, failed, len(every))}


def _summary(found: list[Scored], failed: Mapping[str, str], num_trials: int) -> dict[str, Any]:
    """The sweep itself, for the JSON line: configurations by their validation scores, best first."""
    return {
        "trials": num_trials,
        "failed": dict(failed),
        "chosen": dict(found[0].settings),
        "configurations": [
            {
                "settings": dict(one.settings),
                "validation_reward_over_static": [result.best_score for result in one.results],
                "mean": one.mean,
            }
            for one in found
        ],
    }
