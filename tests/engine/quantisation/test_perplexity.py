"""Perplexity against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from flexquant_rl.engine.checkpoint import load_checkpoint, save_checkpoint
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.perplexity import perplexity, perplexity_by_width

WINDOWS = torch.randint(97, 123, (3, 9), generator=torch.Generator().manual_seed(0))


def by_definition(logits: torch.Tensor) -> float:
    """Logits `[n, T, vocab]` of whole windows."""
    total, count = 0.0, 0
    for window, row in zip(WINDOWS.tolist(), logits.double(), strict=True):
        for position in range(len(window) - 1):
            probs = row[position].exp() / row[position].exp().sum()
            total -= math.log(float(probs[window[position + 1]]))
            count += 1
    return math.exp(total / count)


def test_perplexity_by_hand(nested_model: NestedCausalLM, tiny_llama: torch.nn.Module) -> None:
    """The unquantised weights against the original model's own forward pass."""
    with torch.no_grad():
        expected = by_definition(tiny_llama(WINDOWS).logits)
    session = DecodeSession(nested_model)
    assert perplexity(session, WINDOWS, torch.zeros(3, dtype=torch.int64)) == pytest.approx(expected, rel=1e-4)
    assert 10 < expected < 1e6


def test_mixed_widths_by_stepping(nested_model: NestedCausalLM) -> None:
    """Widths per unit: as the single steps at those widths give it."""
    widths = torch.tensor([3, 6, 4])
    session = DecodeSession(nested_model, num_rows=3)
    steps = [session.prefill(WINDOWS[:, :1], bit_widths=widths).logits]
    steps += [session.step(WINDOWS[:, position], widths).logits for position in range(1, 9)]
    expected = by_definition(torch.stack(steps, 1))
    assert perplexity(DecodeSession(nested_model), WINDOWS, widths) == pytest.approx(expected, rel=1e-3)


def test_by_width(nested_model: NestedCausalLM) -> None:
    found = perplexity_by_width(nested_model, WINDOWS)
    assert list(found) == ["3", "4", "5", "6", "8", "reference"]
    session = DecodeSession(nested_model)
    for name, value in found.items():
        width = 0 if name == "reference" else int(name)
        assert value == pytest.approx(perplexity(session, WINDOWS, torch.full((3,), width)))
    distance = {name: abs(math.log(value / found["reference"])) for name, value in found.items()}
    assert distance["8"] < distance["4"]
    assert distance["8"] < 0.05


def test_without_a_reference(nested_model: NestedCausalLM, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("nested") / "model"
    save_checkpoint(nested_model, path)
    assert list(perplexity_by_width(load_checkpoint(path), WINDOWS)) == ["3", "4", "5", "6", "8"]
