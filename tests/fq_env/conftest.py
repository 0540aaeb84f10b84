"""Text, a real tiny model and its profile; the fake of `tests/fake_session.py` for what needs no model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from fake_session import FakeModel, fake_profile

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.profile import Profile, profile_model
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig

WORDS = "bits of every weight are read again when a policy looks for less loss and saves some time".split()


def write_text(path: Path, *, num_paragraphs: int = 150, seed: int = 0) -> Path:
    """Writes paragraphs of about 400 random-word characters, separated by blank lines."""
    rng = random.Random(seed)
    paragraphs = [" ".join(rng.choice(WORDS) for _ in range(85)) for _ in range(num_paragraphs)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 KB of text, enough for windows in every split. Shared by the session: read it only."""
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def tiny_nested(tiny_model_dir: Path) -> NestedCausalLM:
    """The tiny Llama, nested, with its unquantised reference: 3 units (2 layers and the head)."""
    return load_model(str(tiny_model_dir), QuantizationConfig())


@pytest.fixture(scope="session")
def tiny_windows() -> torch.Tensor:
    """`[12, 11]` windows of random ASCII letters, no end-of-sequence token among them."""
    return torch.randint(97, 123, (12, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def tiny_profile(tiny_nested: NestedCausalLM, tiny_windows: torch.Tensor) -> Profile:
    """The profile of `tiny_nested`, latency from the roofline."""
    return profile_model(tiny_nested, tiny_windows[:4, :-1], roofline_cost(tiny_nested))


@pytest.fixture(scope="session")
def profile_path(tiny_profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    tiny_profile.save(path)
    return path


@pytest.fixture
def fake_model() -> FakeModel:
    """Four units, widths 3, 4, 5, 6, 8, a vocabulary of 32."""
    return FakeModel()


@pytest.fixture
def fake_model_profile(fake_model: FakeModel) -> Profile:
    """The true profile of `fake_model`."""
    return fake_profile(fake_model)
