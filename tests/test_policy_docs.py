"""The Python blocks of docs/export.md and docs/verified-training.md run as they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_runner import run, write_sentences
from document_blocks import DOCS, run_blocks, save_random_policy

from flexquant_rl import cli
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.model import NestedCausalLM


def test_a_policy_decides(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_model_dir), keep_reference=False)
    save_random_policy(model, tmp_path / "policy")
    names, _ = run_blocks(DOCS / "export.md", tmp_path)
    widths = names["decision"].bit_widths
    assert widths.shape == (1, model.num_units)
    assert {*widths.flatten().tolist()} <= {*model.bit_widths}


def test_a_recording_is_played(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NestedCausalLM, "eos_token_ids", ())
    text = write_sentences(tmp_path / "text.txt", 120)
    options = ("--text", text, "--tokens", 96, "--depth", 8, "--prompt-tokens", 8, "--max-new-tokens", 12)
    assert run(cli.main, "record", tiny_model_dir, tmp_path / "traces", *options).code == 0
    names, _ = run_blocks(DOCS / "verified-training.md", tmp_path)
    env = names["env"]
    assert env.action_space.n == 1 + 4
    observation, info = env.reset(seed=0)
    assert np.isfinite(observation).all()
    assert info["action_mask"][0]
    env.close()
