"""Signals on the device against the tracker that training uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema, SignalTracker, project_embedding, unit_constants
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.kernels.token_signals import SignalConstants, SignalState, update_signals

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")

BIT_WIDTHS = (3, 4, 5, 6, 8)
DEPTHS = [0.0, 0.0, 0.5, 0.5, 1.0]  # two layers cut in halves, and the head
LAYERS = [0, 0, 1, 1, 2]


class Twins:
    """The tracker and its twin on the device."""

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.generator, self.device, self.vocab_size = generator, device, vocab_size
        num_units = len(DEPTHS)
        unit_ms = torch.rand(num_units, len(BIT_WIDTHS), generator=generator, dtype=torch.float64)
        cost = CostTable("roofline", 0.5, unit_ms, BIT_WIDTHS, "", "cpu", 1)
        sensitivity = torch.rand(num_units, len(BIT_WIDTHS), generator=generator) * 1e-3
        profile = Profile(cost, sensitivity, BIT_WIDTHS, "", 10, "unquantised")
        self.schema = SignalSchema(num_units, BIT_WIDTHS, horizon=9)
        embedding = torch.randn(vocab_size, 24, generator=generator)
        self.tracker = SignalTracker(self.schema, profile, embedding, DEPTHS, num_rows=1)
        self.share = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.2])
        self.constants = SignalConstants(
            project_embedding(embedding, self.schema.num_embedding_dims).to(device),
            unit_constants(profile, self.schema).to(device),
            torch.tensor(DEPTHS, device=device),
            self.share.to(device),
            torch.tensor(LAYERS, dtype=torch.int32, device=device),
            self.schema.horizon,
        )
        self.state = SignalState.allocate(self.constants)
        self.state.recent_widths.fill_(8.0)
        self.state.dial.fill_(torch.tensor(7.0).log10())
        self.count = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self, logits: Tensor, *, is_first: bool = False, tolerance: float = 2e-5) -> None:
        """Tells both the same; the statistics, the widths and the token are random."""
        generator, num_units = self.generator, len(DEPTHS)
        token = torch.randint(self.vocab_size, (1,), generator=generator)
        layers = torch.nn.functional.pad(torch.rand(2, 2, generator=generator) * 3, (0, 1))
        widths = torch.tensor(BIT_WIDTHS)[torch.randint(len(BIT_WIDTHS), (num_units,), generator=generator)]
        widths = torch.full_like(widths, 8) if is_first else widths
        update, crest = layers[:, LAYERS].split(1)
        output = StepOutput(logits[None], update, crest)
        if is_first:
            self.tracker.reset(output, token, torch.tensor([7.0]), torch.tensor([0]))
        else:
            self.tracker.update(output, widths[None], token, (widths * self.share).sum()[None])
            self.count += 1
        signals = update_signals(
            self.constants,
            self.state,
            logits.to(self.device),
            layers.to(self.device),
            widths.to(self.device, torch.int32),
            token.to(self.device),
            self.count,
            is_first=is_first,
        )
        assert self.constants.dim == self.schema.dim
        torch.testing.assert_close(signals.cpu(), self.tracker.signals(), atol=tolerance, rtol=2e-5)


@pytest.mark.parametrize("vocab_size", [128, 2500])
def test_follows_the_tracker(device: torch.device, vocab_size: int) -> None:
    twins = Twins(device, vocab_size)
    twins.step(torch.randn(vocab_size, generator=twins.generator), is_first=True)
    for index in range(20):  # further than the 16 widths that are remembered
        spread = [1.0, 0.0, 60.0, 3.0, 1e-3][index % 5]  # from uniform to so sharp that most probabilities are zero
        twins.step(spread * torch.randn(vocab_size, generator=twins.generator))
    twins.step(torch.randn(vocab_size, generator=twins.generator))
    twins.count.zero_()
    twins.state.recent_widths.fill_(8.0)
    twins.step(torch.randn(vocab_size, generator=twins.generator), is_first=True)


def test_hardly_a_change(device: torch.device) -> None:
    """A divergence of 5e-5 nats is a sum of differences that all but cancel, in float32 by either way."""
    twins = Twins(device, 2500)
    logits = 4 * torch.randn(2500, generator=twins.generator)
    twins.step(logits, is_first=True)
    twins.step(logits + 0.01 * torch.randn(2500, generator=twins.generator), tolerance=5e-3)
    twins.step(logits, tolerance=5e-3)
    twins.step(logits)  # below the floor


def test_impossible_tokens(device: torch.device) -> None:
    twins = Twins(device, 2500)
    logits = torch.full((2500,), float("-inf"))
    logits[2100], logits[5] = 1.0, 0.5
    twins.step(logits, is_first=True)
    twins.step(logits.roll(1))


def test_bad_arguments(device: torch.device) -> None:
    twins = Twins(device, 128)
    widths = torch.zeros(5, dtype=torch.int32, device=device)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    statistics, logits = torch.zeros(2, 3, device=device), torch.zeros(128, device=device)
    with pytest.raises(ValueError, match=r"logits is torch.float32 \[7\]"):
        update_signals(twins.constants, twins.state, logits[:7], statistics, widths, token, twins.count)
    with pytest.raises(ValueError, match="bit_widths is torch.int64"):
        update_signals(twins.constants, twins.state, logits, statistics, widths.long(), token, twins.count)


@pytest.mark.gpu
def test_real_size_on_a_gpu(device: torch.device) -> None:
    twins = Twins(device, 151_936)
    twins.step(torch.randn(151_936, generator=twins.generator), is_first=True)
    twins.step(5 * torch.randn(151_936, generator=twins.generator))
