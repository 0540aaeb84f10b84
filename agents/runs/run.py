"""The directory of a run and its configuration: made once, read by every resume."""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.engine.control.artefact import PROFILE_FILE
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import check_field_types
from flexquant_rl.engine.files import read_json, write_json

RUN_VERSION = 2
CONFIG_FILE = "config.json"

Swept = Mapping[str, Sequence[int | float]]
"""What a sweep varies: the values of each option."""


@contextmanager
def new_run(config: TrainConfig, run_dir: Path | None, swept: Swept | None = None) -> Iterator[Path]:
    """Makes the directory of a new run, writes its configuration (and the profile it names) and yields it, locked.

    Where the block fails on what it was given, or on the disk, before any phase left a result, all of it is taken away
    again: the corrected command may use the same name. After an interruption it stays, to be resumed.

    Args:
        config: Configuration of the run.
        run_dir: The directory; default: `runs/<model>-<time>`.
        swept: For a sweep, what it varies; kept with the configuration.

    Raises:
        InputError: If the directory exists already or another process takes it, or if the configuration's profile
            cannot be read.
    """
    wanted = run_dir or Path("runs") / f"{Path(resolve_model(config.model)).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (wanted / CONFIG_FILE).exists() and run_dir is not None:
        raise InputError(f"{run_dir} holds a run already; continue it with --resume {run_dir}, or choose another --run")
    if run_dir is not None and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(f"{run_dir} exists and is not a run; choose another --run directory")
    created = [folder for folder in (wanted, *wanted.parents) if not folder.exists()]
    if run_dir is None:
        run_dir = _claimed(wanted)
        created = [run_dir, *created[1:]]
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked_run(run_dir):  # whoever comes second in this moment is refused, and cleans nothing up
        if (run_dir / CONFIG_FILE).exists():
            raise InputError(f"{run_dir} holds a run by now; continue it with --resume {run_dir}")
        try:
            write_config(config, run_dir, swept)
            if config.profile is not None:  # kept, whatever becomes of the file: a resume must find the same one
                Profile.load(Path(config.profile)).save(run_dir / PROFILE_FILE)
            yield run_dir
        except (InputError, OSError):
            begun = {CONFIG_FILE} if config.profile is None else {CONFIG_FILE, PROFILE_FILE}
            if run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= begun:
                for file in begun:
                    (run_dir / file).unlink(missing_ok=True)
                for folder in created:
                    with suppress(OSError):  # another run may have come to use a parent
                        folder.rmdir()
            raise


def write_config(config: TrainConfig, run_dir: Path, swept: Swept | None = None) -> None:
    """Writes the configuration of a run, or of a sweep, atomically."""
    sweep = {} if swept is None else {"sweep": {name: list(values) for name, values in swept.items()}}
    write_json(run_dir / CONFIG_FILE, {"version": RUN_VERSION, "config": asdict(config), **sweep})


def _claimed(wanted: Path) -> Path:
    """Makes a directory of that name, or with a number behind it where another run of this second has it."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        name = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with suppress(FileExistsError):
            name.mkdir()
            return name
    raise AssertionError("numbers do not end")


@contextmanager
def locked_run(run_dir: Path) -> Iterator[None]:
    """Keeps other processes from working on a run while the block does. It ends with the process.

    Raises:
        InputError: If another one does already.
    """
    directory = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is working on {run_dir}, and a run takes one at a time; wait for it or stop it"
            ) from error
        yield
    finally:
        os.close(directory)


def load_run(run_dir: Path) -> TrainConfig:
    """Reads the configuration of a run.

    Raises:
        InputError: If the directory is not a run of this version.
    """
    config, swept = _load(run_dir)
    if swept is not None:
        raise InputError(f"{run_dir} is a sweep; continue it with fq sweep --resume {run_dir}, or name one of its runs")
    return config


def load_sweep(sweep_dir: Path) -> tuple[TrainConfig, Swept]:
    """Reads the configuration of a sweep and what it varies, as it stands in the file.

    Raises:
        InputError: If the directory is not a sweep of this version.
    """
    config, swept = _load(sweep_dir)
    if swept is None:
        raise InputError(f"{sweep_dir} is a run; continue it with train.py --resume {sweep_dir}")
    return config, swept


def _load(run_dir: Path) -> tuple[TrainConfig, Swept | None]:
    path = run_dir / CONFIG_FILE
    try:
        data = read_json(path)
        if data["version"] != RUN_VERSION:
            raise InputError(f"{path}: run version {data['version']}, this is {RUN_VERSION}; start a new run")
        data["config"]["verified"].setdefault("ngram_drafts", 0)  # runs from before anything was looked up
        config: TrainConfig = _from_dict(TrainConfig, data["config"])
        swept = data.get("sweep")
        if swept is not None:
            swept = {str(name): list(values) for name, values in swept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{run_dir} is not a run (no readable config.json: {error}); pass a directory of train.py"
        ) from error
    try:
        check_field_types(config)
    except InputError as error:
        raise InputError(f"{path}: {error}, or start a new run") from error
    return config, swept


def _from_dict(kind: Any, data: dict[str, Any]) -> Any:
    """Rebuilds a nested dataclass from JSON; lists become tuples. Unknown and missing fields raise."""
    if not isinstance(data, dict):
        raise TypeError(f"{kind.__name__} is no object")
    hints = get_type_hints(kind)
    unknown = set(data) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]}")
    values = {}
    for name, value in data.items():
        if is_dataclass(hints[name]):
            values[name] = _from_dict(hints[name], value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
