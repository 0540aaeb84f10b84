"""The layout of nested weights: bit order, identities, padding, what a width reads."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexquant_rl.kernels.bitplane import (
    INPUT_ALIGNMENT,
    NUM_PLANES,
    WORD_BITS,
    NestedWeight,
    check_bit_widths,
    derive_scale_and_offset,
    pack_codes,
    padded_inputs,
    unpack_codes,
)

INPUT_COUNTS = (1, 31, 32, 33, 64, 127, 128, 129, 172, 352)


def random_codes(num_outputs: int, num_inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_outputs, num_inputs), dtype=torch.uint8, generator=generator)


def pack_bit_by_bit(codes: torch.Tensor) -> list[list[list[int]]]:
    """The documented bit order in plain Python: unsigned words `[plane][output][word]`."""
    num_words = padded_inputs(codes.shape[1]) // 32
    planes = [[[0] * num_words for _ in range(codes.shape[0])] for _ in range(8)]
    for n, row in enumerate(codes.tolist()):
        for k, code in enumerate(row):
            word, remainder = divmod(k, 32)
            t, c = divmod(remainder, 4)
            for plane in range(8):
                bit = (code >> (7 - plane)) & 1
                planes[plane][n][word] |= bit << (8 * c + t)
    return planes


def zeros_weight(num_outputs: int = 3, num_inputs: int = 200, group_size: int = 64) -> NestedWeight:
    num_padded = -(-num_inputs // 128) * 128
    planes = torch.zeros(8, num_outputs, num_padded // 32, dtype=torch.int32)
    pair = torch.zeros(3, num_outputs, num_padded // group_size, dtype=torch.float16)
    return NestedWeight(planes, pair, pair.clone(), (3, 4, 8), group_size, num_inputs)


def test_layout_constants_are_those_of_stored_checkpoints() -> None:
    assert (NUM_PLANES, WORD_BITS, INPUT_ALIGNMENT) == (8, 32, 128)


@pytest.mark.parametrize(
    ("num_inputs", "expected"), [(1, 128), (128, 128), (129, 256), (172, 256), (352, 384), (4096, 4096)]
)
def test_padded_inputs(num_inputs: int, expected: int) -> None:
    assert padded_inputs(num_inputs) == expected


@pytest.mark.parametrize("num_inputs", [1, 33, 172])
def test_pack_follows_the_documented_bit_order(num_inputs: int) -> None:
    codes = random_codes(3, num_inputs, seed=num_inputs)
    planes = pack_codes(codes)
    assert planes.dtype == torch.int32
    assert planes.is_contiguous()
    assert (planes.long() & 0xFFFFFFFF).tolist() == pack_bit_by_bit(codes)


@pytest.mark.parametrize(
    ("input_idx", "code", "plane", "word_idx", "word"),
    [
        (0, 128, 0, 0, 1),
        (1, 128, 0, 0, 1 << 8),
        (4, 128, 0, 0, 1 << 1),
        (30, 128, 0, 0, 1 << 23),
        (31, 128, 0, 0, -(2**31)),
        (31, 1, 7, 0, -(2**31)),
        (67, 32, 2, 2, 1 << 24),
    ],
)
def test_one_input_sets_one_bit(input_idx: int, code: int, plane: int, word_idx: int, word: int) -> None:
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, input_idx] = code
    planes = pack_codes(codes)
    assert planes[plane, 0, word_idx] == word
    assert planes.count_nonzero() == 1


@pytest.mark.parametrize("num_outputs", [1, 17])
@pytest.mark.parametrize("num_inputs", INPUT_COUNTS)
def test_unpack_inverts_pack(num_outputs: int, num_inputs: int) -> None:
    codes = random_codes(num_outputs, num_inputs)
    planes = pack_codes(codes)
    assert planes.shape == (8, num_outputs, padded_inputs(num_inputs) // 32)
    unpacked = unpack_codes(planes, bit_width=8, num_inputs=num_inputs)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@given(
    num_outputs=st.integers(1, 6),
    num_inputs=st.integers(1, 300),
    bit_width=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_top_planes_are_the_truncated_code(num_outputs: int, num_inputs: int, bit_width: int, seed: int) -> None:
    codes = random_codes(num_outputs, num_inputs, seed)
    truncated = unpack_codes(pack_codes(codes), bit_width=bit_width, num_inputs=num_inputs)
    assert torch.equal(truncated, codes >> (8 - bit_width))


@pytest.mark.parametrize("bit_width", range(1, 9))
def test_every_code_value_is_truncated_at_every_input_of_a_word(bit_width: int) -> None:
    # Row r holds value (r + k) mod 256 at input k: all 256 values pass all 32 positions of a word.
    codes = ((torch.arange(256)[:, None] + torch.arange(32)) % 256).to(torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes), bit_width=bit_width, num_inputs=32), codes >> (8 - bit_width))


@pytest.mark.parametrize("bit_width", range(1, 8))
def test_planes_below_the_width_are_not_read(bit_width: int) -> None:
    codes = random_codes(5, 172)
    planes = pack_codes(codes)
    planes[bit_width:] = torch.randint(-(2**31), 2**31, planes[bit_width:].shape, dtype=torch.int32)
    assert torch.equal(unpack_codes(planes, bit_width=bit_width, num_inputs=172), codes >> (8 - bit_width))
    assert torch.equal(unpack_codes(planes[:bit_width], bit_width=bit_width, num_inputs=172), codes >> (8 - bit_width))


@pytest.mark.parametrize("num_inputs", [n for n in INPUT_COUNTS if n % 128])
def test_padding_holds_zero_codes(num_inputs: int) -> None:
    planes = pack_codes(torch.full((2, num_inputs), 255, dtype=torch.uint8))
    codes = unpack_codes(planes, bit_width=8, num_inputs=padded_inputs(num_inputs))
    assert (codes[:, :num_inputs] == 255).all()
    assert not codes[:, num_inputs:].any()


def test_rows_are_packed_independently_and_from_any_strides() -> None:
    codes = random_codes(9, 130)
    planes = pack_codes(codes)
    assert torch.equal(pack_codes(codes[4:5]), planes[:, 4:5])
    assert torch.equal(pack_codes(codes.t().contiguous().t()), planes)
    some_rows = unpack_codes(planes[:, 2:7], bit_width=5, num_inputs=130)
    assert torch.equal(some_rows, codes[2:7] >> 3)


def test_one_wrong_bit_is_seen() -> None:
    codes = random_codes(2, 64)
    planes = pack_codes(codes)
    planes[3, 1, 1] ^= 1 << 9
    assert (unpack_codes(planes, bit_width=8, num_inputs=64) != codes).sum() == 1


@pytest.mark.parametrize("codes", [torch.zeros(2, 8, dtype=torch.int32), torch.zeros(8, dtype=torch.uint8)])
def test_pack_refuses_what_is_not_a_uint8_matrix(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack_codes(codes)


def test_unpack_refuses_bad_arguments() -> None:
    planes = pack_codes(random_codes(2, 128))
    for bit_width in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"bit_width={bit_width} .* 8 planes"):
            unpack_codes(planes, bit_width=bit_width, num_inputs=128)
    with pytest.raises(ValueError, match="only 3 planes"):
        unpack_codes(planes[:3], bit_width=4, num_inputs=128)
    with pytest.raises(ValueError, match="num_inputs=129 .* hold 128"):
        unpack_codes(planes, bit_width=4, num_inputs=129)
    with pytest.raises(ValueError, match="int32"):
        unpack_codes(planes.long(), bit_width=4, num_inputs=128)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_inputs", [64, 172, 352])
def test_bytes_read_is_proportional_to_the_width(group_size: int, num_inputs: int) -> None:
    weight = zeros_weight(num_outputs=5, num_inputs=num_inputs, group_size=group_size)
    pair_bytes = weight.scale[0].nbytes + weight.offset[0].nbytes
    for bit_width in range(1, 9):
        assert weight.bytes_read(bit_width) == bit_width * weight.planes[0].nbytes + pair_bytes
    with pytest.raises(ValueError, match="bit_width=9"):
        weight.bytes_read(9)


def test_nested_weight_reports_its_shape() -> None:
    weight = zeros_weight(num_outputs=3, num_inputs=200, group_size=64)
    assert (weight.num_outputs, weight.num_inputs, weight.num_padded_inputs, weight.num_groups) == (3, 200, 256, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planes": torch.zeros(8, 3, 8, dtype=torch.int64)}, "planes is torch.int64"),
        ({"planes": torch.zeros(7, 3, 8, dtype=torch.int32)}, r"planes is torch.int32 \[7, 3, 8\]"),
        ({"planes": torch.zeros(8, 3, 7, dtype=torch.int32)}, r"planes is torch.int32 \[8, 3, 7\]"),
        ({"planes": torch.zeros(8, 24, dtype=torch.int32)}, r"planes is torch.int32 \[8, 24\]"),
        ({"scale": torch.zeros(3, 3, 4)}, "scale is torch.float32"),
        ({"scale": torch.zeros(2, 3, 4, dtype=torch.float16)}, r"scale is torch.float16 \[2, 3, 4\]"),
        ({"offset": torch.zeros(3, 3, 2, dtype=torch.float16)}, r"offset is torch.float16 \[3, 3, 2\]"),
        ({"offset": torch.zeros(3, 3, 4, dtype=torch.float16, device="meta")}, "offset is on meta"),
        ({"bit_widths": (3, 4, 6)}, "end in 8; use 3,4,6,8"),
        ({"bit_widths": (4, 3, 8)}, "ascending"),
        ({"group_size": 48}, "group_size=48"),
        ({"num_inputs": 0}, "num_inputs=0"),
        ({"num_inputs": 128}, "num_inputs=128"),
        ({"num_inputs": 257}, "num_inputs=257"),
    ],
)
def test_nested_weight_refuses_fields_that_disagree(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(zeros_weight(), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bit_widths", [(), (0, 8), (3, 9), (8, 3), (3, 3, 8), (3, 4), (-1, 8)])
def test_check_bit_widths_refuses(bit_widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be distinct, ascending, within 1..8 and end in 8"):
        check_bit_widths(bit_widths)


@pytest.mark.parametrize("bit_widths", [(8,), (1, 2, 3, 4, 5, 6, 7, 8), (3, 8)])
def test_check_bit_widths_accepts(bit_widths: tuple[int, ...]) -> None:
    check_bit_widths(bit_widths)


@pytest.mark.parametrize("bit_width", range(1, 9))
def test_derived_pair_decodes_a_cell_to_the_mean_of_the_8_bit_values_in_it(bit_width: int) -> None:
    scale_8, offset_8 = torch.tensor(0.25, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    values = scale_8 * torch.arange(256) + offset_8
    scale, offset = derive_scale_and_offset(scale_8, offset_8, bit_width=bit_width)
    decoded = scale * torch.arange(2**bit_width) + offset
    assert torch.equal(decoded, values.view(2**bit_width, -1).mean(1))


def test_scale_and_offset_are_stored_where_stored_and_derived_elsewhere() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(3, 3, 4, generator=generator).half()
    offset = torch.randn(3, 3, 4, generator=generator).half()
    weight = replace(zeros_weight(), scale=scale, offset=offset)
    for width_idx, bit_width in enumerate(weight.bit_widths):
        stored = weight.scale_and_offset(bit_width)
        assert torch.equal(stored[0], scale[width_idx].float())
        assert torch.equal(stored[1], offset[width_idx].float())
    for bit_width in (1, 2, 5, 6, 7):
        derived = weight.scale_and_offset(bit_width)
        expected = derive_scale_and_offset(scale[2].float(), offset[2].float(), bit_width=bit_width)
        assert all(torch.equal(a, b) for a, b in zip(derived, expected, strict=True))
        assert derived[0].dtype == derived[1].dtype == torch.float32
    with pytest.raises(ValueError, match="bit_width=0"):
        weight.scale_and_offset(0)
