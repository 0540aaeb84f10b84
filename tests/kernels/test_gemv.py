"""The Triton product against integer sums in float64; on a GPU where there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flexquant_rl.kernels import reference_ops
from flexquant_rl.kernels.activations import MODES, ActivationMode, PackedActivations, pack_activations
from flexquant_rl.kernels.gemv import MAX_TOKENS, Tile, gemv, segment_map
from flexquant_rl.kernels.plane_merge import width_table
from flexquant_rl.kernels.reference import bitplane_gemv

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")

# Float32 sums of a few hundred products keep six digits; a wrong bit, scale or input shows in the first three.
TOLERANCE = 2e-6
SMALL = Tile(rows=4, words=32, num_warps=1)


def widths_on(device: torch.device, *widths: int) -> torch.Tensor:
    return torch.tensor(widths, dtype=torch.int32, device=device)


def check(y: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Relative root mean square and relative maximum."""
    error = y.double() - expected
    assert error.norm() <= tolerance * expected.norm()
    assert error.abs().max() <= 5 * tolerance * expected.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_inputs", "group_size", "widths"),
    [
        (1, 5, 33, 32, (3, 4, 6)),
        (1, 4, 128, 128, (7, 8)),
        (3, 6, 172, 64, (3, 5)),
        (2, 3, 1152, 128, (4, 8)),
        (8, 2, 64, 32, (4, 5)),
    ],
)
def test_matches_the_reference(
    random_weight: Callable,
    random_activations: Callable,
    device: torch.device,
    num_tokens: int,
    num_outputs: int,
    num_inputs: int,
    group_size: int,
    widths: tuple[int, ...],
    mode: ActivationMode,
) -> None:
    weight = random_weight(num_outputs, num_inputs, group_size)
    x = pack_activations(random_activations(num_tokens, num_inputs), mode=mode)
    for width in widths:
        y = gemv(x, weight, widths_on(device, width), tile=SMALL)
        assert y.dtype == torch.float32
        row_widths = torch.full((num_outputs,), width, device=device)
        check(y, reference_ops.gemv(x, weight, row_widths))


@pytest.mark.parametrize("bit_width", [3, 4, 6, 7])
def test_the_reference_is_the_one_of_the_other_backends(
    random_weight: Callable, random_activations: Callable, device: torch.device, bit_width: int
) -> None:
    weight, x = random_weight(5, 172, 64), random_activations(2, 172)
    row_widths = torch.full((5,), bit_width, device=device)
    packed = reference_ops.pack_activations(x, mode="float")
    check(bitplane_gemv(x, weight, bit_width=bit_width), reference_ops.gemv(packed, weight, row_widths))
    rounded = reference_ops.unpack_activations(reference_ops.pack_activations(x))[:, :172]
    int8 = reference_ops.gemv(reference_ops.pack_activations(x), weight, row_widths)
    check(bitplane_gemv(rounded, weight, bit_width=bit_width), int8)


@pytest.mark.parametrize("bit_width", [3, 4, 6])
def test_reads_only_what_the_width_needs(
    random_weight: Callable,
    random_activations: Callable,
    poison_unread: Callable,
    device: torch.device,
    bit_width: int,
) -> None:
    weight = random_weight(4, 172, 64)
    x = pack_activations(random_activations(1, 172))
    widths = widths_on(device, bit_width)
    y = gemv(x, weight, widths)
    assert torch.isfinite(y).all()
    assert torch.equal(gemv(x, poison_unread(weight, bit_width), widths), y)


@pytest.mark.parametrize(("given", "clamped"), [(-5, 4), (0, 4), (3, 4), (9, 8), (100, 8)])
def test_the_width_is_clamped_to_the_stored_range(
    random_weight: Callable, random_activations: Callable, device: torch.device, given: int, clamped: int
) -> None:
    weight = random_weight(4, 64, 64, bit_widths=(4, 8))
    x = pack_activations(random_activations(1, 64))
    assert torch.equal(gemv(x, weight, widths_on(device, given)), gemv(x, weight, widths_on(device, clamped)))


