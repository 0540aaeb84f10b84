"""From a hub name to a directory on this machine: only files that are read, and no waiting for a network that is not.

Models are loaded from directories alone, so that the same checks hold for a name. A hub that does not answer within
seconds is treated as absent: what was downloaded before is used, and anything else is one line.
"""

from __future__ import annotations

import threading
from pathlib import Path

from huggingface_hub import constants

from flexquant_rl.engine.errors import InputError, first_line
from flexquant_rl.engine.files import read_json

PATIENCE_S = 3.0
"""Seconds that the hub has to answer: with the start of a command one line comes within 10."""

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_FOLDERS = ["*/*"]  # other forms of the same model: onnx/, original/


def snapshot_config(name: str) -> Path:
    """The directory of a hub model on this machine, with its configuration and tokenizer, weights perhaps not yet.

    Raises:
        InputError: If there is no such model, or it is not on this machine and the hub does not answer.
    """
    return _snapshot(name, _SMALL_FILES)


def snapshot_weights(name: str, directory: Path) -> None:
    """Completes a directory of `snapshot_config` with the safetensors files that its index names.

    Raises:
        InputError: As `snapshot_config`.
    """
    try:
        files = sorted(indexed_files(directory))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        files = [WEIGHTS_FILE]
    if not all((directory / file).exists() for file in files):
        _snapshot(name, files)


def indexed_files(directory: Path) -> set[str]:
    """The names of the weight files that a directory's index names.

    Raises:
        OSError: If the index cannot be read.
        ValueError, KeyError, TypeError, AttributeError: If it is none.
    """
    return {str(name) for name in read_json(directory / INDEX_FILE)["weight_map"].values()}


def _snapshot(name: str, patterns: list[str]) -> Path:
    # Here, not above: the client takes a quarter of a second, and a directory needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    silence = _why_silent()
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=patterns,
                ignore_patterns=_FOLDERS,
                local_files_only=silence is not None,
                etag_timeout=PATIENCE_S,
            )
        )
    except HFValidationError as error:
        raise InputError(f"{name} is neither a directory nor a name on the hub (user/model); check it") from error
    except GatedRepoError as error:
        raise InputError(
            f"{name}: access to this model must be asked for; accept its terms at {constants.ENDPOINT}/{name}, "
            "log in with `hf auth login`, or give a directory"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{name} is neither a directory here nor a model on the hub; check the name") from error
    except Exception as error:  # of the client, of the network, of the file system
        if silence is None and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(
                f"{name} cannot be downloaded ({first_line(error)}); try again or give a directory"
            ) from error
        reason = silence or "it went silent"
        raise InputError(
            f"{name} is not a directory, was not downloaded before, and the hub cannot be asked ({reason}); "
            "check the name or the network, or give a directory"
        ) from error


def _why_silent() -> str | None:
    """Why the hub is not asked, or None if it answers."""
    from huggingface_hub import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    failure: list[str | None] = [f"{constants.ENDPOINT} did not answer within {PATIENCE_S:g} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
            failure[0] = None
        except Exception as error:  # whatever the client of the day raises
            failure[0] = f"{constants.ENDPOINT}: {first_line(error)}"

    # In a thread: looking a name up has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return failure[0]
