"""GPTQ for nested weights against plain GPTQ from first principles, brute force, least squares and round to nearest."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation import gptq
from flexquant_rl.engine.quantisation.gptq import quantize_gptq
from flexquant_rl.engine.quantisation.quantize import quantize_rtn
from flexquant_rl.engine.quantisation.refit import damped_hessian, refit_pairs
from flexquant_rl.kernels.bitplane import NestedWeight, derive_scale_and_offset, unpack_codes
from flexquant_rl.kernels.reference import dequantize

BIT_WIDTHS = (3, 4, 5, 6, 8)
ALL_WIDTHS = tuple(range(1, 9))

pytestmark = pytest.mark.usefixtures("poison_empty")


def student_t(num_outputs: int, num_inputs: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(6, (num_outputs, num_inputs))).float() * 0.02


def correlated(num_inputs: int, seed: int = 0) -> Tensor:
    """Second moments of inputs that share a few strong directions, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_inputs, max(1, num_inputs // 4), generator=generator, dtype=torch.float64)
    return mixing @ mixing.T / mixing.shape[1] + 0.3 * torch.eye(num_inputs, dtype=torch.float64)


def output_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    error = weight.double() - decoded.double()
    return float(((error @ hessian.double()) * error).sum())


def errors_by_width(weight: Tensor, nested: NestedWeight, hessian: Tensor) -> dict[int, float]:
    return {b: output_error(weight, dequantize(nested, bit_width=b), hessian) for b in nested.bit_widths}


def codes_of(nested: NestedWeight, bit_width: int = 8) -> Tensor:
    return unpack_codes(nested.planes, bit_width=bit_width, num_inputs=nested.num_inputs)


# Against round to nearest


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("num_inputs", "group_size"), [(256, 128), (172, 64), (96, 32), (33, 32)])
def test_error_is_lower_than_of_round_to_nearest_at_every_width(num_inputs: int, group_size: int, seed: int) -> None:
    weight, hessian = student_t(48, num_inputs, seed), correlated(num_inputs, seed)
    rounded = errors_by_width(weight, quantize_rtn(weight, group_size=group_size), hessian)
    fitted = errors_by_width(weight, quantize_gptq(weight, hessian, group_size=group_size), hessian)
    assert all(fitted[b] < 0.75 * rounded[b] for b in (3, 4, 5, 6)), (fitted, rounded)
    assert fitted[8] < 3 * rounded[8], "the widest width must not pay much for the others"


def test_error_falls_with_every_width() -> None:
    weight, hessian = student_t(32, 256), correlated(256)
    errors = errors_by_width(weight, quantize_gptq(weight, hessian, bit_widths=ALL_WIDTHS), hessian)
    assert all(wider < 0.8 * narrower for narrower, wider in pairwise(errors.values()))


@pytest.mark.parametrize("group_size", [32, 128])
def test_inputs_without_correlation_give_about_round_to_nearest(group_size: int) -> None:
    weight, identity = student_t(64, 256), torch.eye(256)
    rounded = errors_by_width(weight, quantize_rtn(weight, group_size=group_size), identity)
    fitted = errors_by_width(weight, quantize_gptq(weight, identity, group_size=group_size), identity)
    for bit_width in BIT_WIDTHS:
        assert 0.85 * rounded[bit_width] < fitted[bit_width] < 1.05 * rounded[bit_width], bit_width


def test_larger_weight_of_a_width_lowers_its_error() -> None:
    weight, hessian = student_t(32, 96), correlated(96)
    errors = [
        errors_by_width(weight, quantize_gptq(weight, hessian, bit_widths=(4, 8), width_weights=pair), hessian)
        for pair in ((1.0, 1.0), (1.0, 100.0), (1.0, 10_000.0))
    ]
    assert all(narrow[4] < wide[4] and narrow[8] > wide[8] for narrow, wide in pairwise(errors))


# Against plain GPTQ


