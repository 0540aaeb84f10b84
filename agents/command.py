"""What every command has in common: exit codes, one-line errors, the JSON line at the end."""

from __future__ import annotations

import errno
import json
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from flexquant_rl.engine.errors import InputError

DONE, FAILURE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def command(run: Callable[[], None]) -> int:
    """Runs a command's body and turns what it raises into an exit code and one line on stderr.

    Bad input and a full disk give 2, an interruption 130; any other exception is a bug and keeps its traceback.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"transformers\.")
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except (OSError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        print(f"error: the disk is full ({error}); free some space and run the command again", file=sys.stderr)
        return BAD_INPUT
    return DONE


def _is_full_disk(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


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
