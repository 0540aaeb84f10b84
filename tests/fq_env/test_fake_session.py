"""The fake keeps its promises: known KL, `score` like `step`, the checks of a real session."""

from __future__ import annotations

import pytest
import torch
from fake_session import (
    EOS_TOKEN_ID,
    SINK_TOKEN_ID,
    FakeModel,
    FakeSession,
    fake_profile,
    fake_windows,
    optimal_bit_widths,
    token_class,
)

from flexquant_rl.engine.control.output_kl import output_kl_nats
from flexquant_rl.engine.decoding.decoder import Decoder
from flexquant_rl.engine.errors import InputError


def random_widths(model: FakeModel, *shape: int, seed: int = 0) -> torch.Tensor:
    picks = torch.randint(
        len(model.bit_widths), (*shape, model.num_units), generator=torch.Generator().manual_seed(seed)
    )
    return torch.tensor(model.bit_widths)[picks]


def test_output_kl_is_the_sum_over_units() -> None:
    session: Decoder = FakeSession(num_rows=1)
    tokens = torch.tensor([[5, 6]])
    reference = session.score(tokens)
    for widths, expected in (  # token 5 is of class 1, which needs unit 1: 0.3 nats at width 3, the other units 0.02
        ([3, 3, 3, 3], 0.3 + 3 * 0.02),
        ([8, 3, 8, 8], 0.3 + 3 * 0.02 / 4**5),
        ([3, 4, 4, 4], 0.02 + (0.3 + 2 * 0.02) / 4),
        ([0, 0, 0, 0], 0.0),
    ):
        kl = output_kl_nats(reference, session.score(tokens, torch.tensor(widths)))[0, 0]
        assert float(kl) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("carry", [0.0, 0.5])
def test_score_equals_step_by_step(carry: float) -> None:
    model = FakeModel(carry=carry)
    windows = fake_windows(3, 9)
    widths = random_widths(model, 3, 9)
    widths[:, :4] = 8
    session = FakeSession(model, num_rows=3, max_length=9)
    logits = [session.prefill(windows[:, :4]).logits]
    logits += [session.step(windows[:, t], widths[:, t]).logits for t in range(4, 9)]
    torch.testing.assert_close(torch.stack(logits, 1), session.score(windows, widths, first=3))
    assert session.lengths.tolist() == [9, 9, 9]


def test_fork_is_independent() -> None:
    model = FakeModel(carry=0.5)
    session = FakeSession(model, num_rows=2)
    session.prefill(fake_windows(2, 4))
    twin = session.fork()
    tokens = torch.tensor([7, 9])
    low, high = torch.full((4,), 3), torch.full((4,), 8)
    twin.step(tokens, low)
    twin.close()
    assert session.lengths.tolist() == [4, 4]
    again = session.fork()
    assert torch.equal(session.step(tokens, high).logits, again.step(tokens, high).logits)


def test_optimum_spends_bits_where_the_token_needs_them() -> None:
    model = FakeModel()
    tokens = torch.tensor([4, 5, 6, 7])
    best = optimal_bit_widths(model, tokens, 10.0)
    assert torch.equal(best.argmax(-1), token_class(tokens))
    cost, static = fake_profile(model).cost, torch.full((4, 4), 5)
    rewards = [-cost.time_share(widths) - 10.0 * model.own_kl_nats(tokens, widths) for widths in (best, static)]
    assert (rewards[0] > rewards[1]).all()


def test_text_holds_neither_eos_nor_sink() -> None:
    windows = fake_windows(50, 20)
    assert not torch.isin(windows, torch.tensor([EOS_TOKEN_ID, SINK_TOKEN_ID])).any()
    assert torch.equal(windows, fake_windows(50, 20))


def test_arguments_are_checked() -> None:
    session = FakeSession(num_rows=1, max_length=2)
    with pytest.raises(InputError, match="bit-width 7 is not stored"):
        session.score(torch.tensor([[5]]), torch.full((4,), 7))
    session.prefill(torch.tensor([[5, 6]]))
    with pytest.raises(InputError, match="do not fit"):
        session.step(torch.tensor([5]), torch.full((4,), 8))
    with pytest.raises(InputError, match="width 0"):
        FakeSession(FakeModel(has_reference=False)).score(torch.tensor([[5]]))
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.prefill(torch.tensor([[5]]))