def plain_gptq(weight: np.ndarray, hessian: np.ndarray, group_size: int, bit_width: int) -> np.ndarray:
    """GPTQ at one width without a factorisation: after each input, what is best for all inputs left is solved for.

    Codes of `weight [N, K]`. Grids as the product fits them: codes by the range of the group, a weighted line through
    them, float16.
    """
    num_outputs, num_inputs = weight.shape
    codes = np.zeros(weight.shape, dtype=np.int64)
    for row in range(num_outputs):
        decoded = np.zeros(num_inputs)
        for j in range(num_inputs):
            done, left = slice(0, j), slice(j, num_inputs)
            error = weight[row, done] - decoded[done]
            target = weight[row, left] + np.linalg.solve(hessian[left, left], hessian[left, done] @ error)
            if j % group_size == 0:
                size = min(group_size, num_inputs - j)
                values = target[:size]
                cost = [1 / np.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + size)]
                span = values.max() - values.min()
                cells = np.minimum(np.floor((values - values.min()) / span * 256), 255) // 2 ** (8 - bit_width)
                root = np.sqrt(cost)
                design = np.stack((cells, np.ones(size)), axis=1)
                (slope, _), *_ = np.linalg.lstsq(design * root[:, None], values * root, rcond=None)
                scale = np.float64(np.float16(slope))
                offset = np.float64(np.float16(np.average(values - scale * cells, weights=cost)))
                grid = scale * (np.arange(256) // 2 ** (8 - bit_width)) + offset
            codes[row, j] = np.abs(grid - target[0]).argmin()
            decoded[j] = grid[codes[row, j]]
    return codes


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("num_inputs", "group_size"), [(24, 32), (80, 32), (72, 64)])
def test_one_stored_width_is_plain_gptq(num_inputs: int, group_size: int, seed: int) -> None:
    weight, hessian = student_t(3, num_inputs, seed).double(), correlated(num_inputs, seed)
    nested = quantize_gptq(weight, hessian, group_size=group_size, bit_widths=(8,), num_sweeps=0)
    expected = plain_gptq(weight.numpy(), damped_hessian(hessian, num_inputs, "").numpy(), group_size, 8)
    np.testing.assert_array_equal(codes_of(nested).numpy(), expected)


def test_one_width_that_outweighs_the_others_is_plain_gptq_too() -> None:
    weight, hessian = student_t(3, 40).double(), correlated(40)
    nested = quantize_gptq(weight, hessian, group_size=32, bit_widths=(4, 8), width_weights=(1.0, 1e-12), num_sweeps=0)
    expected = plain_gptq(weight.numpy(), damped_hessian(hessian, 40, "").numpy(), 32, 4)
    np.testing.assert_array_equal(codes_of(nested, 4).numpy(), expected >> 4)


# The search for a code, and the sweeps


