"""Quantisers: from a dense weight to nested bitplanes with one scale and offset per width and group."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.refit import damped_hessian, refit_pairs
from flexquant_rl.kernels.bitplane import (
    GROUP_SIZES,
    NUM_PLANES,
    NestedWeight,
    check_bit_widths,
    derive_scale_and_offset,
    pack_codes,
    padded_inputs,
)

_NUM_LEVELS = 2**NUM_PLANES
# Weights quantised at one time: keeps the float64 temporaries in cache and bounds memory for any matrix.
_CHUNK_WEIGHTS = 1 << 18
# 256 levels over the range of a group of at most 128 cannot lose more than sqrt(128 * 2) / 512 = 3.1% of its RMS,
# whatever the values; more means that float16 could not hold the scales.
_MAX_RELATIVE_ERROR = 0.05


def quantize_rtn(
    weight: Tensor,
    *,
    group_size: int = 128,
    bit_widths: tuple[int, ...] = (3, 4, 5, 6, 8),
    hessian: Tensor | None = None,
    name: str = "weight",
) -> NestedWeight:
    """Quantises a weight by rounding to nearest, then fits scale and offset of every width by least squares.

    The range of a group is cut into 256 equal cells and a code is the index of a cell. For each width the pair that
    minimises the squared error of ``scale * (code >> (8 - b)) + offset`` has a closed form; it is rounded to float16
    and kept where it beats the pair derived from the 8-bit one. Padded inputs take no part in either step. With
    `hessian` the pairs are then refitted to the error of the outputs instead of the weights (`refit_pairs`).

    Shapes: N output features, K input features.

    Args:
        weight: `[N, K]` floating point, finite, any device.
        group_size: Consecutive inputs that share a scale and an offset: 32, 64 or 128. It need not divide K.
        bit_widths: Widths to store, ascending, the last is 8.
        hessian: `[K, K]`, mean of ``x xᵀ`` over the tokens of a calibration text, or None.
        name: What error messages call the weight.

    Returns:
        The nested weight, on the device of `weight`.

    Raises:
        InputError: If the options are outside their domain, or the weight is not a floating-point matrix, has NaN or
            infinite values, or values that float16 scales and offsets cannot represent; or if the hessian is not
            finite or of another size.
    """
    check_format(group_size, bit_widths)
    check_weight(weight, name)
    num_outputs, num_inputs = weight.shape
    num_padded = padded_inputs(num_inputs)
    codes = torch.zeros(num_outputs, num_padded, dtype=torch.uint8, device=weight.device)
    pair_shape = (len(bit_widths), num_outputs, num_padded // group_size)
    scale = torch.zeros(pair_shape, dtype=torch.float16, device=weight.device)
    offset = torch.zeros(pair_shape, dtype=torch.float16, device=weight.device)
    energy = torch.zeros(2, dtype=torch.float64, device=weight.device)  # squared error at 8 bits, squared weight
    for rows, inputs, size in _blocks(num_outputs, num_inputs, group_size):
        block = weight[rows, inputs].detach().double()
        fit = _quantize_groups(block.reshape(block.shape[0], -1, size), bit_widths)
        groups = slice(inputs.start // group_size, -(-inputs.stop // group_size))
        codes[rows, inputs] = fit.codes.flatten(1)
        scale[:, rows, groups] = fit.scale
        offset[:, rows, groups] = fit.offset
        energy += torch.stack((fit.squared_error.sum(), block.square().sum()))
    check_range(weight, scale, offset, energy, name)
    if hessian is not None:
        used = (..., slice(0, -(-num_inputs // group_size)))
        scale[used], offset[used] = refit_pairs(
            weight,
            codes[:, :num_inputs],
            scale[used],
            offset[used],
            damped_hessian(hessian.to(weight.device), num_inputs, name),
            bit_widths=tuple(bit_widths),
            group_size=group_size,
        )
    return NestedWeight(pack_codes(codes), scale, offset, tuple(bit_widths), group_size, num_inputs)


@dataclass(frozen=True, eq=False)
class _GroupFit:
    """Result for a block of n rows and g groups of `size` inputs."""

    codes: Tensor  # [n, g, size] uint8
    scale: Tensor  # [V, n, g] float16
    offset: Tensor  # [V, n, g] float16
    squared_error: Tensor  # [n, g] float64, at the widest width


def _quantize_groups(groups: Tensor, bit_widths: tuple[int, ...]) -> _GroupFit:
    """Quantises `groups [n, g, size]` float64, without padding, at every width."""
    low = groups.amin(-1)
    span = groups.amax(-1) - low
    # Fits work on the distance from the minimum: a large common offset must not cancel the digits of the weights.
    height = groups - low[..., None]
    ratio = height / torch.where(span > 0, span, 1.0)[..., None]
    codes = (ratio * _NUM_LEVELS).floor_().clamp_(max=_NUM_LEVELS - 1).to(torch.uint8)
    scale_8 = (span / _NUM_LEVELS).half()
    offset_8 = (low + span / (2 * _NUM_LEVELS)).half()
    pairs = []
    squared_error = None
    for bit_width in reversed(bit_widths):
        derived = derive_scale_and_offset(scale_8.double(), offset_8.double(), bit_width=bit_width)
        scale, offset, error = _fit_pair(codes >> (NUM_PLANES - bit_width), height, low, derived)
        if squared_error is None:
            scale_8, offset_8, squared_error = scale, offset, error
        pairs.append((scale, offset))
    assert squared_error is not None, "bit_widths were checked to hold 8"
    scales, offsets = zip(*reversed(pairs), strict=True)
    return _GroupFit(codes, torch.stack(scales), torch.stack(offsets), squared_error)


def _fit_pair(
    codes: Tensor, height: Tensor, low: Tensor, derived: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fits one width: the least-squares pair after float16 rounding, or the derived pair where that is better.

    Args:
        codes: `[n, g, size]` uint8, the codes of this width.
        height: `[n, g, size]` float64, weights less `low`.
        low: `[n, g]` float64, minimum of each group.
        derived: Scale and offset to beat, `[n, g]` float64 each.

    Returns:
        Scale and offset, `[n, g]` float16, and the squared error of the group, `[n, g]` float64.
    """
    size = codes.shape[-1]
    q = codes.double()
    mean_q, mean_h = q.mean(-1), height.mean(-1)
    q -= mean_q[..., None]
    centred = height - mean_h[..., None]
    sum_qq, sum_qh, sum_hh = q.square().sum(-1), (q * centred).sum(-1), centred.square().sum(-1)

    def squared_error(scale: Tensor, offset: Tensor) -> Tensor:
        bias = mean_h - (scale.double() * mean_q + (offset.double() - low))
        error = sum_hh - 2 * scale.double() * sum_qh + scale.double().square() * sum_qq + size * bias.square()
        return error.nan_to_num(nan=math.inf, posinf=math.inf)  # a pair that overflowed float16 loses

    scale = (sum_qh / torch.where(sum_qq > 0, sum_qq, 1.0)).half()
    # The offset is fitted to the rounded scale, so that rounding the scale leaves no bias.
    offset = (low + mean_h - scale.double() * mean_q).half()
    derived_scale, derived_offset = derived[0].half(), derived[1].half()
    fitted_error, derived_error = squared_error(scale, offset), squared_error(derived_scale, derived_offset)
    keep = fitted_error <= derived_error
    return (
        torch.where(keep, scale, derived_scale),
        torch.where(keep, offset, derived_offset),
        torch.where(keep, fitted_error, derived_error),
    )


