"""Trials through Ray Tune, on this machine or on a cluster that runs already.

Ray only places them: what is finished and where an unfinished one goes on is in each trial's own run.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexquant_rl.agents.preparation import prepare
from flexquant_rl.agents.progress import say
from flexquant_rl.agents.runs.importance import load_importance
from flexquant_rl.agents.runs.run import load_run, locked_run
from flexquant_rl.agents.runs.sweep import Trial
from flexquant_rl.agents.runs.training import Validation, train_seed
from flexquant_rl.engine.errors import InputError

LOG_FILE = "train.log"
_CONNECT_S = 30.0
# Ray takes 127.0.0.1 for a request to find an address that others reach. On Linux all of 127.0.0.0/8 is the loopback.
_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Nothing is sent anywhere; no logs and tables beside our own; Ctrl-C is ours; relative paths stay what they are."""


@dataclass(frozen=True)
class Workers:
    """Where trials run.

    Attributes:
        address: `auto` or `HOST:PORT` of a cluster that runs already; None starts one on this machine.
        workers: Trials at a time; None takes what the processors are enough for.
        cpus: Processors of each.
        gpus: GPUs of each; a part of one lets several share it.
    """

    address: str | None
    workers: int | None
    cpus: int
    gpus: float

    def check(self) -> None:
        """Raises InputError where trials cannot run so, before anything is prepared."""
        for name, value, least in (("workers", self.workers, 1), ("cpus", self.cpus, 1), ("gpus", self.gpus, 0)):
            if value is not None and value < least:
                raise InputError(f"{name}={value:g} must be at least {least}; give --{name} {least} or more")
        os.environ.update(_SETTINGS)
        try:
            importlib.import_module("ray.tune")
        except ImportError as error:
            raise InputError("fq sweep needs Ray Tune, and it is missing; pip install 'flexquant-rl[ray]'") from error
        if self.address is not None:
            check_cluster(self.address)


def check_cluster(address: str, timeout_s: float = _CONNECT_S) -> None:
    """Raises InputError unless a cluster answers in time; in a process of its own, as Ray may wait or abort."""
    program = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    fix = "start it with `ray start --head`, correct --address, or leave it out to use this machine"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, address], capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"no Ray cluster answers at {address} within {timeout_s:g} s; {fix}") from error
    if done.returncode:
        raise InputError(f"no Ray cluster answers at {address}; {fix}")


def run_trials(trials: Sequence[Trial], where: Workers) -> dict[str, str]:
    """Trains trials, several at a time.

    Args:
        trials: The unfinished ones; their runs are made.
        where: On what.

    Returns:
        Why those that failed did, by their name.
    """
    import ray
    from ray import tune

    names = {str(trial.directory): trial.name for trial in trials}
    storage = trials[0].directory.parent / ".ray"  # Tune wants one that all machines see
    with tempfile.TemporaryDirectory(prefix="fq-") as scratch:
        _start(ray, where, scratch)
        try:
            _check_resources(ray, where)
            tuner = tune.Tuner(
                tune.with_resources(_train, {"cpu": where.cpus, "gpu": where.gpus}),
                param_space={"directory": tune.grid_search(list(names)), "started_in": str(Path.cwd())},
                tune_config=tune.TuneConfig(max_concurrent_trials=where.workers, reuse_actors=False),
                run_config=tune.RunConfig(
                    storage_path=str(storage), name="trials", verbose=0, callbacks=[_reporter(names)]
                ),
            )
            grid = tuner.fit()
            results = [grid[index] for index in range(len(grid))]
        finally:
            ray.shutdown()
            shutil.rmtree(storage, ignore_errors=True)
    failed = {}
    for result in results:
        error = (result.metrics or {}).get("error") or (result.error and _last_line(result.error))
        if error:
            failed[names[(result.config or {})["directory"]]] = str(error)
    return failed


def _start(ray: Any, where: Workers, scratch: str) -> None:
    """Connects to the cluster, or starts one on this machine that asks for no other."""
    os.environ.update(_SETTINGS)
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what fails is said in one line, by us
    quiet = {"log_to_driver": False, "logging_level": "critical", "configure_logging": True}
    if where.address is not None:
        ray.init(address=where.address, **quiet)
        return
    # Workers find packages where this process does.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    os.environ.pop("RAY_ADDRESS", None)
    num_cpus = where.cpus * where.workers if where.workers else max(os.cpu_count() or 1, where.cpus)
    ray.init(num_cpus=num_cpus, include_dashboard=False, _node_ip_address=_LOOPBACK, _temp_dir=scratch, **quiet)


def _check_resources(ray: Any, where: Workers) -> None:
    """Raises InputError where no trial would ever start: Ray waits for processors that may come."""
    there = ray.cluster_resources()
    for option, resource, wanted in (("cpus", "CPU", where.cpus), ("gpus", "GPU", where.gpus)):
        if wanted > there.get(resource, 0):
            raise InputError(
                f"a trial asks for {option}={wanted:g}, and Ray has {there.get(resource, 0):g}; give --{option} less"
            )


def _train(trial: dict[str, Any]) -> dict[str, Any]:
    """What a worker does: trains the one seed of a run, or goes on from its checkpoint."""
    directory = Path(trial["directory"])
    os.chdir(trial["started_in"])  # the configuration's paths are relative to it
    with (directory / LOG_FILE).open("a", encoding="utf-8") as log, redirect_stderr(log):
        try:
            config = load_run(directory)
            with locked_run(directory):
                prepared = prepare(config, directory)
                validation = Validation(prepared, config.validation_sequences)
                importances = load_importance(config, prepared, directory, validation)
                seed_dir = directory / "seeds" / str(config.seed)
                result = train_seed(config, prepared, config.seed, seed_dir, importances, validation)
        except InputError as error:
            return {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}
    return {"score": result.best_score}


def _reporter(names: dict[str, str]) -> Any:
    """Says of every trial how it ended."""
    from ray import tune

    class Reporter(tune.Callback):  # type: ignore[misc, unused-ignore]  # Any where Ray is not installed
        done = 0

        def _say(self, trial: Any, outcome: str) -> None:
            self.done += 1
            say(f"trial {self.done} of {len(names)}: {names[trial.config['directory']]}: {outcome}")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            last = trial.last_result or {}
            score = last.get("score")
            self._say(trial, last.get("error", "failed") if score is None else f"validation {score:+.4f} over static")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._say(trial, "failed")

    return Reporter()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
