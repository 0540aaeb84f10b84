"""Attention over a static cache against a plain softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.attention import AttentionParts, attend
from flexquant_rl.kernels.reference_ops import unpack_activations
from flexquant_rl.kernels.reference_step import attend as reference

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")


def make_case(
    device: torch.device, num_tokens: int, heads: tuple[int, int], head_dim: int, places: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(places + head_dim)
    queries = torch.randn(num_tokens, heads[0], head_dim, generator=generator)
    cache = torch.randn(2, num_tokens, heads[1], places, head_dim, generator=generator)
    keys, values = cache.to(device, dtype)
    return queries.to(device, dtype), keys, values


def check(
    device: torch.device,
    positions: list[int],
    *,
    num_tokens: int = 1,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    places: int = 200,
    dtype: torch.dtype = torch.float32,
    mode: str = "float",
    places_per_part: int | None = None,
    tolerance: float = 2e-6,
) -> None:
    queries, keys, values = make_case(device, num_tokens, heads, head_dim, places, dtype)
    at = torch.tensor(positions, device=device)
    for row, position in enumerate(positions):  # beyond a row's own place nothing may be looked at
        keys[row, :, position + 1 :] = torch.nan
        values[row, :, position + 1 :] = torch.nan
    parts = AttentionParts.allocate(
        num_tokens, heads[0], head_dim, places, device=device, places_per_part=places_per_part
    )
    packed = attend(queries, keys, values, at, scale=0.3, mode=mode, parts=parts)  # type: ignore[arg-type]
    expected = reference(queries, keys, values, at, scale=0.3).cpu()
    actual = unpack_activations(packed).cpu()
    num_inputs = heads[0] * head_dim
    assert bool((actual[:, num_inputs:] == 0).all())
    bound = tolerance if mode == "float" else float(expected.abs().max()) / 200
    torch.testing.assert_close(actual[:, :num_inputs], expected.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("position", [0, 1, 63, 64, 130, 199])
def test_matches_a_softmax(device: torch.device, position: int) -> None:
    check(device, [position], places_per_part=64)


@pytest.mark.parametrize(
    ("heads", "head_dim", "places"),
    [((6, 2), 40, 70), ((3, 1), 16, 17), ((2, 2), 64, 128), ((14, 2), 8, 65)],
    ids=["40-wide-heads", "odd-group", "one-query-per-key", "seven-per-key"],
)
def test_shapes(device: torch.device, heads: tuple[int, int], head_dim: int, places: int) -> None:
    check(device, [places - 1], heads=heads, head_dim=head_dim, places=places)


def test_rows_have_lengths_of_their_own(device: torch.device) -> None:
    check(device, [5, 77, 140], num_tokens=3, places_per_part=64)


def verify_case(device: torch.device, num_tokens: int, padding: int) -> tuple[Tensor, ...]:
    """Tokens of row 2 of a cache, one place after another, then padding; NaN wherever nothing may be looked at."""
    queries, _, _ = make_case(device, num_tokens + padding, (4, 2), 32, 200, torch.float32)
    _, keys, values = make_case(device, 3, (4, 2), 32, 200, torch.float32)
    first = 62  # the tokens' lengths cross the border of a part
    for cache in (keys, values):
        cache[:2] = torch.nan
        cache[2, :, first + num_tokens :] = torch.nan
    queries[num_tokens:] = torch.nan
    positions = torch.tensor([*range(first, first + num_tokens), *[-1] * padding], device=device)
    rows = torch.full((num_tokens + padding,), 2, dtype=torch.int64, device=device)
    return queries, keys, values, positions, rows


@pytest.mark.parametrize(("num_tokens", "padding"), [(2, 0), (3, 1), (5, 3)])
def test_tokens_of_one_row_see_what_is_before_them(device: torch.device, num_tokens: int, padding: int) -> None:
    """The causal lengths of a verify pass: each token has the bits that it has alone, padding gets zeros."""
    queries, keys, values, positions, rows = verify_case(device, num_tokens, padding)
    parts = AttentionParts.allocate(num_tokens + padding, 4, 32, 200, device=device)
    together = attend(queries, keys, values, positions, scale=0.3, rows=rows, mode="float", parts=parts)
    found = unpack_activations(together).cpu()
    expected = reference(queries, keys, values, positions, scale=0.3, rows=rows).cpu()[:num_tokens]
    torch.testing.assert_close(found[:num_tokens], expected.float(), rtol=0, atol=2e-6)
    assert bool((found[num_tokens:] == 0).all())
    for token in range(num_tokens):
        one = slice(token, token + 1)
        alone = attend(queries[one], keys, values, positions[one], scale=0.3, rows=rows[one], mode="float")
        assert torch.equal(unpack_activations(alone).cpu()[0], found[token])
        # The place of the token itself is looked at, and so is the row.
        again = attend(queries[one], keys[2:], values[2:], positions[one], scale=0.3, mode="float")
        assert torch.equal(unpack_activations(again).cpu()[0], found[token])


def test_one_cache_row_serves_every_token_unless_told_otherwise(device: torch.device) -> None:
    queries, keys, values, positions, rows = verify_case(device, 3, 0)
    named = attend(queries, keys[2:], values[2:], positions, scale=0.3, rows=rows * 0, mode="float")
    unnamed = attend(queries, keys[2:], values[2:], positions, scale=0.3, mode="float")
    assert torch.equal(named.values, unnamed.values)


def test_rows_that_do_not_exist_are_read_as_the_nearest(device: torch.device) -> None:
    queries, keys, values, positions, rows = verify_case(device, 2, 0)
    expected = attend(queries, keys, values, positions, scale=0.3, rows=rows, mode="float")
    beyond = attend(queries, keys, values, positions, scale=0.3, rows=rows + 5, mode="float")
    assert torch.equal(beyond.values, expected.values)
    below = attend(queries, keys.flip(0), values.flip(0), positions, scale=0.3, rows=rows - 9, mode="float")
    assert torch.equal(below.values, expected.values)


def test_int8_and_half_precision(device: torch.device) -> None:
    check(device, [150], mode="int8")
    check(device, [150], dtype=torch.float16, tolerance=2e-3)


def test_parts_do_not_change_the_result(device: torch.device) -> None:
    queries, keys, values = make_case(device, 1, (4, 2), 32, 256, torch.float32)
    at = torch.tensor([250], device=device)
    results = []
    for size in (64, 128, 256):
        parts = AttentionParts.allocate(1, 4, 32, 256, device=device, places_per_part=size)
        results.append(unpack_activations(attend(queries, keys, values, at, scale=1.0, mode="float", parts=parts)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-6)


def test_sharp_scores_stay_finite(device: torch.device) -> None:
    queries, keys, values = make_case(device, 1, (2, 1), 16, 140, torch.float32)
    at = torch.tensor([139], device=device)
    packed = attend(1e3 * queries, keys, values, at, scale=1.0, mode="float")
    expected = reference(1e3 * queries, keys, values, at, scale=1.0).cpu()
    torch.testing.assert_close(unpack_activations(packed)[:, :32].cpu(), expected.float(), rtol=0, atol=1e-4)


def test_bad_arguments(device: torch.device) -> None:
    queries, keys, values = make_case(device, 1, (4, 2), 16, 20, torch.float32)
    at = torch.tensor([3], device=device)
    with pytest.raises(ValueError, match="3 query heads cannot share keys"):
        attend(queries[:, :3].contiguous(), keys, values, at, scale=1.0)
    with pytest.raises(ValueError, match="queries is torch.float16"):
        attend(queries.half(), keys, values, at, scale=1.0)
    with pytest.raises(ValueError, match=r"positions is torch.int64 \[2\]"):
        attend(queries, keys, values, at.repeat(2), scale=1.0)
    with pytest.raises(ValueError, match=r"rows is torch.int64 \[2\]"):
        attend(queries, keys, values, at, scale=1.0, rows=at.repeat(2))
    with pytest.raises(ValueError, match="1 tokens but 2 cache rows; pass rows"):
        attend(queries, keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1), at, scale=1.0)
    with pytest.raises(ValueError, match="places_per_part=65"):
        AttentionParts.allocate(1, 4, 16, 200, device=device, places_per_part=65)
    with pytest.raises(ValueError, match="places_per_part=64"):
        AttentionParts.allocate(1, 4, 16, 64 * 33, device=device, places_per_part=64)
    with pytest.raises(ValueError, match="activations hold 32 inputs"):
        attend(queries, keys, values, at, scale=1.0, out=PackedActivations.allocate(1, 32, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("position", [0, 1000, 8191])
def test_real_shapes_on_a_gpu(device: torch.device, position: int) -> None:
    check(device, [position], heads=(32, 8), head_dim=128, places=8192, dtype=torch.float16, tolerance=3e-3)
