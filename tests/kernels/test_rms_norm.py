"""The fused norm: the norm of plain torch, packed exactly as the packing kernel does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flexquant_rl.kernels import reference_ops
from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.rms_norm import MAX_INPUTS, rms_norm

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")


def check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    num_inputs = x.shape[1]
    expected = reference_ops.rms_norm(x, weight, eps=eps)
    exact = reference_ops.unpack_activations(rms_norm(x, weight, eps=eps, mode="float"))[:, :num_inputs]
    torch.testing.assert_close(exact, expected, rtol=2e-6, atol=1e-6)
    packed = rms_norm(x, weight, eps=eps)
    assert packed.scale is not None
    rounded = reference_ops.unpack_activations(packed)[:, :num_inputs]
    step = packed.scale.repeat_interleave(32, 1)[:, :num_inputs]
    assert ((rounded - expected).abs() <= 0.5001 * step).all()
    torch.testing.assert_close(packed.sums, reference_ops.pack_activations(expected).sums, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "num_inputs"), [(1, 32), (3, 172), (2, 1056)])
def test_matches_the_reference(
    random_activations: Callable, num_tokens: int, num_inputs: int, dtype: torch.dtype
) -> None:
    x = random_activations(num_tokens, num_inputs, dtype=dtype)
    weight = random_activations(1, num_inputs, dtype=dtype)[0].abs() + 0.5
    check(x, weight, 1e-5)


def test_a_token_of_zeros_is_zero(device: torch.device) -> None:
    packed = rms_norm(torch.zeros(1, 64, device=device), torch.ones(64, device=device), eps=1e-6)
    assert not packed.values.any()
    assert not packed.sums.any()


def test_into_given_buffers(random_activations: Callable, device: torch.device) -> None:
    out = PackedActivations.allocate(2, 64, device=device)
    assert rms_norm(random_activations(2, 64), torch.ones(64, device=device), eps=1e-6, out=out) is out
    assert torch.isfinite(out.sums).all()


def test_bad_arguments(device: torch.device) -> None:
    x = torch.zeros(1, 64, device=device)
    with pytest.raises(ValueError, match="weight is torch.float32 \\[32\\]; pass .* \\[64\\]"):
        rms_norm(x, x[0, :32], eps=1e-6)
    with pytest.raises(ValueError, match="a program holds 32768"):
        rms_norm(torch.zeros(1, MAX_INPUTS + 1, device=device), x[0], eps=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("num_inputs", [4096, 8192])
def test_real_shapes_on_a_gpu(random_activations: Callable, device: torch.device, num_inputs: int) -> None:
    check(random_activations(4, num_inputs, dtype=torch.float16), torch.rand(num_inputs, device=device), 1e-5)
