"""Packing of activations, alone and behind RMSNorm and SwiGLU, against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexquant_rl.kernels import reference_ops
from flexquant_rl.kernels.activations import PackedActivations, pack_activations

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = [(1, 1), (3, 33), (2, 172), (1, 1056)]  # (M, K)


def check_same(packed: PackedActivations, expected: PackedActivations) -> None:
    assert torch.equal(packed.values, expected.values)
    torch.testing.assert_close(packed.sums, expected.sums, rtol=1e-5, atol=1e-4, equal_nan=True)
    if expected.scale is None:
        assert packed.scale is None
    else:
        torch.testing.assert_close(packed.scale, expected.scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "num_inputs"), SHAPES)
def test_int8_is_the_reference_bit_for_bit(
    random_activations: Callable, num_tokens: int, num_inputs: int, dtype: torch.dtype
) -> None:
    x = random_activations(num_tokens, num_inputs, dtype=dtype)
    check_same(pack_activations(x), reference_ops.pack_activations(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "num_inputs"), SHAPES)
def test_float_mode_keeps_the_values(
    random_activations: Callable, device: torch.device, num_tokens: int, num_inputs: int, dtype: torch.dtype
) -> None:
    x = random_activations(num_tokens, num_inputs)
    out = PackedActivations.allocate(num_tokens, num_inputs, device=device, mode="float", dtype=dtype)
    assert pack_activations(x, out=out) is out
    check_same(out, reference_ops.pack_activations(x, mode="float", dtype=dtype))
    unpacked = reference_ops.unpack_activations(out)
    assert torch.equal(unpacked[:, :num_inputs], x.to(dtype).float())
    assert not unpacked[:, num_inputs:].any()


def test_layout(device: torch.device) -> None:
    """Byte c of word w in quad t is input 32w + 4t + c."""
    x = torch.zeros(1, 64, device=device)
    x[0, 32 + 4 * 5 + 2], x[0, 32 + 4 * 6 + 1] = 127.0, -3.0
    packed = pack_activations(x)
    assert packed.values.shape == (1, 8, 4)
    expected = torch.zeros(1, 8, 4, dtype=torch.int32)
    expected[0, 5, 1] = 127 << 16
    expected[0, 6, 1] = (-3 & 0xFF) << 8
    assert torch.equal(packed.values.cpu(), expected)
    assert packed.sums.cpu().tolist() == [[0.0, 124.0, 0.0, 0.0]]


def test_ties_go_to_even(device: torch.device) -> None:
    x = torch.zeros(1, 32, device=device)
    x[0, :5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5])
    values = pack_activations(x).values.view(torch.int8).view(1, 8, 4, 4)[0, :, 0].flatten()
    assert values[:5].tolist() == [127, 0, 2, 2, 0]


def test_tiny_nan_and_infinite_inputs(device: torch.device) -> None:
    x = torch.ones(1, 128, device=device)
    x[0, :32], x[0, 40], x[0, 70] = 1e-38, torch.nan, -torch.inf
    packed = pack_activations(x)
    check_same(packed, reference_ops.pack_activations(x))
    assert packed.scale is not None
    assert packed.scale[0, 0] == 0
    assert torch.isnan(packed.scale[0]).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), {}, "x is torch.int32"),
        (torch.zeros(2), {}, "x is torch.float32 \\[2\\]"),
        (torch.zeros(4, 4)[:, ::2], {}, "x has strides"),
        (torch.zeros(1, 4), {"mode": "int4"}, "mode='int4' does not exist; use one of int8, float"),
        (torch.zeros(0, 4), {}, "num_tokens=0"),
    ],
)
def test_bad_arguments(device: torch.device, x: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_activations(x.to(device), **options)


def test_buffers_must_fit(device: torch.device) -> None:
    x = torch.zeros(1, 64, device=device)
    with pytest.raises(ValueError, match="activations hold 32 inputs but 64 are needed"):
        pack_activations(x, out=PackedActivations.allocate(1, 32, device=device))
    with pytest.raises(ValueError, match="values is torch.int32 \\[2, 8, 4\\]; pass int32 \\[1, 8, 4\\]"):
        pack_activations(x, out=PackedActivations.allocate(2, 64, device=device))


@pytest.mark.gpu
def test_real_shapes_on_a_gpu(random_activations: Callable) -> None:
    x = random_activations(4, 14336, dtype=torch.float16)
    check_same(pack_activations(x), reference_ops.pack_activations(x))
