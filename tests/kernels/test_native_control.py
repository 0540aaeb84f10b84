"""What native control refuses; that it computes the right thing is in tests/engine/control/test_controller.py."""

from __future__ import annotations

import pytest
import torch

from flexquant_rl.kernels.native import supported_isas
from flexquant_rl.kernels.native_control import ControlWeights, NativeControl, PolicyNetWeights

NUM_UNITS, VOCAB, WIDTHS, HIDDEN = 3, 29, (3, 4, 8), 32
NUM_GLOBAL, NUM_PER_UNIT = 12 + 4, 2 * len(WIDTHS) + 4

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels"),
]


def make_net(hidden: int = HIDDEN) -> PolicyNetWeights:
    return PolicyNetWeights(
        mean=torch.zeros(NUM_GLOBAL + NUM_PER_UNIT),
        deviation=torch.ones(NUM_GLOBAL + NUM_PER_UNIT),
        encode_global=(torch.randn(hidden, NUM_GLOBAL), torch.randn(hidden)),
        first=(torch.randn(hidden, NUM_PER_UNIT + hidden), torch.randn(hidden)),
        second=(torch.randn(hidden, hidden), torch.randn(hidden)),
        width_head=(torch.randn(len(WIDTHS), hidden), torch.randn(len(WIDTHS))),
    )


def make_weights(net: PolicyNetWeights | None = None, num_dims: int = 4) -> ControlWeights:
    return ControlWeights(
        net=net,
        bit_widths=WIDTHS,
        embedding=torch.randn(VOCAB, num_dims),
        unit_constants=torch.randn(NUM_UNITS, 2 * len(WIDTHS)),
        depth=torch.tensor([0.0, 0.5, 1.0]),
        weight_share=torch.tensor([0.25, 0.25, 0.5]),
    )


def started(net: PolicyNetWeights | None = None) -> NativeControl:
    control = NativeControl(make_weights(net))
    control.reset(torch.randn(VOCAB), torch.rand(NUM_UNITS), torch.rand(NUM_UNITS), 5, 3.0)
    return control


def test_chooses_stored_widths() -> None:
    control = started(make_net())
    assert control.signals().shape == (control.dim,) == (NUM_GLOBAL + NUM_UNITS * NUM_PER_UNIT,)
    assert set(control.choose(control.signals()).tolist()) <= set(WIDTHS)


def test_without_a_network_there_are_signals_but_no_choice() -> None:
    control = started()
    assert bool(control.signals().isfinite().all())
    with pytest.raises(ValueError, match="no network"):
        control.choose(control.signals())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(VOCAB - 1)}, "logits is"),
        ({"logits": torch.zeros(VOCAB, dtype=torch.float64)}, "logits is"),
        ({"residual_update": torch.zeros(1)}, "residual_update is"),
        ({"crest": torch.zeros(2 * NUM_UNITS)[::2]}, "crest is"),
        ({"bit_widths": torch.full((NUM_UNITS,), 4, dtype=torch.int32)}, "bit_widths is"),
        ({"bit_widths": torch.full((NUM_UNITS + 1,), 4)}, "bit_widths is"),
        ({"next_token_id": VOCAB}, f"token {VOCAB} is not in the vocabulary"),
        ({"next_token_id": -1}, "token -1 is not in the vocabulary"),
    ],
)
def test_bad_updates(change: dict[str, object], message: str) -> None:
    control = started()
    before = control.signals()
    arguments = {
        "logits": torch.zeros(VOCAB),
        "residual_update": torch.zeros(NUM_UNITS),
        "crest": torch.zeros(NUM_UNITS),
        "bit_widths": torch.full((NUM_UNITS,), 4),
        "next_token_id": 1,
    }
    with pytest.raises(ValueError, match=message):
        control.update(**(arguments | change))  # type: ignore[arg-type]  # wrong on purpose
    assert torch.equal(control.signals(), before)


def test_bad_signals() -> None:
    with pytest.raises(ValueError, match="signals is"):
        started(make_net()).choose(torch.zeros(3))


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        NativeControl(make_weights(make_net(hidden=24)))
    with pytest.raises(ValueError, match="a tensor is"):
        NativeControl(make_weights(make_net(), num_dims=5))
