"""What rows of tasks depend on: another policy, another unquantised model and other timings have other digests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flexquant_rl.agents.commands.servable import load_servable
from flexquant_rl.agents.tasks.identity import plain_model_sha256, policy_sha256, timing_sha256
from flexquant_rl.engine.control.artefact import CARD_FILE, PROFILE_FILE, WEIGHTS_FILE


def test_policies_by_name_are_what_they_are_bound_to(tiny_model_dir: Path) -> None:
    model = load_servable(str(tiny_model_dir), "fixed:4")
    names = (
        "fixed:3",
        "fixed:4",
        "draft:3",
        "draft:4",
        "draft:3,length=2",
        "draft:3,confidence=0.4",
        "draft:3,verify=6",
        "lookups",
        "lookups:verify=6",
    )
    found = {name: load_servable(str(tiny_model_dir), name, loaded=model.model) for name in names}
    assert len({policy_sha256(name, servable) for name, servable in found.items()}) == len(names)
    assert policy_sha256("fixed:4", found["fixed:4"]) == policy_sha256("fixed:4", model)


def test_a_rung_is_its_files(tmp_path: Path) -> None:
    on_rung: Any = SimpleNamespace(policy=None, rung=SimpleNamespace(folder="fast"))
    alone: Any = SimpleNamespace(policy=None, rung=None)
    (tmp_path / "fast").mkdir()
    for name in (CARD_FILE, WEIGHTS_FILE, PROFILE_FILE):
        (tmp_path / "fast" / name).write_text(name)
    before = policy_sha256(str(tmp_path), on_rung)
    assert before == policy_sha256(str(tmp_path / "fast"), alone)
    for name in (CARD_FILE, WEIGHTS_FILE, PROFILE_FILE):
        (tmp_path / "fast" / name).write_text("other")
        assert policy_sha256(str(tmp_path), on_rung) != before
        (tmp_path / "fast" / name).write_text(name)


def test_an_unquantised_model_is_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = plain_model_sha256(tmp_path)
    (tmp_path / "README.md").write_text("says nothing")
    assert plain_model_sha256(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert plain_model_sha256(tmp_path) != before
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"one file")
    assert plain_model_sha256(gguf) != plain_model_sha256(tmp_path)


def test_times_depend_on_how_they_were_taken(tmp_path: Path) -> None:
    table, prompts = tmp_path / "profile.json", [torch.tensor([1, 2])]
    table.write_text("{}")
    taken = [
        (None, None, prompts, 32),
        (table, None, prompts, 32),
        (None, 1, prompts, 32),
        (None, None, [torch.tensor([1, 3])], 32),
        (None, None, prompts, 31),
    ]
    assert len({timing_sha256(*one) for one in taken}) == len(taken)
    assert timing_sha256(*taken[0]) == timing_sha256(*taken[0])
