"""Nested linears: the widths of a call are its argument, token by token, and nothing outlives the call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexquant_rl.engine import linear as linear_module
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import (
    REFERENCE_WIDTH,
    DenseCache,
    InFlightPlan,
    NestedLinear,
    WidthPlan,
    active_plan,
    dense_cache_bytes,
    reading,
)
from flexquant_rl.engine.quantisation.quantize import quantize_rtn
from flexquant_rl.kernels.reference import dequantize

NUM_OUTPUTS, NUM_INPUTS = 24, 40
MATRIX_BYTES = NUM_OUTPUTS * NUM_INPUTS * 4
STORED = (3, 4, 5, 6, 8)


def make_linear(
    seed: int = 0, *, unit_idx: int = 0, cache: DenseCache | None = None, bias: bool = True, reference: bool = True
) -> NestedLinear:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=generator)
    return NestedLinear(
        quantize_rtn(dense, group_size=32, bit_widths=STORED),
        torch.randn(NUM_OUTPUTS, generator=generator) if bias else None,
        unit_idx=unit_idx,
        cache=DenseCache(1 << 20) if cache is None else cache,
        reference_weight=dense if reference else None,
    )


def plan_of(*body_widths: list[int], head: list[int] | None = None) -> WidthPlan:
    """A plan from the widths of each token, one list per token."""
    return WidthPlan(torch.tensor(body_widths), None if head is None else torch.tensor(head), collect=False)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("bit_width", [REFERENCE_WIDTH, *STORED])
def test_one_width_equals_its_dense_matrix(bit_width: int, bias: bool) -> None:
    linear = make_linear(bias=bias)
    x = torch.randn(2, 3, NUM_INPUTS)
    matrix = linear.reference_weight if bit_width == 0 else dequantize(linear.weight, bit_width=bit_width)
    with reading(plan_of(*[[bit_width]] * 6)):
        assert torch.equal(linear(x), F.linear(x, matrix, linear.bias))


@settings(max_examples=30)
@given(
    widths=st.lists(
        st.lists(st.sampled_from([REFERENCE_WIDTH, *STORED]), min_size=3, max_size=3), min_size=1, max_size=4
    ),
    seed=st.integers(0, 1000),
)
def test_mixed_widths_equal_one_token_at_a_time(widths: list[list[int]], seed: int) -> None:
    linear = make_linear(seed)
    x = torch.randn(len(widths), 3, NUM_INPUTS, generator=torch.Generator().manual_seed(seed))
    with reading(plan_of(*[[width] for row in widths for width in row])):
        mixed = linear(x)
    assert mixed.shape == (len(widths), 3, NUM_OUTPUTS)
    for row, row_widths in enumerate(widths):
        for position, width in enumerate(row_widths):
            with reading(plan_of([width])):
                alone = linear(x[row, position])
            torch.testing.assert_close(mixed[row, position], alone)


def test_mixed_widths_write_every_output(poison_empty: None) -> None:
    linear = make_linear()
    with reading(plan_of([3], [8], [3], [0])):
        assert torch.isfinite(linear(torch.randn(1, 4, NUM_INPUTS))).all()


def test_rows_do_not_see_each_other() -> None:
    linear = make_linear()
    x = torch.randn(3, 1, NUM_INPUTS)
    other = x.clone()
    other[1] = float("nan")
    with reading(plan_of([3], [5], [3])):
        first, second = linear(x), linear(other)
    assert torch.equal(first[[0, 2]], second[[0, 2]])


def test_each_linear_reads_the_width_of_its_unit() -> None:
    linears = [make_linear(index, unit_idx=index) for index in range(3)]
    x = torch.randn(2, 1, NUM_INPUTS)
    with reading(plan_of([3, 8], [8, 3], head=[5, 5])):
        outputs = [linear(x) for linear in linears]
    for index, widths in enumerate([(3, 8), (8, 3), (5, 5)]):
        for row, width in enumerate(widths):
            expected = F.linear(x[row], linears[index].dense(width), linears[index].bias)
            torch.testing.assert_close(outputs[index][row], expected)


def test_call_outside_any_plan_reads_the_largest_width() -> None:
    linear = make_linear()
    x = torch.randn(2, NUM_INPUTS)
    assert torch.equal(linear(x), F.linear(x, linear.dense(8), linear.bias))


def test_plan_ends_with_its_block_even_after_an_exception() -> None:
    linear = make_linear()
    x = torch.randn(1, NUM_INPUTS)
    outer = plan_of([8])
    with reading(outer):
        with pytest.raises(ZeroDivisionError), reading(plan_of([3])):
            raise ZeroDivisionError
        assert active_plan() is outer
        assert torch.equal(linear(x), F.linear(x, linear.dense(8), linear.bias))
    assert active_plan() is None


def test_reference_width_without_reference_weights_raises() -> None:
    linear = make_linear(reference=False)
    with pytest.raises(InputError, match="width 0"), reading(plan_of([REFERENCE_WIDTH])):
        linear(torch.randn(1, NUM_INPUTS))
    assert active_plan() is None


def test_reference_weights_and_dense_copies_are_not_part_of_the_state() -> None:
    linear = make_linear()
    linear.dense(4)
    assert set(linear.state_dict()) == {"planes", "scale", "offset", "bias"}


@pytest.mark.parametrize(("gib", "expected"), [(1, 2), (12, 6), (23, 8), (512, 8)])
def test_the_cap_follows_the_memory(gib: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PHYS_PAGES": gib << 18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert dense_cache_bytes() == expected << 30


class TestDenseCache:
    def held(self, cache: DenseCache, linears: list[NestedLinear], bit_width: int = 4) -> list[bool]:
        """Which matrices come from the cache, told from fresh ones by identity."""
        return [(id(linear), bit_width) in cache._entries for linear in linears]

    def test_keeps_no_more_than_its_cap(self) -> None:
        cache = DenseCache(max_bytes=2 * MATRIX_BYTES)
        linears = [make_linear(seed, cache=cache) for seed in range(5)]
        for linear in linears:
            linear.dense(4)
            assert cache._bytes == sum(matrix.nbytes for matrix in cache._entries.values()) <= cache.max_bytes
        assert self.held(cache, linears) == [False, False, False, True, True]

    def test_drops_the_least_recently_used(self) -> None:
        cache = DenseCache(max_bytes=2 * MATRIX_BYTES)
        linears = [make_linear(seed, cache=cache) for seed in range(3)]
        first = linears[0].dense(4)
        linears[1].dense(4)
        assert linears[0].dense(4) is first, "held matrices are not made again"
        linears[2].dense(4)
        assert self.held(cache, linears) == [True, False, True]

    def test_steps_that_ask_for_one_matrix_too_many_find_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In turn and in one order, as decode steps do; then another working set takes the place of the first."""
        decoded: list[int] = []
        original = linear_module._decoded

        def counted(*args: Any) -> Tensor:
            decoded.append(1)
            return original(*args)

        monkeypatch.setattr(linear_module, "_decoded", counted)
        cache = DenseCache(max_bytes=6 * MATRIX_BYTES)

        def sweep(linears: list[NestedLinear]) -> int:
            decoded.clear()
            for linear in linears:
                assert torch.equal(linear.dense(4), dequantize(linear.weight, bit_width=4))
                assert cache._bytes == sum(matrix.nbytes for matrix in cache._entries.values()) <= cache.max_bytes
            return len(decoded)

        linears = [make_linear(seed, cache=cache) for seed in range(7)]
        assert sweep(linears) == 7
        assert [sweep(linears) for _ in range(4)] == [2, 1, 1, 1], "the least recently used gone, it would be 7"
        others = [make_linear(seed, cache=cache) for seed in range(10, 15)]
        assert [sweep(others) for _ in range(2)] == [5, 0]

    def test_what_is_out_of_use_goes_first(self) -> None:
        """Also for a matrix that was here before: a working set that fits is whole again after two sweeps."""
        cache = DenseCache(max_bytes=3 * MATRIX_BYTES)
        linears = [make_linear(seed, cache=cache) for seed in range(6)]
        first, second = linears[:3], linears[3:]
        for _ in range(2):
            for several in (first, second):
                for linear in (*several, *several):
                    linear.dense(4)
                assert self.held(cache, several) == [True] * 3

    def test_always_keeps_the_last_one(self) -> None:
        cache = DenseCache(max_bytes=0)
        linears = [make_linear(seed, cache=cache) for seed in range(2)]
        for linear in linears:
            assert linear.dense(4) is linear.dense(4)
        assert self.held(cache, linears) == [False, True]

    def test_widths_have_entries_of_their_own(self) -> None:
        linear = make_linear()
        matrices: list[Tensor] = [linear.dense(bit_width) for bit_width in STORED]
        for bit_width, matrix in zip(STORED, matrices, strict=True):
            assert linear.dense(bit_width) is matrix
            assert torch.equal(matrix, dequantize(linear.weight, bit_width=bit_width))

    def test_a_kernel_decodes_where_there_is_one(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        linear = make_linear().to(device)
        expected = {bit_width: dequantize(linear.weight, bit_width=bit_width) for bit_width in range(2, 9)}
        monkeypatch.setattr("flexquant_rl.engine.linear._has_kernel", lambda device: True)
        assert torch.equal(linear.dense(2), expected[2]), "below the stored widths the kernel does not go"
        monkeypatch.setattr("flexquant_rl.engine.linear.reference", None)
        for bit_width in range(3, 9):
            matrix = linear.dense(bit_width)
            assert (matrix.dtype, matrix.is_contiguous()) == (torch.float32, True)
            torch.testing.assert_close(matrix, expected[bit_width], rtol=1e-6, atol=1e-6)

    def test_moving_or_copying_a_linear_forgets(self) -> None:
        linear = make_linear()
        before = linear.dense(4)
        twin = copy.deepcopy(linear)
        assert twin.cache is not linear.cache
        assert linear.dense(4) is before
        linear.to("cpu")
        assert linear.dense(4) is not before
        assert torch.equal(linear.dense(4), twin.dense(4))

    def test_clear_forgets(self) -> None:
        cache = DenseCache(1 << 20)
        linear = make_linear(cache=cache)
        before = linear.dense(4)
        cache.clear()
        assert cache._bytes == 0
        after = linear.dense(4)
        assert after is not before
        assert torch.equal(after, before)


def test_widths_in_flight_are_asked_for_once_a_unit() -> None:
    cache = DenseCache(1 << 20)
    first, second = (make_linear(seed, cache=cache) for seed in (0, 1))
    other = make_linear(2, unit_idx=1, cache=cache)
    x = torch.randn(2, 3, NUM_INPUTS, generator=torch.Generator().manual_seed(0))
    asked: list[tuple[int, Tensor]] = []

    def choose(unit_idx: int, inputs: Tensor) -> Tensor:
        asked.append((unit_idx, inputs))
        return torch.where(inputs[:, 0] > 0, 6, 3)

    with reading(InFlightPlan(choose)):
        outputs = [linear(x) for linear in (first, second, other)]
    assert [unit_idx for unit_idx, _ in asked] == [0, 1]
    assert all(torch.equal(inputs, x.flatten(0, 1)) for _, inputs in asked)
    widths = torch.where(x[..., 0].flatten() > 0, 6, 3)
    assert len(widths.unique()) == 2
    with reading(WidthPlan(widths[:, None].repeat(1, 2), None, collect=0)):
        assert all(torch.equal(out, linear(x)) for out, linear in zip(outputs, (first, second, other), strict=True))
