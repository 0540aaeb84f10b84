"""The Triton decoder against the torch one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flexquant_rl.kernels import reference
from flexquant_rl.kernels.bitplane import NestedWeight
from flexquant_rl.kernels.dequantize import dequantize

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")


def width_on(device: torch.device, width: int) -> torch.Tensor:
    return torch.tensor(width, dtype=torch.int32, device=device)


@pytest.mark.parametrize("bit_width", [3, 4, 6, 7, 8])
@pytest.mark.parametrize(("num_outputs", "num_inputs", "group_size"), [(5, 33, 32), (4, 172, 64), (3, 1200, 128)])
def test_matches_the_reference(
    random_weight: Callable, device: torch.device, num_outputs: int, num_inputs: int, group_size: int, bit_width: int
) -> None:
    weight = random_weight(num_outputs, num_inputs, group_size)
    dense = dequantize(weight, width_on(device, bit_width), dtype=torch.float32)
    expected = reference.dequantize(weight, bit_width=bit_width)
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bit_width", [3, 5])
def test_reads_only_what_the_width_needs(
    random_weight: Callable, poison_unread: Callable, device: torch.device, bit_width: int
) -> None:
    weight = random_weight(4, 64, 64)
    width = width_on(device, bit_width)
    assert torch.equal(dequantize(poison_unread(weight, bit_width), width), dequantize(weight, width))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_into_a_given_buffer(random_weight: Callable, device: torch.device, dtype: torch.dtype) -> None:
    weight = random_weight(4, 96, 32)
    out = torch.empty(4, 96, dtype=dtype, device=device)
    assert dequantize(weight, width_on(device, 4)[None], out=out) is out
    # Triton's interpreter cuts bfloat16 off instead of rounding: one unit in the last place.
    expected = reference.dequantize(weight, bit_width=4).to(dtype)
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("bit_widths", [(3, 4, 5, 6, 8), (8,)])
def test_rows_of_a_larger_matrix(random_weight: Callable, device: torch.device, bit_widths: tuple[int, ...]) -> None:
    """As the rows of q, k and v in a fused matrix; pairs of theirs may begin anywhere."""
    whole = random_weight(9, 300, 128, bit_widths=bit_widths)
    for first, last in ((0, 3), (3, 8), (8, 9)):
        parts = (part[:, first:last] for part in (whole.planes, whole.scale, whole.offset))
        some = NestedWeight(*parts, bit_widths, 128, 300)
        for bit_width in bit_widths:
            dense = dequantize(some, width_on(device, bit_width), dtype=torch.float32)
            expected = reference.dequantize(whole, bit_width=bit_width)[first:last]
            torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("given", "clamped"), [(0, 3), (2, 3), (50, 8)])
def test_the_width_is_clamped(random_weight: Callable, device: torch.device, given: int, clamped: int) -> None:
    weight = random_weight(4, 64, 64)
    assert torch.equal(dequantize(weight, width_on(device, given)), dequantize(weight, width_on(device, clamped)))


def test_bad_arguments(random_weight: Callable, device: torch.device) -> None:
    weight, width = random_weight(4, 64, 64), width_on(device, 4)
    with pytest.raises(ValueError, match="bit_width is torch.int64"):
        dequantize(weight, width.long())
    with pytest.raises(ValueError, match="bit_width is torch.int32 \\[2\\]; pass int32 \\[1\\]"):
        dequantize(weight, width.repeat(2))
    with pytest.raises(ValueError, match="out is torch.float16 \\[4, 32\\]"):
        dequantize(weight, width, out=torch.empty(4, 32, dtype=torch.float16, device=device))
    every_second = (part[:, ::2] for part in (weight.planes, weight.scale, weight.offset))
    with pytest.raises(ValueError, match="planes has strides"):
        dequantize(NestedWeight(*every_second, weight.bit_widths, 64, 64), width)
    odd = NestedWeight(
        weight.planes[:, :2], weight.scale[:, :2].clone(), weight.offset[:, :2], weight.bit_widths, 64, 64
    )
    with pytest.raises(ValueError, match="scale has strides"):
        dequantize(odd, width)


@pytest.mark.gpu
def test_real_shapes_on_a_gpu(random_weight: Callable, device: torch.device) -> None:
    weight = random_weight(1024, 4096, 128)
    for bit_width in range(3, 9):
        expected = reference.dequantize(weight, bit_width=bit_width)
        dense = dequantize(weight, width_on(device, bit_width), dtype=torch.float32)
        torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-6)
