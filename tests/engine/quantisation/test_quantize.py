"""The quantiser against brute force, round to nearest and hand arithmetic; its refusals."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation import quantize
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.quantisation.quantize import quantize_rtn
from flexquant_rl.kernels.bitplane import NestedWeight, derive_scale_and_offset, unpack_codes
from flexquant_rl.kernels.reference import dequantize

BIT_WIDTHS = (3, 4, 5, 6, 8)
ALL_WIDTHS = tuple(range(1, 9))


def gaussian(num_outputs: int, num_inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed)) * 0.02


def student_t(num_outputs: int, num_inputs: int, seed: int = 0, degrees: int = 6) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(degrees, (num_outputs, num_inputs))).float() * 0.02


def round_to_nearest(weight: Tensor, bit_width: int, group_size: int) -> Tensor:
    """Plain min-max rounding of each group at one width, its parameters kept in float64; group_size must divide K."""
    groups = weight.double().view(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**bit_width - 1)
    return torch.add(((groups - low) / step).round() * step, low).view(weight.shape)


def signal_to_noise_db(weight: Tensor, decoded: Tensor) -> float:
    weight, decoded = weight.double(), decoded.double()
    return float(10 * torch.log10(weight.square().sum() / (weight - decoded).square().sum()))


def group_slices(weight: NestedWeight) -> list[slice]:
    size = weight.group_size
    return [slice(start, min(start + size, weight.num_inputs)) for start in range(0, weight.num_inputs, size)]


def codes_of(weight: NestedWeight, bit_width: int = 8) -> Tensor:
    return unpack_codes(weight.planes, bit_width=bit_width, num_inputs=weight.num_inputs)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 1), (2, 33), (3, 64), (4, 172), (2, 352)])
def test_shapes_and_dtypes(num_outputs: int, num_inputs: int, group_size: int) -> None:
    nested = quantize_rtn(gaussian(num_outputs, num_inputs), group_size=group_size, bit_widths=BIT_WIDTHS)
    num_groups = -(-num_inputs // 128) * 128 // group_size
    assert (nested.num_outputs, nested.num_inputs, nested.num_groups) == (num_outputs, num_inputs, num_groups)
    assert (nested.bit_widths, nested.group_size) == (BIT_WIDTHS, group_size)
    assert nested.scale.shape == nested.offset.shape == (5, num_outputs, num_groups)
    assert nested.scale.dtype == nested.offset.dtype == torch.float16
    assert bool((nested.scale >= 0).all())


def test_codes_are_the_cells_of_the_range_of_the_group() -> None:
    # Squares of 0 ... 127, their range of 127**2 cut into 256 cells: v**2 lies in cell floor(v**2 * 256 / 127**2).
    squares = [v * v for v in range(128)]
    nested = quantize_rtn(torch.tensor([squares]).float() - 500, group_size=128, bit_widths=(4, 8))
    expected = [min(255, square * 256 // 127**2) for square in squares]
    assert codes_of(nested)[0].tolist() == expected
    assert codes_of(nested, 4)[0].tolist() == [code >> 4 for code in expected]


def test_cells_decode_to_the_mean_of_their_values() -> None:
    weight = torch.arange(128.0)[None]  # sixteen cells of eight values each
    nested = quantize_rtn(weight, group_size=128, bit_widths=(4, 8))
    means = weight.view(16, 8).mean(1).repeat_interleave(8)
    torch.testing.assert_close(dequantize(nested, bit_width=4)[0], means, rtol=0, atol=0.05)


@pytest.mark.parametrize("make_weight", [gaussian, student_t])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_inputs", [64, 172, 352])
def test_pairs_are_least_squares_up_to_float16_rounding(
    make_weight: Callable[[int, int], Tensor], num_inputs: int, group_size: int
) -> None:
    weight = make_weight(3, num_inputs)
    nested = quantize_rtn(weight, group_size=group_size, bit_widths=BIT_WIDTHS)
    for width_idx, bit_width in enumerate(BIT_WIDTHS):
        codes, decoded = codes_of(nested, bit_width).double().numpy(), dequantize(nested, bit_width=bit_width)
        for row in range(3):
            for group, inputs in enumerate(group_slices(nested)):
                target = weight[row, inputs].double().numpy()
                design = np.stack((codes[row, inputs], np.ones(target.size)), axis=1)
                best, *_ = np.linalg.lstsq(design, target, rcond=None)
                optimum = np.square(target - design @ best).sum()
                error = np.square(target - decoded[row, inputs].double().numpy()).sum()
                # Rounding the scale by d_s, then refitting and rounding the offset by d_o, costs exactly
                # d_s**2 * sum((q - mean q)**2) + n * d_o**2, and float16 rounds by at most 2**-11 of the value.
                d_scale = abs(float(nested.scale[width_idx, row, group])) * 2**-11
                d_offset = abs(float(nested.offset[width_idx, row, group])) * 2**-11
                spread = np.square(design[:, 0] - design[:, 0].mean()).sum()
                bound = optimum + d_scale**2 * spread + target.size * d_offset**2
                assert optimum * (1 - 1e-6) - 1e-12 <= error <= bound * (1 + 1e-5) + 1e-12, (bit_width, row, group)


@pytest.mark.parametrize("make_weight", [gaussian, student_t])
@pytest.mark.parametrize("group_size", [32, 128])
def test_no_group_is_worse_than_with_the_derived_pair(
    make_weight: Callable[[int, int], Tensor], group_size: int
) -> None:
    weight = make_weight(64, 172)
    nested = quantize_rtn(weight, group_size=group_size, bit_widths=BIT_WIDTHS)
    num_better = 0
    for bit_width in BIT_WIDTHS[:-1]:
        pair = derive_scale_and_offset(nested.scale[-1].double(), nested.offset[-1].double(), bit_width=bit_width)
        scale, offset = (tensor.half().double() for tensor in pair)
        codes, decoded = codes_of(nested, bit_width).double(), dequantize(nested, bit_width=bit_width).double()
        for group, inputs in enumerate(group_slices(nested)):
            derived = scale[:, group, None] * codes[:, inputs] + offset[:, group, None]
            derived_error = (weight[:, inputs] - derived).square().sum(1)
            error = (weight[:, inputs] - decoded[:, inputs]).square().sum(1)
            assert bool((error <= derived_error * (1 + 1e-5)).all())
            num_better += int((error < derived_error * 0.999).sum())
    assert num_better > 0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("degrees", [None, 6, 3], ids=["gaussian", "t6", "t3"])
def test_nested_widths_3_and_4_beat_dedicated_round_to_nearest(degrees: int | None, group_size: int, seed: int) -> None:
    weight = gaussian(128, 512, seed) if degrees is None else student_t(128, 512, seed, degrees)
    nested = quantize_rtn(weight, group_size=group_size, bit_widths=BIT_WIDTHS)
    for bit_width in (3, 4):
        ours = signal_to_noise_db(weight, dequantize(nested, bit_width=bit_width))
        assert ours > signal_to_noise_db(weight, round_to_nearest(weight, bit_width, group_size)), bit_width


@pytest.mark.parametrize(
    ("make_weight", "expected_db"),
    # Measured once for groups of 128. Without the half cell every number is 6 dB lower.
    [(gaussian, (14.5, 20.4, 26.5, 32.5, 44.5)), (student_t, (12.5, 18.4, 24.4, 30.5, 42.5))],
)
def test_signal_to_noise_at_every_width(
    make_weight: Callable[[int, int], Tensor], expected_db: tuple[float, ...]
) -> None:
    weight = make_weight(512, 512)
    nested = quantize_rtn(weight, group_size=128, bit_widths=BIT_WIDTHS)
    measured = [signal_to_noise_db(weight, dequantize(nested, bit_width=b)) for b in BIT_WIDTHS]
    assert measured == pytest.approx(expected_db, abs=0.2)


@given(
    num_outputs=st.integers(1, 5),
    num_inputs=st.integers(1, 300),
    group_size=st.sampled_from((32, 64, 128)),
    mean=st.sampled_from((0.0, 0.01, -0.3)),
    seed=st.integers(0, 2**31),
)
def test_8_bit_error_is_half_a_cell_and_params_are_finite(
    num_outputs: int, num_inputs: int, group_size: int, mean: float, seed: int
) -> None:
    weight = gaussian(num_outputs, num_inputs, seed) + mean
    nested = quantize_rtn(weight, group_size=group_size, bit_widths=BIT_WIDTHS)
    decoded = dequantize(nested, bit_width=8)
    for inputs in group_slices(nested):
        block = weight[:, inputs]
        cell = (block.amax(1) - block.amin(1)) / 256
        # A least-squares pair may move a value by another half cell; float16 rounds the two ends of the range.
        bound = cell + 2**-10 * block.abs().amax(1)
        assert bool(((block - decoded[:, inputs]).abs().amax(1) <= bound).all())
    for bit_width in ALL_WIDTHS:
        assert bool(dequantize(nested, bit_width=bit_width).isfinite().all())


@pytest.mark.parametrize("make_weight", [gaussian, student_t])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_inputs", [33, 172, 512])
@pytest.mark.parametrize("bit_widths", [BIT_WIDTHS, (8,), ALL_WIDTHS])
def test_error_falls_with_every_width(
    make_weight: Callable[[int, int], Tensor], num_inputs: int, group_size: int, bit_widths: tuple[int, ...]
) -> None:
    weight = make_weight(64, num_inputs)
    nested = quantize_rtn(weight, group_size=group_size, bit_widths=bit_widths)
    errors = [float((weight - dequantize(nested, bit_width=b)).square().sum()) for b in ALL_WIDTHS]
    assert all(wider < 0.5 * narrower for narrower, wider in pairwise(errors))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_inputs", [1, 33, 172])
def test_padding_takes_no_part(num_inputs: int, group_size: int) -> None:
    # Far from zero: a padded zero in the range or in the fit would be seen in every number.
    weight = gaussian(3, num_inputs) + 5
    nested = quantize_rtn(weight, group_size=group_size, bit_widths=BIT_WIDTHS)
    num_tail = num_inputs % group_size
    tail = quantize_rtn(weight[:, num_inputs - num_tail :], group_size=group_size, bit_widths=BIT_WIDTHS)
    group = num_inputs // group_size
    assert torch.equal(nested.scale[:, :, group], tail.scale[:, :, 0])
    assert torch.equal(nested.offset[:, :, group], tail.offset[:, :, 0])
    assert torch.equal(codes_of(nested)[:, num_inputs - num_tail :], codes_of(tail))
    assert not unpack_codes(nested.planes, bit_width=8, num_inputs=nested.num_padded_inputs)[:, num_inputs:].any()
    assert not nested.scale[:, :, group + 1 :].any()
    assert not nested.offset[:, :, group + 1 :].any()


def test_groups_and_chunks_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = student_t(37, 172)
    whole = quantize_rtn(weight, group_size=64, bit_widths=BIT_WIDTHS)
    monkeypatch.setattr(quantize, "_CHUNK_WEIGHTS", 5 * 128)
    chunked = quantize_rtn(weight, group_size=64, bit_widths=BIT_WIDTHS)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    permuted = quantize_rtn(weight[order], group_size=64, bit_widths=BIT_WIDTHS)
    for field in ("planes", "scale", "offset"):
        expected = getattr(whole, field)
        assert torch.equal(getattr(chunked, field), expected)
        assert torch.equal(getattr(permuted, field), expected[:, order])


@pytest.mark.parametrize("value", [0.0, 1.0, -0.75, 3.14159, 60000.0, 1e-6])
def test_constant_groups_decode_to_their_value_at_every_width(value: float) -> None:
    weight = torch.full((2, 200), value)
    nested = quantize_rtn(weight, group_size=64, bit_widths=BIT_WIDTHS)
    expected = torch.tensor(value).half().float().item()
    for bit_width in ALL_WIDTHS:
        assert bool((dequantize(nested, bit_width=bit_width) == expected).all())


def test_constant_groups_among_others() -> None:
    weight = gaussian(4, 256)
    weight[1, :128], weight[3, 128:] = 0.0, 0.5
    nested = quantize_rtn(weight, group_size=128, bit_widths=BIT_WIDTHS)
    for bit_width in ALL_WIDTHS:
        decoded = dequantize(nested, bit_width=bit_width)
        assert bool((decoded[1, :128] == 0).all())
        assert bool((decoded[3, 128:] == 0.5).all())
        assert bool(decoded.isfinite().all())


def test_two_values_of_a_group_are_exact_at_every_width() -> None:
    weight = torch.tensor([-1.0, 0.5])[torch.randint(0, 2, (4, 128), generator=torch.Generator().manual_seed(0))]
    nested = quantize_rtn(weight, group_size=128, bit_widths=ALL_WIDTHS)
    for bit_width in ALL_WIDTHS:
        torch.testing.assert_close(dequantize(nested, bit_width=bit_width), weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("magnitude", [1e-2, 1.0, 1e2, 1e4])
def test_signal_to_noise_does_not_depend_on_the_size_of_the_weights(magnitude: float) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * magnitude
    nested = quantize_rtn(weight, group_size=128, bit_widths=BIT_WIDTHS)
    measured = [signal_to_noise_db(weight, dequantize(nested, bit_width=b)) for b in BIT_WIDTHS]
    assert measured == pytest.approx((14.5, 20.4, 26.5, 32.5, 44.5), abs=0.3)


def test_a_tiny_group_among_normal_ones_is_accepted() -> None:
    weight = gaussian(4, 256)
    weight[2, :128] *= 1e-8
    nested = quantize_rtn(weight, group_size=128, bit_widths=BIT_WIDTHS)
    for bit_width in ALL_WIDTHS:
        assert float(dequantize(nested, bit_width=bit_width)[2, :128].abs().max()) < 1e-7


@pytest.mark.parametrize("magnitude", [1e-6, 1e-8, 1e-30, 1e-40])
def test_weights_too_small_for_float16_scales_are_refused(magnitude: float) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) * magnitude
    with pytest.raises(InputError, match=r"^layers\.0\.up has .* too small for float16 scales .*; scale it up"):
        quantize_rtn(weight, group_size=128, bit_widths=BIT_WIDTHS, name="layers.0.up")


@pytest.mark.parametrize("largest", [1e5, 1e6, 3e38])
def test_weights_too_large_for_float16_are_refused(largest: float) -> None:
    weight = gaussian(8, 256)
    weight[3, 200] = -largest
    with pytest.raises(InputError, match=r"^layers\.0\.up has values up to .* 65504; scale it down") as caught:
        quantize_rtn(weight, group_size=128, bit_widths=BIT_WIDTHS, name="layers.0.up")
    assert f"{largest:g}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_largest_representable_weights_are_accepted() -> None:
    weight = torch.linspace(-60000, 60000, 256).view(2, 128)
    nested = quantize_rtn(weight, group_size=128, bit_widths=BIT_WIDTHS)
    for bit_width in ALL_WIDTHS:
        assert bool(dequantize(nested, bit_width=bit_width).isfinite().all())


def test_a_fitted_pair_is_used_where_the_derived_one_overflows() -> None:
    # The derived 3-bit scale, span / 8, is above 65504. Most values lie in the middle of the 8-bit cells 31 and 224,
    # which are the inner edges of the 3-bit cells 0 and 7.
    low, span = -60000.0, 524_400.0
    weight = torch.tensor([[low, low + span] + [low + span * 31.5 / 256, low + span * 224.5 / 256] * 63])
    nested = quantize_rtn(weight, group_size=128, bit_widths=BIT_WIDTHS)
    assert derive_scale_and_offset(nested.scale[-1], nested.offset[-1], bit_width=3)[0].isinf().all()
    assert float(nested.scale[0]) == pytest.approx(span * 193 / 256 / 7, rel=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_with_name_count_and_fix(bad: float) -> None:
    weight = gaussian(8, 172)
    weight[2, 5], weight[7, 171], weight[0, 0] = bad, bad, float("nan")
    with pytest.raises(InputError) as caught:
        quantize_rtn(weight, group_size=64, bit_widths=BIT_WIDTHS, name="model.layers.3.mlp.down_proj")
    message = str(caught.value)
    assert message.startswith("model.layers.3.mlp.down_proj has 3 NaN or infinite values of 1376")
    assert "must be finite; repair" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(2, 8, dtype=torch.int8), torch.zeros(0, 8), torch.zeros(8, 0)],
)
def test_what_is_not_a_floating_point_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(InputError, match="bias is .* must be a floating-point matrix"):
        quantize_rtn(weight, group_size=128, bit_widths=BIT_WIDTHS, name="bias")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 100}, "group_size=100 is not supported; use one of 32, 64, 128"),
        ({"bit_widths": (3, 4)}, "must be distinct, ascending, within 1..8 and end in 8; use 3,4,8"),
        ({"bit_widths": (8, 4)}, "ascending"),
        ({"bit_widths": ()}, "end in 8; use 8"),
    ],
)
def test_format_options_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_rtn(gaussian(2, 128), **changes)
    with pytest.raises(InputError, match=message) as caught:
        QuantizationConfig(**changes).validate()
    assert "\n" not in str(caught.value)


def test_config_defaults_are_valid_and_bad_names_are_refused() -> None:
    QuantizationConfig().validate()
    QuantizationConfig(group_size=32, bit_widths=(2, 8), unit="half", quantize_head=False).validate()
    bad_method: Any = "magic"
    with pytest.raises(InputError, match="method='magic' is not a quantiser; use 'rtn'"):
        QuantizationConfig(method=bad_method).validate()
    with pytest.raises(InputError, match="unit='magic' must be 'layer' or 'half'"):
        QuantizationConfig(unit=bad_method).validate()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_and_strides_give_the_result_of_float32(dtype: torch.dtype) -> None:
    weight = gaussian(6, 172).to(dtype)
    expected = quantize_rtn(weight.float() if dtype != torch.float64 else weight, group_size=64, bit_widths=BIT_WIDTHS)
    parameter = torch.nn.Parameter(weight.t().contiguous()).t()
    nested = quantize_rtn(parameter, group_size=64, bit_widths=BIT_WIDTHS)
    for field in ("planes", "scale", "offset"):
        assert torch.equal(getattr(nested, field), getattr(expected, field))
        assert not getattr(nested, field).requires_grad
