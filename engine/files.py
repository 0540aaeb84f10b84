"""Writing files so that an interruption or a full disk never leaves half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flexquant_rl.engine.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling that becomes `path` when the block succeeds and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def check_new_directory(path: Path) -> None:
    """Raises InputError if `path` exists and is not an empty directory. Worth doing before the work that fills it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not empty; choose another output directory or remove it")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `path` when the block succeeds.

    Raises:
        InputError: If `path` exists and is not an empty directory.
    """
    check_new_directory(path)
    with replacing(path) as temporary:
        if temporary.is_dir():  # left by a killed process that had the same id
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors atomically."""
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"{path}: {error}") from error
        temporary.chmod(mode)  # safetensors makes a file that only its owner may read, whatever the umask
