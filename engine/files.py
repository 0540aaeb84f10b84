"""Writing files so that an interruption or a full disk never leaves half of one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexquant_rl.engine.errors import InputError

_HEADER = "flexquant_rl"
"""The only entry of a file's safetensors metadata: several are written in an order that differs from file to file."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling that becomes `path` when the block succeeds and vanishes when it does not.

    What a process that was killed has left of the same path is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary siblings of processes of this machine that are no more."""
    beginning, end = f".{path.name}.{platform.node()}.", ".tmp"
    for sibling in path.parent.iterdir():
        process = sibling.name.removeprefix(beginning).removesuffix(end)
        if sibling.name == f"{beginning}{process}{end}" and process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(sibling) if sibling.is_dir() else sibling.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's, or no number of a process
        return True
    return True


class OutputExistsError(InputError):
    """What was to be written anew is there already.

    Attributes:
        path: Where.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} exists and is not empty; choose another output directory or remove it")
        self.path = path


def check_new_directory(path: Path) -> None:
    """Raises OutputExistsError if `path` exists and is no empty directory. Worth doing before what fills it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputExistsError(path)


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


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not JSON, or nested so deeply that Python gives up.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_sha256(data: Any) -> str:
    """Digest of what JSON can hold, as it is written; the order of keys counts."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def json_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a JSON-lines file that are not empty, with their numbers from 1 on, not parsed yet.

    Raises:
        OSError, UnicodeDecodeError: If the file cannot be read.
    """
    # Not splitlines(): JSON strings may hold U+2028 and other separators as they are.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line]


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors atomically, with a digest of tensors and metadata that `read_tensors` checks."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = metadata or {}
    header = {"sha256": _sha256(tensors, metadata), "metadata": metadata}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, {_HEADER: json.dumps(header)})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"{path}: {error}") from error
        temporary.chmod(mode)  # safetensors makes a file that only its owner may read, whatever the umask


def read_tensors(path: Path, *, fix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what `write_tensors` wrote, checked against its digest.

    Args:
        path: The file.
        fix: What to do about a damaged one, as the error says it.

    Returns:
        Tensors by name, on the CPU, and the metadata.

    Raises:
        InputError: If the file is missing, unreadable, without a digest, or does not hold what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        expected, metadata = header["sha256"], header["metadata"]
        if not isinstance(metadata, dict):
            raise TypeError("its metadata are no dictionary")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, no tensors with a digest ({error!r}); {fix}") from error
    found = _sha256(tensors, metadata)
    if found != expected:
        raise InputError(f"{path}: damaged, sha256 {found[:12]}, but its header says {str(expected)[:12]}; {fix}")
    return tensors, metadata


def _sha256(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Digest of names, dtypes, shapes and bytes of contiguous tensors and of the metadata, hex."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
