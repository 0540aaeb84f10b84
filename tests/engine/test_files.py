"""Tensor files: the same bytes for the same content, and a digest that notices any other."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import json_lines, new_directory, read_tensors, write_tensors

TENSORS = {
    "steps": torch.tensor(3),
    "none": torch.zeros(0, 2),
    "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
    "rng": torch.arange(9, dtype=torch.uint8),
}
METADATA = {"facts": '{"best_score": 0.25}', "other": "x"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "tensors", TENSORS, METADATA)
    return tmp_path / "tensors"


def test_roundtrip(path: Path) -> None:
    tensors, metadata = read_tensors(path, fix="")
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_equal_content_gives_equal_bytes(path: Path, tmp_path: Path) -> None:
    for _ in range(8):
        write_tensors(tmp_path / "again", dict(reversed(TENSORS.items())), METADATA)
        assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_any_flipped_byte_is_noticed(path: Path) -> None:
    """In the data, in names and shapes, in the metadata and in the digest itself."""
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(InputError, match=r"tensors: damaged, [^\n]*; delete it$"):
            read_tensors(path, fix="delete it")


def test_tensors_without_a_digest(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="damaged, no tensors with a digest.*; delete it"):
        read_tensors(path, fix="delete it")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Of the same path and of this machine; what a living process writes, and what is another's, stays."""
    path = tmp_path / "out"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, alive = (tmp_path / f".out.{platform.node()}.{process}.tmp" for process in (dead.pid, os.getppid()))
    others = [
        tmp_path / f".{name}.tmp" for name in (f"out.elsewhere.{dead.pid}", f"other.{platform.node()}.{dead.pid}")
    ]
    for folder in (left, alive, *others):
        folder.mkdir()
        (folder / "half").write_text("half")
    with new_directory(path) as directory:
        (directory / "whole").write_text("whole")
    assert {*tmp_path.iterdir()} == {path, alive, *others}


def test_json_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    """A JSON string may hold other separators as they are; empty lines count, and are left out."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n{"a": 1}\n', encoding="utf-8")
    assert json_lines(path) == [(1, '{"a": "x\u2028y"}'), (3, '{"a": 1}')]
