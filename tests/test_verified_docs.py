"""The Python blocks of docs/verified.md: the protocol is that of the code, and the one that drafts runs as written."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.drafts import DraftPolicy, RoundState
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "verified.md"


def test_the_first_block_is_the_protocol() -> None:
    block, _ = BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))
    names: dict[str, Any] = {
        "Protocol": Protocol,
        "Tensor": torch.Tensor,
        "RoundState": RoundState,
        "Decision": Decision,
    }
    exec(block, names)
    shown = names["DraftPolicy"]
    assert {*shown.__annotations__} == {name for name in vars(DraftPolicy) if not name.startswith("_")}
    assert inspect.signature(shown.__call__) == inspect.signature(DraftPolicy.__call__)


def test_the_last_block_drafts(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NestedCausalLM, "eos_token_ids", ())
    model = load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))
    zeros = torch.zeros(model.num_units, len(model.bit_widths))
    profile = Profile(roofline_cost(model), zeros, model.bit_widths, model.fingerprint, 0, "8-bit")
    block = BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))[-1]
    printed: list[Any] = []
    names = {"torch": torch, "model": model, "profile": profile, "prompt_ids": torch.tensor([1, 97, 98, 97, 98])}
    exec(block.replace("200", "60"), names | {"print": lambda value, **_: printed.append(value)})
    *pieces, acceptance = printed
    assert len(pieces) == 60
    assert 1 <= len(acceptance) <= 4
    assert all(0 <= share <= 1 for share in acceptance)
