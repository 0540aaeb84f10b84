"""KL by its origin against one token at a time, and what the reference says of a text against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexquant_rl.engine.control import past_kl
from flexquant_rl.engine.control.output_kl import output_kl_nats
from flexquant_rl.engine.control.past_kl import past_kl_nats
from flexquant_rl.engine.control.reference_facts import reference_facts
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig

FIRST = 2
PLACES = torch.tensor([1, 3, 4, 8])


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 128, (2, 9))


def one_by_one(model: NestedCausalLM, window: Tensor, past_width: int, own_width: int) -> Tensor:
    """Logits after each token, read alone behind a past that was read token by token."""
    rows = []
    for place in PLACES.tolist():
        session = DecodeSession(model)
        for index, token in enumerate(window[: place + 1]):
            width = own_width if index == place else past_width
            logits = session.step(token[None], torch.full((model.num_units,), width)).logits
        rows.append(logits)
    return torch.cat(rows).double()


@pytest.mark.parametrize("budget", [1, 1 << 28])
def test_equals_token_by_token(
    nested_model: NestedCausalLM, windows: Tensor, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(past_kl, "_CACHE_BYTES", budget)
    found = past_kl_nats(nested_model, windows, (3, 5, 8), places=PLACES)
    assert found.own_step.shape == found.past.shape == (3, 2, 4)
    for row, window in enumerate(windows):
        plain = one_by_one(nested_model, window, 0, 0)
        for index, width in ((0, 3), (2, 8)):
            for values, (past_width, own_width) in ((found.own_step, (0, width)), (found.past, (width, 0))):
                expected = output_kl_nats(plain, one_by_one(nested_model, window, past_width, own_width))
                torch.testing.assert_close(values[index, row].double(), expected, rtol=5e-3, atol=2e-6)
    assert (found.own_step[0] > found.own_step[2]).all()


def test_the_reference_loses_nothing(nested_model: NestedCausalLM, windows: Tensor) -> None:
    found = past_kl_nats(nested_model, windows, (0,), places=PLACES)
    assert max(float(found.own_step.max()), float(found.past.max())) < 1e-6


def test_branches_stand_for_themselves(nested_model: NestedCausalLM, windows: Tensor) -> None:
    session = DecodeSession(nested_model, max_length=9)
    widths = torch.full((3,), 8)
    session.prefill(windows[:1], bit_widths=widths)
    branches = session.branches(torch.tensor([4, 8, 4]))
    assert branches.lengths.tolist() == [4, 8, 4]
    assert branches.num_bytes == 3 * session.num_bytes > 0
    logits = branches.step(windows[0, [4, 8, 5]], widths).logits
    assert session.lengths.tolist() == [9]
    session.truncate(torch.tensor([8]))
    torch.testing.assert_close(logits[1:2], session.step(windows[0, [8]], widths).logits)
    session.truncate(torch.tensor([4]))
    torch.testing.assert_close(logits[2:], session.step(windows[0, [5]], widths).logits)


@pytest.mark.parametrize("has_reference", [True, False])
def test_reference_facts(nested_model: NestedCausalLM, windows: Tensor, has_reference: bool) -> None:
    model = nested_model if has_reference else _without_reference(nested_model)
    facts = reference_facts(model, windows, first=FIRST)
    widths = torch.full((3,), 0 if has_reference else 8)
    log_probs = DecodeSession(model).score(windows[:, :-1], widths, first=FIRST).double().log_softmax(-1)
    probs = log_probs.exp()
    torch.testing.assert_close(facts.token_entropy_nats.double(), -(probs * log_probs).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(facts.top1_probability.double(), probs.amax(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(facts.top1_ids, probs.argmax(-1))
    nll = -log_probs.gather(-1, windows[:, FIRST + 1 :, None])[..., 0]
    torch.testing.assert_close(facts.token_nll_nats.double(), nll, rtol=1e-4, atol=1e-5)


def _without_reference(model: NestedCausalLM) -> NestedCausalLM:
    from conftest import build_tiny_llama, build_tiny_tokenizer

    from flexquant_rl.engine.nesting import nest

    assert model.config == QuantizationConfig(group_size=32)
    return nest(build_tiny_llama(), build_tiny_tokenizer(), model.config, keep_reference=False)
