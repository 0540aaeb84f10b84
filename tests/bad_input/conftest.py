"""Good inputs for commands whose other inputs are bad."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runner import write_text
from mistakes import Inputs

from flexquant_rl.engine.checkpoint import load_model, save_checkpoint
from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig


def save_untrained(model: NestedCausalLM, out: Path) -> Path:
    """An untrained policy of a model, as a run exports it."""
    schema = SignalSchema(model.num_units, model.bit_widths)
    sensitivity = torch.rand(model.num_units, len(model.bit_widths), generator=torch.Generator().manual_seed(0))
    profile = Profile(roofline_cost(model), sensitivity, model.bit_widths, model.fingerprint, 9, "unquantised")
    dial = (DialPoint(100.0, 1.2, 0.01, 6.0), DialPoint(10.0, 1.8, 0.1, 4.0))
    card = PolicyCard(schema, model.fingerprint, tuple(unit.name for unit in model.units), dial)
    torch.manual_seed(0)
    save_policy(LearnedPolicy(PrecisionNet(schema), card), profile, out)
    return out


@pytest.fixture(scope="session")
def shared(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    nested = load_model(str(tiny_model_dir), QuantizationConfig())
    folder = tmp_path_factory.mktemp("good")
    save_checkpoint(nested, folder / "nested")
    policy = save_untrained(nested, folder / "policy")
    return Inputs(tiny_model_dir, folder / "nested", write_text(folder / "text.txt"), policy, folder)


@pytest.fixture
def inputs(shared: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.chdir(tmp_path)  # where `runs/` would appear
    return Inputs(shared.model, shared.nested, shared.text, shared.policy, tmp_path)
