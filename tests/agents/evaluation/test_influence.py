"""Influences from gradients are what the errors of a token, or of a unit at it, really add to the KL of the text."""

from __future__ import annotations

import pytest
import torch

from flexquant_rl.agents.evaluation import influence
from flexquant_rl.agents.evaluation.influence import influences
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.engine.control.output_kl import output_kl_nats, reference_width
from flexquant_rl.engine.decoding.session import DecodeSession

BIT_WIDTH = 4


def test_each_is_what_reading_it_alone_at_the_width_adds(tiny_prepared: Prepared) -> None:
    model, first = tiny_prepared.model, tiny_prepared.env.prompt_tokens
    text = tiny_prepared.windows.test[:2, :-1]
    generator = torch.Generator().manual_seed(0)
    low = torch.full((model.num_units,), BIT_WIDTH)
    found = influences(model, text, low, first=first, num_samples=600, generator=generator).units.double()
    num_tokens = text.shape[1] - first
    assert found.shape == (2, num_tokens, model.num_units)
    assert not found.requires_grad
    session = DecodeSession(model)
    base = torch.full((model.num_units,), reference_width(model))
    reference = session.score(text, base, first=first).double()
    expected = torch.zeros_like(found)
    for token in range(num_tokens):
        for unit in range(model.num_units):
            widths = base.expand(*text.shape, -1).clone()
            widths[:, first + token, unit] = BIT_WIDTH
            scored = session.score(text, widths, first=first).double()
            expected[:, token, unit] = output_kl_nats(reference, scored).sum(1)
    # 600 samples have a standard error of 6%; the rest is what the second order leaves out.
    ratio = (found / expected).log().abs()
    assert float(ratio.median()) < 0.1
    assert float(ratio.max()) < 0.4
    assert abs(float(found.sum() / expected.sum()) - 1) < 0.05


def test_a_token_counts_with_all_its_units(tiny_prepared: Prepared) -> None:
    """At an allocation whose units differ: their errors at one token act together, which no sum over units tells."""
    model, first = tiny_prepared.model, tiny_prepared.env.prompt_tokens
    text = tiny_prepared.windows.test[:2, :-1]
    low = torch.tensor([3, 5, 4])
    generator = torch.Generator().manual_seed(0)
    found = influences(model, text, low, first=first, num_samples=600, generator=generator).tokens.double()
    session = DecodeSession(model)
    base = torch.full((model.num_units,), reference_width(model))
    reference = session.score(text, base, first=first).double()
    expected = torch.zeros_like(found)
    for token in range(found.shape[1]):
        widths = base.expand(*text.shape, -1).clone()
        widths[:, first + token] = low
        expected[:, token] = output_kl_nats(reference, session.score(text, widths, first=first).double()).sum(1)
    ratio = (found / expected).log().abs()
    assert float(ratio.median()) < 0.15
    assert abs(float(found.sum() / expected.sum()) - 1) < 0.1


def test_pieces_of_a_text_are_measured_as_one(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    model, first = tiny_prepared.model, tiny_prepared.env.prompt_tokens
    text = tiny_prepared.windows.test[:3, :-1]
    low = torch.full((model.num_units,), BIT_WIDTH)
    whole, pieces = [], []
    for found, floats in ((whole, 1 << 30), (pieces, 1)):
        monkeypatch.setattr(influence, "LOGITS_AT_A_TIME", floats)
        generator = torch.Generator().manual_seed(0)
        found.append(influences(model, text, low, first=first, num_samples=400, generator=generator))
    # Other directions for other pieces: equal within the noise of 400, a standard error of 10% for the ratio of two.
    for name in ("units", "tokens"):
        ratio = (getattr(whole[0], name) / getattr(pieces[0], name)).log()
        assert float(ratio.abs().max()) < 0.5
        assert float(ratio.mean().abs()) < 0.05


def test_model_is_left_as_it_was(tiny_prepared: Prepared) -> None:
    model, first = tiny_prepared.model, tiny_prepared.env.prompt_tokens
    text = tiny_prepared.windows.test[:1, :-1]
    widths = torch.full((model.num_units,), BIT_WIDTH)
    before = DecodeSession(model).score(text, widths, first=first)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    same, again, other = (
        influences(model, text, widths, first=first, num_samples=4, generator=generator).units
        for generator in generators
    )
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert torch.equal(DecodeSession(model).score(text, widths, first=first), before)
