"""The block of docs/verified.md that drafts runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "verified.md"


def test_the_last_block_drafts(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NestedCausalLM, "eos_token_ids", ())
    model = load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))
    zeros = torch.zeros(model.num_units, len(model.bit_widths))
    profile = Profile(roofline_cost(model), zeros, model.bit_widths, model.fingerprint, 0, "8-bit")
    block = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[-1]
    printed: list[Any] = []
    names = {"torch": torch, "model": model, "profile": profile, "prompt_ids": torch.tensor([1, 97, 98, 97, 98])}
    exec(block.replace("200", "60"), names | {"print": lambda value, **_: printed.append(value)})
    *pieces, acceptance = printed
    assert len(pieces) == 60
    assert 1 <= len(acceptance) <= 4
    assert all(0 <= share <= 1 for share in acceptance)