@pytest.mark.parametrize("bit_widths", [(8,), (1, 8), (2, 3, 8)])
def test_any_set_of_stored_widths(
    random_weight: Callable, random_activations: Callable, device: torch.device, bit_widths: tuple[int, ...]
) -> None:
    weight = random_weight(4, 64, 64, bit_widths=bit_widths)
    x = pack_activations(random_activations(1, 64))
    for width in (1, 2, 3, 8):
        expected = reference_ops.gemv(x, weight, torch.full((4,), width, device=device))
        check(gemv(x, weight, widths_on(device, width)), expected)


def test_segments_have_widths_of_their_own(
    random_weight: Callable, random_activations: Callable, device: torch.device
) -> None:
    weight = random_weight(10, 64, 32)
    x = pack_activations(random_activations(1, 64))
    widths = widths_on(device, 8, 3, 5, 4)
    segments = segment_map([4, 4, 2], [2, 1, 3], device=device)
    row_widths = torch.tensor([5] * 4 + [3] * 4 + [4] * 2, device=device)
    for rows in (2, 4):
        y = gemv(x, weight, widths, segments=segments, tile=Tile(rows, 32, 1))
        check(y, reference_ops.gemv(x, weight, row_widths))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_bias_residual_and_output_type(
    random_weight: Callable, random_activations: Callable, device: torch.device, dtype: torch.dtype, tolerance: float
) -> None:
    weight = random_weight(5, 64, 32)
    x = pack_activations(random_activations(2, 64))
    bias, residual = torch.randn(5, device=device), torch.randn(2, 5, device=device).to(dtype)
    expected = reference_ops.gemv(x, weight, torch.full((5,), 4, device=device), bias=bias, residual=residual)
    out = residual.clone()
    returned = gemv(x, weight, widths_on(device, 4), bias=bias, residual=out, out=out)
    assert returned is out
    check(out, expected, tolerance)


@pytest.mark.parametrize(
    ("num_tokens", "num_inputs", "group_size"), [(3, 64, 64), (8, 1152, 128), (5, 172, 32), (16, 64, 32)]
)
def test_tokens_do_not_see_each_other(
    random_weight: Callable,
    random_activations: Callable,
    device: torch.device,
    num_tokens: int,
    num_inputs: int,
    group_size: int,
) -> None:
    weight, x = random_weight(4, num_inputs, group_size), random_activations(num_tokens, num_inputs)
    together = gemv(pack_activations(x), weight, widths_on(device, 5))
    for token in range(num_tokens):
        alone = gemv(pack_activations(x[token : token + 1]), weight, widths_on(device, 5))
        assert torch.equal(alone[0], together[token])


def test_non_finite_activations_poison_their_own_token_only(
    random_weight: Callable, random_activations: Callable, device: torch.device
) -> None:
    weight, x = random_weight(4, 64, 64), random_activations(3, 64)
    x[0, 3], x[1, 40] = torch.nan, torch.inf
    y = gemv(pack_activations(x), weight, widths_on(device, 5))
    assert torch.isnan(y[:2]).all()
    assert torch.isfinite(y[2]).all()


def test_width_table() -> None:
    assert width_table((3, 4, 5, 6, 8)) == 0x4F3210FFF


def test_segment_map() -> None:
    assert segment_map([8, 4, 3], [0, 2, 1], device="cpu").tolist() == [0, 0, 2, 1]
    for rows, units, message in (
        ([6, 4], [0, 1], "a segment has 6 rows"),
        ([8], [0, 1], "1 segments but 2 units"),
        ([8], [-1], "unit -1 is negative"),
    ):
        with pytest.raises(ValueError, match=message):
            segment_map(rows, units, device="cpu")


