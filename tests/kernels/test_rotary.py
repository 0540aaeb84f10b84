"""Rotation, head norms and the cache write against plain torch and Hugging Face's rotation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from flexquant_rl.kernels import reference_ops
from flexquant_rl.kernels.rotary import rotary

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")

EPS = 1e-6


def make_case(
    device: torch.device,
    *,
    num_tokens: int = 2,
    num_heads: int = 4,
    num_key_heads: int = 2,
    head_dim: int = 16,
    num_rows: int = 2,
    num_places: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Any:
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(num_places, head_dim // 2, generator=generator) * 6
    columns = (num_heads + 2 * num_key_heads) * head_dim
    cache = torch.full((num_rows, num_key_heads, num_places, head_dim), -1.0, dtype=dtype, device=device)
    return SimpleNamespace(
        qkv=torch.randn(num_tokens, columns, generator=generator).to(device),
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
        keys=cache,
        values=cache.clone(),
        heads=num_heads,
        key_heads=num_key_heads,
        q_norm=torch.rand(head_dim, generator=generator).to(device),
        k_norm=torch.rand(head_dim, generator=generator).to(device),
    )


def check(case: Any, positions: list[int], rows: list[int] | None, *, has_norm: bool, tolerance: float = 1e-6) -> None:
    device = case.qkv.device
    norms = {"q_norm": case.q_norm, "k_norm": case.k_norm} if has_norm else {}
    before = case.keys.clone(), case.values.clone()
    places = torch.tensor(positions, device=device)
    owners = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
    query = rotary(case.qkv, case.cos, case.sin, places, case.keys, case.values, rows=owners, eps=EPS, **norms)
    heads = case.qkv.view(len(positions), -1, case.keys.shape[3])
    q, k, v = heads.split([case.heads, case.key_heads, case.key_heads], dim=1)
    if has_norm:
        q = reference_ops.rms_norm(q, case.q_norm, eps=EPS)
        k = reference_ops.rms_norm(k, case.k_norm, eps=EPS)
    q, k = (reference_ops.rotate(part, case.cos[places], case.sin[places]) for part in (q, k))
    one_row = len(case.keys) == 1
    for token, place in enumerate(positions):
        row = rows[token] if rows is not None else 0 if one_row else token
        before[0][row, :, place], before[1][row, :, place] = k[token], v[token]
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(query, q.to(case.keys.dtype), **close)
    torch.testing.assert_close(case.keys, before[0], **close)
    torch.testing.assert_close(case.values, before[1], **close)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_matches_the_reference(device: torch.device, head_dim: int, has_norm: bool) -> None:
    check(make_case(device, head_dim=head_dim), [3, 7], None, has_norm=has_norm)


def test_tokens_of_one_sequence(device: torch.device) -> None:
    check(make_case(device, num_tokens=3, num_rows=1), [2, 3, 4], None, has_norm=False)


def test_rows_may_be_named(device: torch.device) -> None:
    check(make_case(device, num_tokens=2, num_rows=3), [0, 5], [2, 0], has_norm=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_cache(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    check(make_case(device, dtype=dtype), [1, 6], None, has_norm=True, tolerance=tolerance)


def test_rotates_as_hugging_face_does() -> None:
    heads, angles = torch.randn(1, 4, 3, 16), torch.rand(3, 8) * 6
    cos, sin = (torch.cat([part, part], dim=-1)[None] for part in (angles.cos(), angles.sin()))
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    rotated = reference_ops.rotate(heads[0].transpose(0, 1), angles.cos(), angles.sin())
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1))


@pytest.mark.parametrize(("position", "row"), [(8, 0), (-1, 0), (0, 2), (0, -1)])
def test_a_place_that_does_not_exist_is_not_written(device: torch.device, position: int, row: int) -> None:
    case = make_case(device, num_tokens=1)
    places, rows = torch.tensor([position], device=device), torch.tensor([row], device=device)
    query = rotary(case.qkv, case.cos, case.sin, places, case.keys, case.values, rows=rows)
    assert torch.isfinite(query).all()
    assert (case.keys == -1).all()
    assert (case.values == -1).all()


def test_bad_arguments(device: torch.device) -> None:
    case = make_case(device)
    good = {
        "qkv": case.qkv,
        "cos": case.cos,
        "sin": case.sin,
        "positions": torch.zeros(2, dtype=torch.int64, device=device),
        "keys": case.keys,
        "values": case.values,
    }
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("qkv has 40 columns", {"qkv": case.qkv[:, :40].contiguous()}),
        ("values is torch.float16", {"values": case.values.half()}),
        ("sin is torch.float32 \\[4, 8\\]", {"sin": case.sin[:4]}),
        ("positions is torch.float32", {"positions": torch.zeros(2, device=device)}),
        ("q_norm and k_norm belong together", {"q_norm": case.q_norm}),
        ("2 tokens but 3 cache rows", {"keys": case.keys[[0, 0, 0]], "values": case.values[[0, 0, 0]]}),
    ]
    for message, changed in wrong:
        with pytest.raises(ValueError, match=message):
            rotary(**{**good, **changed})


@pytest.mark.gpu
def test_real_shapes_on_a_gpu(device: torch.device) -> None:
    case = make_case(
        device,
        num_tokens=4,
        num_heads=32,
        num_key_heads=8,
        head_dim=128,
        num_rows=4,
        num_places=512,
        dtype=torch.float16,
    )
    check(case, [0, 511, 17, 256], None, has_norm=True, tolerance=5e-3)
