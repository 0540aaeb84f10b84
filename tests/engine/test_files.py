"""Tensor files: the same bytes for the same content, and a digest that notices any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_tensors, write_tensors

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
