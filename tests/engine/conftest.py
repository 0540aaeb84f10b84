"""Fixtures of the engine's tests: nested tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantize import QuantizationConfig


@pytest.fixture(scope="session")
def nested_model(tiny_model_dir: Path) -> NestedCausalLM:
    """The tiny Llama, nested, with its unquantised reference; units: two layers and the head. Read it only."""
    return load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))


@pytest.fixture(scope="session")
def half_unit_model(tiny_model_dir: Path) -> NestedCausalLM:
    """The same model with attention and MLP as units of their own: five units. Read it only."""
    return load_model(str(tiny_model_dir), QuantizationConfig(group_size=32, unit="half"))


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(0)
