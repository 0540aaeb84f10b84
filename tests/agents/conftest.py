"""The random tiny Llama, nested, with text and a profile: what evaluation and comparison run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexquant_rl.agents.policies.static_front import static_front
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.profile import Profile, profile_model
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.prompts import PromptWindows

TINY_CONFIG = EnvConfig(prompt_tokens=5, max_new_tokens=12)


@pytest.fixture(scope="session")
def tiny_nested(tiny_model_dir: Path) -> NestedCausalLM:
    """Three units: two layers and the head. Read it only."""
    return load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))


@pytest.fixture(scope="session")
def tiny_windows() -> torch.Tensor:
    """`[8, window_tokens]` random ASCII letters."""
    return torch.randint(97, 123, (8, TINY_CONFIG.window_tokens), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def tiny_profile(tiny_nested: NestedCausalLM, tiny_windows: torch.Tensor) -> Profile:
    """The profile of `tiny_nested`, latency from the roofline."""
    return profile_model(tiny_nested, tiny_windows[:4, :-1], roofline_cost(tiny_nested))


@pytest.fixture(scope="session")
def tiny_prepared(tiny_nested: NestedCausalLM, tiny_profile: Profile, tiny_windows: torch.Tensor) -> Prepared:
    """What a run has before it trains; the same windows in every split."""
    front = static_front(tiny_profile, tiny_nested.unit_weights).measured_on(
        DecodeSession(tiny_nested), tiny_windows[:, :-1], TINY_CONFIG.prompt_tokens
    )
    # Two windows of each document.
    windows = PromptWindows(lambda split: (tiny_windows, torch.arange(8) // 2), "random letters")
    return Prepared(tiny_nested, windows, tiny_profile, tiny_profile.cost, front, TINY_CONFIG)
