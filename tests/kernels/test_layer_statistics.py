"""Statistics of the residual stream."""

from __future__ import annotations

import pytest
import torch

from flexquant_rl.kernels import reference_step
from flexquant_rl.kernels.layer_statistics import layer_statistics

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")


def check(device: torch.device, num_layers: int, num_tokens: int, num_inputs: int) -> None:
    hidden = torch.randn(num_layers + 1, num_tokens, num_inputs, generator=torch.Generator().manual_seed(1))
    hidden[:, :, 3] *= 30.0
    result = layer_statistics(hidden.to(device)).cpu()
    torch.testing.assert_close(result, reference_step.layer_statistics(hidden).float(), rtol=2e-6, atol=0)
    assert result[:, :, -1].tolist() == [[0.0, 0.0]] * num_tokens
    for token in range(num_tokens):
        alone = layer_statistics(hidden[:, token : token + 1].contiguous().to(device)).cpu()
        assert torch.equal(alone[0], result[token])


@pytest.mark.parametrize(("num_layers", "num_tokens", "num_inputs"), [(1, 1, 4), (3, 3, 96), (2, 1, 1000)])
def test_matches_the_definition(device: torch.device, num_layers: int, num_tokens: int, num_inputs: int) -> None:
    check(device, num_layers, num_tokens, num_inputs)


def test_a_stream_of_zeros(device: torch.device) -> None:
    hidden = torch.zeros(2, 1, 8, device=device)
    hidden[1, 0, 0] = 1.0
    assert layer_statistics(hidden)[0, :, 0].tolist() == pytest.approx([1e12, 0.0])


def test_bad_arguments(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"hidden is \[1, 2, 8\]; pass \[L \+ 1, M, K\]"):
        layer_statistics(torch.zeros(1, 2, 8, device=device))
    with pytest.raises(ValueError, match=r"out is torch.float32 \[2, 2\]"):
        layer_statistics(torch.zeros(2, 1, 8, device=device), out=torch.zeros(2, 2, device=device))


@pytest.mark.gpu
def test_real_size_on_a_gpu(device: torch.device) -> None:
    check(device, 80, 1, 8192)
    check(device, 32, 16, 4096)
