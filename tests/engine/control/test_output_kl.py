"""Vectors that are sent back through a model have the second derivative of the KL as their covariance."""

from __future__ import annotations

import pytest
import torch

from flexquant_rl.engine.control import output_kl
from flexquant_rl.engine.control.output_kl import logit_probes

VOCAB = 40


@pytest.mark.parametrize("floats", [1, 3 * VOCAB, 1 << 22])
def test_probes_have_the_covariance_of_the_probabilities(floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_kl, "LOGITS_AT_A_TIME", floats)
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(VOCAB, generator=generator) * 2
    rows = 200 if floats == 1 else 20_000
    probes = logit_probes(logits.expand(2, rows // 2, -1), generator)
    assert probes.shape == (2, rows // 2, VOCAB)
    found, p = probes.flatten(0, 1).double(), logits.double().softmax(-1)
    expected = p.diag() - torch.outer(p, p)
    torch.testing.assert_close(found.T @ found / rows, expected, rtol=0, atol=0.08 if rows == 200 else 0.01)
    torch.testing.assert_close(found.sum(1), torch.zeros(rows, dtype=torch.float64), rtol=0, atol=1e-5)


def test_probes_have_the_precision_of_the_logits() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert logit_probes(logits, torch.Generator().manual_seed(0)).dtype == torch.bfloat16