def _blocks(num_outputs: int, num_inputs: int, group_size: int) -> Iterator[tuple[slice, slice, int]]:
    """Yields (rows, inputs, size): blocks of whole groups, then of the shorter last group where K leaves one."""
    num_whole = num_inputs // group_size * group_size
    for first, last, size in ((0, num_whole, group_size), (num_whole, num_inputs, num_inputs - num_whole)):
        if first == last:
            continue
        num_rows = max(1, _CHUNK_WEIGHTS // (last - first))
        for start in range(0, num_outputs, num_rows):
            yield slice(start, start + num_rows), slice(first, last), size


def check_format(group_size: int, bit_widths: tuple[int, ...]) -> None:
    """Raises InputError unless group size and widths are ones that can be stored."""
    if group_size not in GROUP_SIZES:
        raise InputError(f"group_size={group_size} is not supported; use one of {', '.join(map(str, GROUP_SIZES))}")
    try:
        check_bit_widths(bit_widths)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_width_weights(width_weights: tuple[float, ...], bit_widths: tuple[int, ...]) -> None:
    """Raises InputError unless there is one positive, finite number for each width."""
    if len(width_weights) != len(bit_widths) or not all(0 < value < math.inf for value in width_weights):
        raise InputError(
            f"width_weights={width_weights} must be one positive number for each of the widths {bit_widths}; "
            "leave them out for the default"
        )


def check_weight(weight: Tensor, name: str) -> None:
    """Raises InputError unless `weight` is a finite floating-point matrix."""
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise InputError(
            f"{name} is {weight.dtype} {list(weight.shape)} but must be a floating-point matrix [outputs, inputs]; "
            "leave it out of quantisation"
        )
    num_bad = int(weight.numel() - torch.isfinite(weight).sum())
    if num_bad:
        raise InputError(
            f"{name} has {num_bad} NaN or infinite values of {weight.numel()} but weights must be finite; "
            "repair or download the checkpoint again"
        )


def check_range(weight: Tensor, scale: Tensor, offset: Tensor, energy: Tensor, name: str) -> None:
    """Raises InputError if float16 could not hold the pairs of a weight.

    Args:
        weight: `[N, K]`.
        scale: Float16, any shape.
        offset: Float16, any shape.
        energy: `[2]`: squared error at 8 bits, squared weight.
        name: What the message calls the weight.
    """
    largest = float(weight.detach().abs().max())
    if not bool(torch.isfinite(scale).all() & torch.isfinite(offset).all()):
        raise InputError(
            f"{name} has values up to {largest:g} but float16 scales and offsets end at 65504; "
            "scale it down or leave it out of quantisation"
        )
    squared_error, squared_weight = energy.tolist()
    if squared_error > _MAX_RELATIVE_ERROR**2 * squared_weight:
        raise InputError(
            f"{name} has values of at most {largest:g} in size, too small for float16 scales (smallest 6e-8); "
            "scale it up or leave it out of quantisation"
        )
