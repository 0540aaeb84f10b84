"""The torch references against float64 loops, with everything a width must not read poisoned."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexquant_rl.kernels import reference
from flexquant_rl.kernels.bitplane import NestedWeight, pack_codes, padded_inputs, unpack_codes
from flexquant_rl.kernels.reference import bitplane_gemv, dequantize

BIT_WIDTHS = (3, 4, 5, 6, 8)
NAN = float("nan")


def random_weight(num_outputs: int, num_inputs: int, group_size: int = 128, seed: int = 0) -> NestedWeight:
    """Random codes with a different scale and offset for every width and group: a wrong slice cannot go unseen."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = padded_inputs(num_inputs) // group_size
    codes = torch.randint(0, 256, (num_outputs, num_inputs), dtype=torch.uint8, generator=generator)
    pair_shape = (len(BIT_WIDTHS), num_outputs, num_groups)
    scale = torch.rand(pair_shape, generator=generator) / torch.tensor([2.0**b for b in BIT_WIDTHS])[:, None, None]
    offset = torch.randn(pair_shape, generator=generator)
    return NestedWeight(pack_codes(codes), scale.half(), offset.half(), BIT_WIDTHS, group_size, num_inputs)


def decode_in_float64(weight: NestedWeight, bit_width: int) -> torch.Tensor:
    """The documented value of every weight, one group at a time, in float64."""
    codes = unpack_codes(weight.planes, bit_width=8, num_inputs=weight.num_inputs).long() >> (8 - bit_width)
    stored = bit_width in weight.bit_widths
    width_idx = weight.bit_widths.index(bit_width) if stored else -1
    scale, offset = weight.scale[width_idx].double(), weight.offset[width_idx].double()
    if not stored:
        merged = 2 ** (8 - bit_width)
        scale, offset = scale * merged, offset + scale * (merged - 1) / 2
    dense = torch.full((weight.num_outputs, weight.num_inputs), NAN, dtype=torch.float64)
    for group in range(weight.num_groups):
        inputs = slice(group * weight.group_size, min((group + 1) * weight.group_size, weight.num_inputs))
        dense[:, inputs] = scale[:, group, None] * codes[:, inputs] + offset[:, group, None]
    return dense


