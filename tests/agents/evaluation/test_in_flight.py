"""Choices in flight: what is read in one pass is what those widths give, and no choice sees what comes later."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.evaluate import Evaluator
from flexquant_rl.agents.evaluation.in_flight import Choose, read_in_flight, trace_in_flight
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.decoding.session import DecodeSession


def by_norm(prepared: Prepared, seen: dict[int, Tensor] | None = None) -> Choose:
    """Inputs of more than the median norm are read at 6 bits, the others at 3."""

    def choose(unit_idx: int, inputs: Tensor) -> Tensor:
        assert seen is None or unit_idx not in seen, "a unit is asked for once"
        if seen is not None:
            seen[unit_idx] = inputs.clone()
        # Of the first entries: norms behind a norm layer are all alike.
        return torch.where(inputs[..., :4].norm(dim=-1) > 1.5, 6, 3)

    return choose


def test_logits_are_those_of_the_chosen_widths(tiny_prepared: Prepared) -> None:
    model, first = tiny_prepared.model, tiny_prepared.env.prompt_tokens
    text = tiny_prepared.windows.test[:3, :-1]
    seen: dict[int, Tensor] = {}
    logits, widths = read_in_flight(model, text, by_norm(tiny_prepared, seen), first=first)
    assert widths.shape == (3, text.shape[1] - first, model.num_units)
    assert set(widths.unique().tolist()) == {3, 6}
    assert [seen[unit].shape[:2] for unit in range(model.num_units)] == [widths.shape[:2]] * model.num_units
    prompt = torch.full((3, first, model.num_units), max(model.bit_widths))
    scored = DecodeSession(model).score(text, torch.cat([prompt, widths], dim=1), first=first)
    torch.testing.assert_close(logits, scored, atol=1e-5, rtol=1e-4)


def test_no_choice_sees_what_comes_later(tiny_prepared: Prepared) -> None:
    model, first = tiny_prepared.model, tiny_prepared.env.prompt_tokens
    text = tiny_prepared.windows.test[:2, :-1]
    other = text.clone()
    other[:, -3:] = other[:, -3:].flip(0) + 1
    (_, before), (_, after) = (
        read_in_flight(model, tokens, by_norm(tiny_prepared), first=first) for tokens in (text, other)
    )
    assert torch.equal(before[:, :-3], after[:, :-3])


def test_later_units_see_what_earlier_widths_did(tiny_prepared: Prepared) -> None:
    model, first = tiny_prepared.model, tiny_prepared.env.prompt_tokens
    text = tiny_prepared.windows.test[:1, :-1]

    def inputs_of(width: int) -> list[Tensor]:
        seen: dict[int, Tensor] = {}

        def choose(unit_idx: int, inputs: Tensor) -> Tensor:
            seen[unit_idx] = inputs.clone()
            return torch.full(inputs.shape[:2], width if unit_idx == 0 else 8)

        read_in_flight(model, text, choose, first=first)
        return [seen[unit] for unit in range(model.num_units)]

    low, high = inputs_of(3), inputs_of(8)
    assert torch.equal(low[0], high[0])
    assert not torch.allclose(low[1], high[1], rtol=1e-3)


@pytest.mark.parametrize("piece_floats", [1, 1 << 24], ids=["row by row", "at once"])
def test_trace_is_what_decoding_step_by_step_gives(
    tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch, piece_floats: int
) -> None:
    monkeypatch.setattr("flexquant_rl.agents.evaluation.in_flight.LOGITS_AT_A_TIME", piece_floats)
    windows = tiny_prepared.windows.test[:3]
    parts: list[slice] = []

    def choose_for(rows: slice) -> Choose:
        parts.append(rows)
        return by_norm(tiny_prepared)

    trace = trace_in_flight(tiny_prepared, windows, choose_for)
    assert len(parts) == (3 if piece_floats == 1 else 1)

    class Recorded:
        name = "recorded"

        def __init__(self) -> None:
            self._steps = iter(trace.bit_widths.unbind(1))

        def __call__(self, signals: Tensor) -> Decision:
            return Decision(next(self._steps))

    real = Evaluator(tiny_prepared.model, tiny_prepared.profile, windows, tiny_prepared.env).run(Recorded())
    torch.testing.assert_close(real.output_kl_nats, trace.output_kl_nats, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(real.token_nll_nats, trace.token_nll_nats, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(real.latency_ms.double(), trace.latency_ms.double())