@settings(max_examples=40)
@given(
    bit_widths=st.sampled_from([(8,), (4, 8), (3, 4, 8), BIT_WIDTHS, ALL_WIDTHS]),
    disagreement=st.sampled_from((0.0, 0.5, 2.0)),
    seed=st.integers(0, 2**31),
)
def test_code_is_the_best_of_all_256(bit_widths: tuple[int, ...], disagreement: float, seed: int) -> None:
    """For targets that differ between widths by up to so many of their own steps, near and beyond both ends."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_widths = 64, len(bit_widths)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    per_cell = torch.tensor([2.0 ** (8 - b) for b in bit_widths], dtype=torch.float64)[:, None]
    scale = 0.01 * per_cell * (1 + 0.02 * noise(num_widths, num_rows))
    offset = 0.005 * per_cell - 1.28 + 0.002 * noise(num_widths, num_rows)
    importance = torch.tensor([2.0**b for b in bit_widths], dtype=torch.float64)
    grid = gptq.Grid(scale, offset, bit_widths, importance / importance.sum())
    targets = 1.4 * noise(num_rows) + disagreement * 0.01 * per_cell * (
        torch.rand(num_widths, num_rows, generator=generator, dtype=torch.float64) - 0.5
    )
    codes = torch.arange(256)[:, None].expand(256, num_rows)
    shifted = torch.stack([codes >> (8 - b) for b in bit_widths])  # [V, 256, n]
    decoded = scale[:, None] * shifted + offset[:, None]
    cost = ((targets[:, None] - decoded).square() * importance[:, None, None]).sum(0)
    found = grid.nearest(targets)
    assert bool(((found >= 0) & (found <= 255) & (found == found.round())).all())
    torch.testing.assert_close(grid.decode(found), decoded.gather(1, found.long().expand(num_widths, 1, -1))[:, 0])
    found_cost = cost.gather(0, found.long()[None])[0]
    assert bool((found_cost <= cost.amin(0) * (1 + 1e-9) + 1e-15).all())


@pytest.mark.parametrize("bit_widths", [(8,), (4, 8), BIT_WIDTHS])
def test_no_sweep_raises_the_objective(bit_widths: tuple[int, ...]) -> None:
    weight = student_t(16, 172).double()
    damped = damped_hessian(correlated(172), 172, "")
    importance = gptq._importance(bit_widths, None, weight)
    problem = gptq._Problem(damped, gptq._inverse_factor(damped), importance)
    chunk, at_once = (gptq._Chunk(weight, problem, bit_widths, 64) for _ in range(2))

    def objective() -> float:
        decoded = torch.stack([chunk.grids[k // 64].decode(chunk.codes[k]) for k in range(172)], dim=-1)  # [V, n, K]
        return sum(
            float(share) * output_error(weight, values, damped)
            for share, values in zip(importance, decoded, strict=True)
        )

    chunk.feed_back()
    values = [objective()]
    for _ in range(4):
        chunk.descend(1)
        values.append(objective())
    at_once.feed_back()
    at_once.descend(4)  # what is left over from a sweep serves the next
    assert torch.equal(at_once.codes, chunk.codes)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(values))
    assert values[-1] < 0.95 * values[0]


# The refit


def quadratic_optimum(weight: Tensor, codes: Tensor, hessian: Tensor, group_size: int) -> float:
    """The least error that pairs of all groups together can have, one row, in float64."""
    root = torch.linalg.cholesky(hessian).T.numpy()
    num_inputs = len(weight)
    members = np.eye(-(-num_inputs // group_size))[np.arange(num_inputs) // group_size]
    design = root @ np.concatenate((members * codes.numpy()[:, None], members), axis=1)
    target = root @ weight.double().numpy()
    best, *_ = np.linalg.lstsq(design, target, rcond=None)
    return float(np.square(target - design @ best).sum())


@pytest.mark.parametrize(("num_inputs", "group_size"), [(64, 64), (128, 64), (172, 64), (96, 32)])
def test_refitted_pairs_are_least_squares(num_inputs: int, group_size: int) -> None:
    weight = student_t(4, num_inputs)
    hessian = damped_hessian(correlated(num_inputs), num_inputs, "")
    nested = quantize_rtn(weight, group_size=group_size)
    groups = -(-num_inputs // group_size)
    codes = codes_of(nested)
    scale, offset = refit_pairs(
        weight,
        codes,
        nested.scale[..., :groups],
        nested.offset[..., :groups],
        hessian,
        bit_widths=BIT_WIDTHS,
        group_size=group_size,
    )
    group = torch.arange(num_inputs) // group_size
    for width_idx, bit_width in enumerate(BIT_WIDTHS):
        shifted = codes >> (8 - bit_width)
        decoded = scale[width_idx].double()[:, group] * shifted + offset[width_idx].double()[:, group]
        for row in range(4):
            optimum = quadratic_optimum(weight[row], shifted[row], hessian, group_size)
            error = output_error(weight[row : row + 1], decoded[row : row + 1], hessian)
            # Float16 rounds an offset of a few hundredths to 1e-5, a tenth of the finest step.
            assert optimum * (1 - 1e-9) <= error <= optimum * (1.03 if bit_width < 8 else 1.15), (bit_width, row)


@settings(max_examples=25)
@given(num_inputs=st.integers(1, 140), seed=st.integers(0, 2**31), mean=st.sampled_from((0.0, 3.0)))
@example(num_inputs=1, seed=3, mean=0.0)  # an error of nearly nothing, which float32 cannot tell from a smaller one
@example(num_inputs=1, seed=11152415, mean=0.0)  # a pair that was given hits a single weight by chance
def test_refit_is_never_worse_than_the_pairs_given_or_derived(num_inputs: int, seed: int, mean: float) -> None:
    """Whatever the codes are: these are random."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, num_inputs, generator=generator) * 0.02 + mean
    hessian = damped_hessian(correlated(num_inputs, seed % 1000), num_inputs, "")
    codes = torch.randint(0, 256, (5, num_inputs), generator=generator, dtype=torch.uint8)
    groups = -(-num_inputs // 32)
    scale = torch.rand(3, 5, groups, generator=generator).half() * 0.01
    offset = (mean + torch.randn(3, 5, groups, generator=generator) * 0.02).half()
    widths = (3, 5, 8)
    new_scale, new_offset = refit_pairs(weight, codes, scale, offset, hessian, bit_widths=widths, group_size=32)
    group = torch.arange(num_inputs) // 32

    def row_errors(pair: tuple[Tensor, Tensor], bit_width: int) -> Tensor:
        decoded = pair[0].double()[:, group] * (codes >> (8 - bit_width)) + pair[1].double()[:, group]
        error = weight.double() - decoded
        return ((error @ hessian) * error).sum(1)

    # Pairs are float16: an error of three thousandths of the weights, squared, is what they can hold.
    rounding = 1e-5 * ((weight.double() @ hessian) * weight).sum(1)
    for width_idx, bit_width in enumerate(widths):
        found = row_errors((new_scale[width_idx], new_offset[width_idx]), bit_width)
        derived = derive_scale_and_offset(new_scale[-1].double(), new_offset[-1].double(), bit_width=bit_width)
        for start in ((scale[width_idx], offset[width_idx]), (derived[0].half(), derived[1].half())):
            assert bool((found <= row_errors(start, bit_width) + rounding).all())
    assert bool((new_scale >= 0).all())


@pytest.mark.parametrize("num_inputs", [33, 172, 256])
def test_calibrated_round_to_nearest_keeps_codes_and_lowers_the_error(num_inputs: int) -> None:
    weight, hessian = student_t(24, num_inputs), correlated(num_inputs)
    plain = quantize_rtn(weight, group_size=64)
    fitted = quantize_rtn(weight, group_size=64, hessian=hessian)
    assert torch.equal(fitted.planes, plain.planes)
    damped = damped_hessian(hessian, num_inputs, "")
    before, after = errors_by_width(weight, plain, damped), errors_by_width(weight, fitted, damped)
    assert all(after[b] < before[b] for b in BIT_WIDTHS)


# Inputs that say nothing, odd shapes, other dtypes


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    weight, hessian = student_t(8, 128), correlated(128)
    dead = torch.arange(128) % 5 == 0
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    nested = quantize_gptq(weight, hessian)
    for bit_width in BIT_WIDTHS:
        step = nested.scale_and_offset(bit_width)[0]
        distance = (weight - dequantize(nested, bit_width=bit_width)).abs()[:, dead]
        # Half a step of the grid; live inputs, fitted around them, may stretch it and move it.
        assert float((distance / step).quantile(0.9)) < 1.5, bit_width
    alive = ~dead
    rounded = errors_by_width(weight, quantize_rtn(weight), hessian)
    assert all(errors_by_width(weight, nested, hessian)[b] < 0.7 * rounded[b] for b in (3, 4, 5, 6)), alive.sum()


def test_without_any_input_the_result_is_that_of_uncorrelated_ones() -> None:
    weight = student_t(8, 172)
    silent, plain = quantize_gptq(weight, torch.zeros(172, 172)), quantize_gptq(weight, torch.eye(172) / 1.01)
    errors, expected = (errors_by_width(weight, nested, torch.eye(172)) for nested in (silent, plain))
    assert list(errors.values()) == pytest.approx(list(expected.values()), rel=0.01)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 1), (2, 33), (3, 64), (4, 172)])
