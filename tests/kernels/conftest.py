"""Nested weights and activations for the tests of the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexquant_rl.kernels.bitplane import NestedWeight, pack_codes, padded_inputs, unpack_codes

STORED_WIDTHS = (3, 4, 5, 6, 8)


@pytest.fixture(scope="session")
def random_weight(device: torch.device) -> Callable[..., NestedWeight]:
    """Makes a weight with random codes, and NaN pairs and full codes in the padding, which nothing may look at."""

    def make(
        num_outputs: int, num_inputs: int, group_size: int, *, bit_widths: tuple[int, ...] = STORED_WIDTHS
    ) -> NestedWeight:
        generator = torch.Generator().manual_seed(num_outputs + num_inputs)
        num_padded = padded_inputs(num_inputs)
        codes = torch.randint(0, 256, (num_outputs, num_padded), dtype=torch.uint8, generator=generator)
        codes[:, num_inputs:] = 255
        spread = torch.rand(num_outputs, num_padded // group_size, generator=generator) + 0.5
        scale = torch.stack([spread * 2.0**-b for b in bit_widths])
        offset = torch.stack([-spread * (0.5 + 0.1 * i) for i in range(len(bit_widths))])
        for pair in (scale, offset):
            pair[:, :, -(-num_inputs // group_size) :] = torch.nan
        parts = (pack_codes(codes), scale.half(), offset.half())
        return NestedWeight(*(part.to(device) for part in parts), bit_widths, group_size, num_inputs)

    return make


@pytest.fixture(scope="session")
def poison_unread(device: torch.device) -> Callable[[NestedWeight, int], NestedWeight]:
    """Puts garbage into every plane and NaN into every pair that a stored width does not need."""

    def poison(weight: NestedWeight, bit_width: int) -> NestedWeight:
        planes, scale, offset = weight.planes.clone(), weight.scale.clone(), weight.offset.clone()
        planes[bit_width:] = 0x55AA33CC
        needed = weight.bit_widths.index(bit_width)
        for pair in (scale, offset):
            pair[torch.arange(len(weight.bit_widths)) != needed] = torch.nan
        top = unpack_codes(planes, bit_width=bit_width, num_inputs=weight.num_inputs)
        assert torch.equal(top, unpack_codes(weight.planes, bit_width=bit_width, num_inputs=weight.num_inputs))
        return NestedWeight(planes, scale, offset, weight.bit_widths, weight.group_size, weight.num_inputs)

    return poison


@pytest.fixture(scope="session")
def random_activations(device: torch.device) -> Callable[..., Tensor]:
    """Makes activations with a few outliers and one word of zeros."""

    def make(num_tokens: int, num_inputs: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(num_tokens, num_inputs, generator=torch.Generator().manual_seed(num_inputs))
        x[:, ::37] *= 20.0
        x[:, 32:64] = 0.0
        return x.to(device, dtype)

    return make
