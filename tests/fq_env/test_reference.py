"""The reference of a text in pieces and from kept states, against one pass that holds all distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_windows
from torch import Tensor

from flexquant_rl.engine.control.output_kl import kl_nats, reference_width
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env import reference as module
from flexquant_rl.fq_env.reference import TextReference

FIRST = 4
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def whole(session: Any, tokens: Tensor) -> Tensor:
    widths = torch.full((session.model.num_units,), reference_width(session.model))
    return session.score(tokens[:, :-1], widths, first=FIRST).log_softmax(-1)


def check(reference: TextReference, session: Any, windows: Tensor) -> None:
    """Starts all rows, then some of them with other text, and asks for everything."""
    rows = torch.arange(5)
    text = windows[:5].clone()
    expected = whole(session, text)
    reference.start(text, rows, rows)
    for again in (torch.tensor([3, 1]), torch.randperm(5)):
        position = torch.randint(expected.shape[1], (5,))
        torch.testing.assert_close(reference.log_probs(position), expected[rows, position], **TOLERANCE)
        chosen = torch.randint(len(windows), (len(again),))
        text[again] = windows[chosen]
        reference.start(text[again], again, chosen)
        expected = whole(session, text)
    position = torch.randint(expected.shape[1], (5,))
    torch.testing.assert_close(reference.log_probs(position), expected[rows, position], **TOLERANCE)
    some = torch.tensor([4, 0, 2])
    widths = torch.tensor([3, 5, 8])[torch.randint(3, (3, session.model.num_units))]
    per_token = torch.full((3, text.shape[1] - 1, session.model.num_units), 8)
    per_token[:, FIRST:] = widths[:, None]
    other = session.score(text[some, :-1], per_token, first=FIRST).log_softmax(-1)
    found = reference.kl_nats(text[some], some, widths)
    torch.testing.assert_close(found, kl_nats(expected[some], other), **TOLERANCE)
    assert float(found.max()) > 1e-3


@pytest.mark.parametrize("piece_floats", [1, 1 << 12, 1 << 25])
@pytest.mark.parametrize("kept", ["distributions", "states"])
def test_equals_one_pass(
    kept: str, piece_floats: int, tiny_nested: NestedCausalLM, tiny_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", piece_floats)
    monkeypatch.setattr(module, "_CALL_TOKENS", int(torch.randint(1, 60, ())))
    needed = 5 * (tiny_windows.shape[1] - 1 - FIRST) * tiny_nested.vocab_size * 4
    monkeypatch.setattr(module, "_DISTRIBUTION_BYTES", needed - (kept == "states"))
    session = DecodeSession(tiny_nested)
    reference = TextReference(session, 5, FIRST)
    check(reference, session, tiny_windows)
    assert type(reference._kept).__name__ == {"distributions": "_KeptDistributions", "states": "_KeptStates"}[kept]


@pytest.mark.parametrize("piece_floats", [1, 1 << 25])
def test_any_decoder(piece_floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", piece_floats)
    monkeypatch.setattr(module, "_DISTRIBUTION_BYTES", 0)  # nothing to keep states of
    session = FakeSession(FakeModel(carry=0.5))
    check(TextReference(session, 5, FIRST), session, fake_windows(9, 12))


def test_logits_are_never_larger_than_a_piece(
    tiny_nested: NestedCausalLM, tiny_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_floats = (tiny_windows.shape[1] - 1 - FIRST) * tiny_nested.vocab_size
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", 2 * row_floats)
    monkeypatch.setattr(module, "_DISTRIBUTION_BYTES", 0)
    sizes: list[int] = []
    hook = tiny_nested.hf_model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(out.numel()))
    try:
        check(TextReference(DecodeSession(tiny_nested), 5, FIRST), FakeScore(tiny_nested, sizes), tiny_windows)
    finally:
        hook.remove()
    assert 0 < max(sizes) <= 2 * row_floats


class FakeScore:
    """Scores for the check itself, whose sizes do not count."""

    def __init__(self, model: NestedCausalLM, sizes: list[int]) -> None:
        self.model = model
        self._session = DecodeSession(model)
        self._sizes = sizes

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        before = len(self._sizes)
        out = self._session.score(*args, **kwargs)
        del self._sizes[before:]
        return out