def test_bad_arguments(random_weight: Callable, random_activations: Callable, device: torch.device) -> None:
    weight = random_weight(8, 64, 64)
    x, widths = pack_activations(random_activations(1, 64)), widths_on(device, 4)

    def on(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    many = PackedActivations.allocate(MAX_TOKENS + 1, 64, device=device)
    wrong: list[tuple[str, dict]] = [
        ("hold 64 inputs but 96", {"weight": random_weight(8, 96, 32)}),
        ("17 tokens were given but the kernel takes 1 to 16", {"x": many}),
        ("bit_widths is torch.int64", {"bit_widths": widths.long()}),
        ("bit_widths is empty", {"bit_widths": widths[:0]}),
        ("segments is torch.int32 \\[3\\]; pass int32 \\[2\\]", {"segments": on(3, dtype=torch.int32)}),
        ("bias is torch.float32 \\[7\\]", {"bias": on(7)}),
        ("residual is torch.float64", {"residual": on(1, 8, dtype=torch.float64)}),
        ("out has strides", {"out": on(1, 16)[:, ::2]}),
        ("planes does not start at a multiple of 16", {"weight": shifted(weight)}),
        ("scale is torch.float32 \\[1, 2\\]", {"x": replace(x, scale=on(1, 2))}),
        ("does not fit: rows must divide 4", {"tile": Tile(3, 32, 1)}),
        ("a plane of the weight has 2147483648 words", {"weight": huge(weight)}),
    ]
    for message, changed in wrong:
        with pytest.raises(ValueError, match=message):
            gemv(**{"x": x, "weight": weight, "bit_widths": widths, **changed})


def huge(weight):
    """As many outputs as make a plane of 2^31 words; all are the first one."""
    rows = 2**31 // weight.planes.shape[2]
    parts = {name: getattr(weight, name)[:, :1].expand(-1, rows, -1) for name in ("planes", "scale", "offset")}
    return replace(weight, **parts)


def shifted(weight):
    """The same weight with planes that start 4 bytes later."""
    buffer = weight.planes.new_zeros(weight.planes.numel() + 1)
    return replace(weight, planes=buffer[1:].view_as(weight.planes))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_inputs"), [(1, 6144, 4096), (5, 512, 14336), (8, 1024, 2048), (16, 512, 4096)]
)
def test_real_shapes_on_a_gpu(
    random_weight: Callable,
    random_activations: Callable,
    device: torch.device,
    num_tokens: int,
    num_outputs: int,
    num_inputs: int,
    mode: ActivationMode,
) -> None:
    if mode == "float" and num_tokens > 8:
        pytest.skip("the compiler takes minutes for so many tokens in the mode of reference")
    weight = random_weight(num_outputs, num_inputs, 128)
    x = pack_activations(random_activations(num_tokens, num_inputs, dtype=torch.float16), mode=mode)
    for width in range(3, 9):
        y = gemv(x, weight, widths_on(device, width))
        check(y, reference_ops.gemv(x, weight, torch.full((num_outputs,), width, device=device)), 5e-6)
        assert torch.equal(y, gemv(x, weight, widths_on(device, width)))  # the same bits in every run


@pytest.mark.gpu
def test_a_captured_graph_follows_the_widths(
    random_weight: Callable, random_activations: Callable, device: torch.device
) -> None:
    weight = random_weight(1024, 2048, 128)
    x = pack_activations(random_activations(1, 2048))
    widths, out = widths_on(device, 8), torch.empty(1, 1024, device=device)
    gemv(x, weight, widths, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            gemv(x, weight, widths, out=out)
        for width in (3, 8, 4, 5):
            widths.fill_(width)
            graph.replay()
            assert torch.equal(out, gemv(x, weight, widths_on_device(widths, width)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def widths_on_device(like: torch.Tensor, width: int) -> torch.Tensor:
    """A width tensor made on the device, without a copy from the host."""
    return torch.full_like(like, width)
