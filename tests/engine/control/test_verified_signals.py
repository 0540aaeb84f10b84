"""What policies of drafts see is scaled as the signals of the lossy mode are; costs that are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.controller import TorchController
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.profile import profile_model
from flexquant_rl.engine.control.signals import log_probabilities, output_signals
from flexquant_rl.engine.control.verified_signals import VerifiedSchema, next_entropy_average, scaled_outputs
from flexquant_rl.engine.control.verify_timer import _TimedRounds, measured_costs
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.quantisation.config import QuantizationConfig


def test_scaled_as_the_tracker_scales(tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), QuantizationConfig())
    profile = profile_model(model, torch.randint(97, 123, (2, 6)), roofline_cost(model))
    controller = TorchController(model, None, profile, num_rows=2)
    rng = torch.Generator().manual_seed(int(torch.randint(1 << 30, (1,))))
    names = VerifiedSchema(2, 3).names[:8]
    columns = [controller.schema.index(name) for name in names]
    average, before = np.zeros(2, dtype=np.float32), None
    statistics = torch.ones(2, model.num_units)
    for step in range(5):
        logits = 4 * torch.randn(2, model.vocab_size, generator=rng)
        tokens = torch.randint(3, 120, (2,), generator=rng)
        output = StepOutput(logits, statistics, statistics)
        if step == 0:
            controller.reset(output, tokens, torch.ones(2))
        else:
            controller.update(output, torch.full((2, model.num_units), 4), tokens)
        log_probs = log_probabilities(logits)
        newest = output_signals(log_probs, tokens, before).numpy()
        average = newest[:, 0] if step == 0 else next_entropy_average(average, newest[:, 0])
        found = scaled_outputs(newest, average, np.full(2, step))
        np.testing.assert_allclose(found, controller.signals()[:, columns].numpy(), rtol=1e-4, atol=1e-5)
        before = log_probs


def test_measured_costs_leave_the_cache_as_it_was(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(tiny_model_dir), QuantizationConfig())
    session = DecodeSession(model, max_length=20)
    levels = torch.tensor([3, 5])[:, None].expand(-1, model.num_units)
    costs = measured_costs(session, levels, verify_width=8, depth=3, num_rounds=2, context=10)
    costs.check(2, 3)
    assert costs.source == "measured"
    assert costs.plain_ms == costs.full_ms, "one step at the largest width has one time"
    timed: list[int] = []
    plain_ms = _TimedRounds.plain_ms
    monkeypatch.setattr(_TimedRounds, "plain_ms", lambda rounds, width: timed.append(width) or plain_ms(rounds, width))
    measured_costs(session, levels[:1], verify_width=5, depth=1, num_rounds=2, context=10)
    assert set(timed) == {5, 8}, "a plain step of the verify width, and one of the largest"
    assert min(costs.full_ms, *costs.draft_ms, *costs.verify_ms) > 0
    assert session.lengths.tolist() == [10]
