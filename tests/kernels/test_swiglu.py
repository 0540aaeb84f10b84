"""The fused gate: ``silu(gate) * up`` of plain torch, rounded as the packing kernel does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flexquant_rl.kernels import reference_ops
from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.swiglu import swiglu

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")


def check(gate_up: torch.Tensor) -> None:
    num_inputs = gate_up.shape[1] // 2
    expected = reference_ops.swiglu(gate_up)
    exact = reference_ops.unpack_activations(swiglu(gate_up, mode="float"))[:, :num_inputs]
    torch.testing.assert_close(exact, expected, rtol=2e-6, atol=1e-6)
    packed = swiglu(gate_up)
    assert packed.scale is not None
    step = packed.scale.repeat_interleave(32, 1)[:, :num_inputs]
    rounded = reference_ops.unpack_activations(packed)[:, :num_inputs]
    assert ((rounded - expected).abs() <= 0.5001 * step + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "num_inputs"), [(1, 32), (3, 172), (2, 1056)])
def test_matches_the_reference(
    random_activations: Callable, num_tokens: int, num_inputs: int, dtype: torch.dtype
) -> None:
    check(random_activations(num_tokens, 2 * num_inputs, dtype=dtype))


def test_gates_far_from_zero(device: torch.device) -> None:
    gate_up = torch.ones(1, 64, device=device)
    gate_up[0, :4] = torch.tensor([200.0, -200.0, 0.0, 50.0])
    check(gate_up)


def test_into_given_buffers(random_activations: Callable, device: torch.device) -> None:
    out = PackedActivations.allocate(2, 64, device=device)
    assert swiglu(random_activations(2, 128), out=out) is out
    assert torch.isfinite(out.sums).all()


def test_bad_arguments(device: torch.device) -> None:
    with pytest.raises(ValueError, match="gate_up has 65 columns"):
        swiglu(torch.zeros(1, 65, device=device))


@pytest.mark.gpu
def test_real_shapes_on_a_gpu(random_activations: Callable) -> None:
    check(random_activations(4, 28672, dtype=torch.float16))