def test_shapes_and_padding(num_outputs: int, num_inputs: int, group_size: int) -> None:
    weight = student_t(num_outputs, num_inputs) + 5  # far from zero: padding in a range or a fit would be seen
    nested = quantize_gptq(weight, correlated(num_inputs), group_size=group_size)
    assert (nested.num_outputs, nested.num_inputs, nested.group_size) == (num_outputs, num_inputs, group_size)
    assert not unpack_codes(nested.planes, bit_width=8, num_inputs=nested.num_padded_inputs)[:, num_inputs:].any()
    used = -(-num_inputs // group_size)
    assert not nested.scale[..., used:].any()
    assert not nested.offset[..., used:].any()
    for bit_width in ALL_WIDTHS:
        assert float((dequantize(nested, bit_width=bit_width) - weight).abs().max()) < 0.2


def test_rows_and_chunks_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = student_t(13, 80).double(), correlated(80)
    whole = quantize_gptq(weight, hessian, group_size=64)
    monkeypatch.setattr(gptq, "_CHUNK_NUMBERS", 5 * 80 * 4)
    monkeypatch.setattr("flexquant_rl.engine.quantisation.refit._CHUNK_NUMBERS", 600)
    chunked = quantize_gptq(weight, hessian, group_size=64)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    permuted = quantize_gptq(weight[order], hessian, group_size=64)
    for field in ("planes", "scale", "offset"):
        assert torch.equal(getattr(chunked, field), getattr(whole, field))
        assert torch.equal(getattr(permuted, field), getattr(whole, field)[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_dtype_and_strides(dtype: torch.dtype) -> None:
    weight, hessian = student_t(8, 100).to(dtype), correlated(100)
    parameter = torch.nn.Parameter(weight.t().contiguous()).t()
    nested = quantize_gptq(parameter, hessian.float(), group_size=64)
    expected = errors_by_width(weight, quantize_gptq(weight.double(), hessian, group_size=64), hessian)
    found = errors_by_width(weight, nested, hessian)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=0.05)
    assert not nested.scale.requires_grad


@pytest.mark.parametrize("value", [0.0, -0.75, 60000.0])
def test_constant_groups_decode_to_their_value(value: float) -> None:
    weight = student_t(4, 140)
    weight[2, :128] = value
    weight[3] = value
    nested = quantize_gptq(weight[3:], correlated(140))
    for bit_width in ALL_WIDTHS:
        assert bool((dequantize(nested, bit_width=bit_width) == torch.tensor(value).half()).all())
    if abs(value) < 1:
        among_others = quantize_gptq(weight, correlated(140))
        assert bool(dequantize(among_others, bit_width=3).isfinite().all())


# Refusals


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weight, hessian: weight.__setitem__((1, 2), float("nan")), "up_proj has 1 NaN or infinite values"),
        (lambda weight, hessian: hessian.__setitem__((1, 2), float("inf")), "up_proj gets NaN or infinite inputs"),
        (lambda weight, hessian: weight.mul_(1e7), "up_proj has values up to .* 65504; scale it down"),
        (lambda weight, hessian: weight.mul_(1e-8), "up_proj has .* too small for float16 scales .*; scale it up"),
    ],
)
def test_what_cannot_be_quantised_is_refused(spoil: Callable[[Tensor, Tensor], object], message: str) -> None:
    weight, hessian = student_t(4, 96), correlated(96)
    spoil(weight, hessian)
    with pytest.raises(InputError, match=message) as caught:
        quantize_gptq(weight, hessian, name="up_proj")
    assert "\n" not in str(caught.value)


def test_options_are_checked() -> None:
    weight, hessian = student_t(4, 96), correlated(96)
    with pytest.raises(InputError, match="group_size=100 is not supported"):
        quantize_gptq(weight, hessian, group_size=100)
    with pytest.raises(InputError, match="weight has 96 inputs, but their second moments are \\[95, 95\\]"):
        quantize_gptq(weight, hessian[1:, 1:])
    for bad in ((1.0,), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(InputError, match="must be one positive number for each of the widths"):
            quantize_gptq(weight, hessian, bit_widths=(4, 8), width_weights=bad)