def poison_unread(weight: NestedWeight, bit_width: int) -> NestedWeight:
    """Garbage in every plane below `bit_width` and in every padded code, NaN in every pair that is not needed."""
    planes, scale, offset = weight.planes.clone(), weight.scale.clone(), weight.offset.clone()
    generator = torch.Generator().manual_seed(7)
    planes[bit_width:] = torch.randint(
        -(2**31), 2**31, planes[bit_width:].shape, dtype=torch.int32, generator=generator
    )
    codes = unpack_codes(planes, bit_width=8, num_inputs=weight.num_padded_inputs)
    codes[:, weight.num_inputs :] = 255
    planes = pack_codes(codes)
    needed = weight.bit_widths.index(bit_width) if bit_width in weight.bit_widths else len(weight.bit_widths) - 1
    num_used_groups = -(-weight.num_inputs // weight.group_size)
    for pair in (scale, offset):
        pair[torch.arange(len(weight.bit_widths)) != needed] = NAN
        pair[:, :, num_used_groups:] = NAN
    return replace(weight, planes=planes, scale=scale, offset=offset)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("bit_width", range(1, 9))
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "group_size"), [(1, 1, 32), (3, 33, 32), (5, 64, 64), (4, 172, 128), (7, 352, 64)]
)
def test_dequantize_is_scale_times_code_plus_offset(
    num_outputs: int, num_inputs: int, group_size: int, bit_width: int
) -> None:
    weight = random_weight(num_outputs, num_inputs, group_size)
    dense = dequantize(weight, bit_width=bit_width)
    assert dense.dtype == torch.float32
    assert dense.is_contiguous()
    torch.testing.assert_close(dense.double(), decode_in_float64(weight, bit_width), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bit_width", range(1, 9))
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_dequantize_reads_only_what_the_width_needs(bit_width: int, group_size: int) -> None:
    weight = random_weight(3, 172, group_size)
    poisoned = dequantize(poison_unread(weight, bit_width), bit_width=bit_width)
    assert torch.equal(poisoned, dequantize(weight, bit_width=bit_width))


@pytest.mark.parametrize("bit_width", [2, 7])
def test_widths_without_a_stored_pair_decode_to_the_mean_of_their_8_bit_values(bit_width: int) -> None:
    weight = random_weight(1, 128)
    codes = torch.arange(128, dtype=torch.uint8)[None]
    weight = replace(weight, planes=pack_codes(codes))
    exact = dequantize(weight, bit_width=8)
    means = exact.view(-1, 2 ** (8 - bit_width)).mean(1).repeat_interleave(2 ** (8 - bit_width))
    torch.testing.assert_close(dequantize(weight, bit_width=bit_width), means[None], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(
    ("dtype", "rel_tol"),
    [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)],
    ids=["float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("bit_width", range(1, 9))
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_inputs", "group_size"),
    [(1, 1, 1, 32), (3, 5, 33, 32), (1, 17, 64, 64), (2, 6, 172, 64), (3, 9, 352, 128)],
)
def test_gemv_matches_float64(
    num_tokens: int,
    num_outputs: int,
    num_inputs: int,
    group_size: int,
    bit_width: int,
    dtype: torch.dtype,
    rel_tol: float,
) -> None:
    weight = random_weight(num_outputs, num_inputs, group_size, seed=num_inputs)
    x = torch.randn(num_tokens, num_inputs, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = bitplane_gemv(x, weight, bit_width=bit_width)
    assert y.dtype == dtype
    assert y.shape == (num_tokens, num_outputs)
    expected = x.double() @ decode_in_float64(weight, bit_width).T
    error = y.double() - expected
    # Rounding is relative to the sum of magnitudes: the products may cancel.
    magnitude = x.double().abs() @ decode_in_float64(weight, bit_width).abs().T
    assert (error.square().mean() / magnitude.square().mean()).sqrt() < rel_tol
    assert (error.abs() / magnitude).max() < rel_tol


@pytest.mark.parametrize("bit_width", range(1, 9))
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_gemv_reads_only_what_the_width_needs(bit_width: int, group_size: int) -> None:
    weight = random_weight(6, 172, group_size)
    x = torch.randn(2, 172, generator=torch.Generator().manual_seed(4))
    y = bitplane_gemv(x, poison_unread(weight, bit_width), bit_width=bit_width)
    assert torch.equal(y, bitplane_gemv(x, weight, bit_width=bit_width))


@given(
    num_tokens=st.integers(1, 4),
    num_outputs=st.integers(1, 12),
    num_inputs=st.integers(1, 300),
    group_size=st.sampled_from((32, 64, 128)),
    bit_width=st.integers(1, 8),
)
def test_gemv_equals_the_dense_product(
    num_tokens: int, num_outputs: int, num_inputs: int, group_size: int, bit_width: int
) -> None:
    weight = random_weight(num_outputs, num_inputs, group_size, seed=num_outputs)
    x = torch.randn(num_tokens, num_inputs, generator=torch.Generator().manual_seed(num_inputs))
    dense = dequantize(weight, bit_width=bit_width)
    torch.testing.assert_close(bitplane_gemv(x, weight, bit_width=bit_width), x @ dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_weights", [1, 256, 3 * 256, 5 * 256])
def test_gemv_decodes_blocks_of_rows_and_no_more(monkeypatch: pytest.MonkeyPatch, block_weights: int) -> None:
    weight = random_weight(8, 172)
    x = torch.randn(2, 172, generator=torch.Generator().manual_seed(5))
    expected = bitplane_gemv(x, weight, bit_width=4)
    decoded_weights = []

    def recording_unpack(planes: torch.Tensor, *, bit_width: int, num_inputs: int) -> torch.Tensor:
        decoded_weights.append(planes.shape[1] * num_inputs)
        return unpack_codes(planes, bit_width=bit_width, num_inputs=num_inputs)

    monkeypatch.setattr(reference, "_BLOCK_WEIGHTS", block_weights)
    monkeypatch.setattr(reference, "unpack_codes", recording_unpack)
    torch.testing.assert_close(bitplane_gemv(x, weight, bit_width=4), expected, rtol=1e-6, atol=1e-5)
    assert sum(decoded_weights) == 8 * 256
    assert max(decoded_weights) <= max(block_weights, 256)


def test_a_token_does_not_change_another_one() -> None:
    weight = random_weight(16, 352)
    x = torch.randn(3, 352, generator=torch.Generator().manual_seed(6))
    others = x.clone()
    others[0], others[2] = NAN, 1e30
    alone, among = bitplane_gemv(x, weight, bit_width=5)[1], bitplane_gemv(others, weight, bit_width=5)[1]
    assert torch.equal(alone, among)


def test_gemv_accumulates_in_float32() -> None:
    # A float16 sum of 4,096 times 1 + 2**-10 stops growing before 4,096; the exact sum, 4,100, is a float16 number.
    weight = random_weight(1, 4096)
    ones = replace(
        weight,
        planes=torch.zeros_like(weight.planes),
        scale=torch.zeros_like(weight.scale),
        offset=torch.ones_like(weight.offset),
    )
    x = torch.full((1, 4096), 1 + 2**-10, dtype=torch.float16)
    assert bitplane_gemv(x, ones, bit_width=8).item() == 4100
    assert bitplane_gemv(torch.full((1, 4096), 20.0, dtype=torch.float16), ones, bit_width=8).isinf().all()


def test_gemv_refuses_bad_activations() -> None:
    weight = random_weight(2, 64)
    with pytest.raises(ValueError, match=r"x is \[1, 65\] but the weight has 64 inputs"):
        bitplane_gemv(torch.zeros(1, 65), weight, bit_width=4)
    with pytest.raises(ValueError, match="64 inputs"):
        bitplane_gemv(torch.zeros(64), weight, bit_width=4)
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        bitplane_gemv(torch.zeros(1, 64, dtype=torch.float64), weight, bit_width=4)
    with pytest.raises(ValueError, match="bit_width=9"):
        bitplane_gemv(torch.zeros(1, 64), weight, bit_width=9)
    with pytest.raises(ValueError, match="bit_width=0"):
        dequantize(weight, bit_width=0)
