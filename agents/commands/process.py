"""What every command has in common: exit codes, one-line errors, signals, the JSON line at the end.

Imports nothing that is slow.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from flexquant_rl.engine.errors import InputError

TRAINING_PACKAGES = ("gymnasium", "stable_baselines3", "tensorboard", "matplotlib")
"""What an installation that only serves leaves out (requirements-serving.txt)."""

DONE, FAILURE, BAD_INPUT, INTERRUPTED, READER_GONE, TERMINATED = 0, 1, 2, 130, 141, 143

ENDINGS = """The last line of stdout is one JSON object.

Exit: 0 done, 1 failure, 2 bad input, 130 Ctrl-C, 141 closed pipe, 143 SIGTERM."""
"""What the help of every program says last."""

_NOT_A_PLACE = "choose another place to write to"
# What the machine refuses although the program is right, and what to do about it.
_ADVICE = {
    errno.ENOSPC: "free some space and run the command again",
    errno.EDQUOT: "free some space and run the command again",
    errno.EACCES: "change its permissions or choose another place",
    errno.EPERM: "change its permissions or choose another place",
    errno.EROFS: _NOT_A_PLACE,
    errno.ENOTDIR: _NOT_A_PLACE,
    errno.EISDIR: _NOT_A_PLACE,
    errno.EEXIST: _NOT_A_PLACE,
    errno.ENAMETOOLONG: _NOT_A_PLACE,
}


def run_command(name: str, options: object) -> None:
    """Imports a command, the function of its name in the file of its name, and runs it.

    Not before its options are read: --help must not wait for torch.
    """
    # An import makes many objects and next to no garbage: looking for it takes a sixth of the time of torch's import.
    gc.disable()
    try:
        module = importlib.import_module(f"flexquant_rl.agents.commands.{name}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAINING_PACKAGES:
            raise
        raise InputError(
            f"fq {name} needs the package {package}, which an installation that only serves leaves out; pip install "
            "flexquant-rl, with its dependencies"
        ) from error
    finally:
        gc.enable()
    gc.freeze()  # and what is imported stays
    function: Callable[[object], None] = getattr(module, name)
    function(options)


def command(run: Callable[[], None]) -> int:
    """Runs a command's body and turns what it raises into an exit code and one line on stderr.

    Bad input and a disk that cannot be written give 2, Ctrl-C 130, SIGTERM 143, a closed pipe 141; any other exception
    is a bug and keeps its traceback.

    Args:
        run: The body; may raise `KeyboardInterrupt` with a message that says how to continue.
    """
    _quieten_libraries()
    try:
        with _terminated_like_interrupted():
            run()
    except InputError as error:
        return _bad_input(error)
    except KeyboardInterrupt as interruption:
        is_terminated = isinstance(interruption.__cause__ or interruption, _Terminated)
        word = "terminated" if is_terminated else "interrupted"
        print("; ".join([word, *map(str, interruption.args)]), file=sys.stderr)
        return TERMINATED if is_terminated else INTERRUPTED
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough; Python must not flush to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except OSError as error:
        advice = _ADVICE.get(errno.ENOSPC if "No space left" in str(error) else error.errno or 0)
        if advice is None:
            raise
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _bad_input(InputError(f"{where}; {advice}"))
    return DONE


class _Terminated(KeyboardInterrupt):
    """SIGTERM: cleaned up after as Ctrl-C is."""


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Inside the block SIGTERM raises in the main thread, so that nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quieten_libraries() -> None:
    """Commands say themselves what happens; transformers reads these when it is imported, which is later."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"transformers\.")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


def _bad_input(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT


def peak_memory_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def print_result(result: dict[str, Any]) -> None:
    """Prints the command's last stdout line: one JSON object, with null for what is not a number."""
    print(json.dumps(_finite(result), allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
