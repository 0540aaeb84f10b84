"""With float64 as torch's default, environments show and pay what they do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import write_text

from flexquant_rl.fq_env.making import make_environment
from flexquant_rl.fq_env.shared import forget_shared


def played(model: Path, text: Path, **options: Any) -> list[Any]:
    """Observations and rewards of a few steps, everything made anew."""
    forget_shared()
    environment = make_environment(model=str(model), texts=(str(text),), prompt_tokens=8, max_new_tokens=6, **options)
    seen: list[Any] = [environment.reset(seed=3)[0]]
    for _ in range(4):
        observation, reward, *_ = environment.step(np.zeros_like(environment.action_space.sample()))
        seen += [observation, reward]
    return seen


@pytest.mark.parametrize("source", ["replay", "free"])
def test_same_episode(source: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    expected = played(tiny_model_dir, text, source=source)
    torch.set_default_dtype(torch.float64)
    try:
        actual = played(tiny_model_dir, text, source=source)
    finally:
        torch.set_default_dtype(torch.float32)
        forget_shared()
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
        assert np.asarray(mine).dtype == np.asarray(theirs).dtype
