"""Times the native CPU product at every width beside torch's own products and a plain read of the same memory.

Every provider cycles through its own ring of distinct weights, larger than any cache, so that memory is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from flexquant_rl.engine.benches.ceilings import read_provider
from flexquant_rl.engine.benches.clocks import Clock, host_clock
from flexquant_rl.engine.benches.harness import (
    BenchRefusedError,
    Provider,
    Row,
    Track,
    add_ratios,
    calls,
    interleave,
    rows,
)
from flexquant_rl.engine.benches.options import GemvBench
from flexquant_rl.engine.benches.random_weights import random_weight
from flexquant_rl.engine.decoding.weight_block import place, placed_bytes
from flexquant_rl.kernels import huge_pages
from flexquant_rl.kernels.native import NativeGemv
from flexquant_rl.kernels.reference import bitplane_gemv

_NATIVE = "native"
_CALLS_PER_TURN = 8
_CHECKED_ROWS = 64


def bench_gemv(config: GemvBench, track: Track = iter) -> list[Row]:
    """Times all providers.

    Args:
        config: What to time.
        track: Wraps the loop over rounds.

    Returns:
        One row per provider.

    Raises:
        BenchRefusedError: If a product is wrong.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    x = torch.randn(config.num_tokens, config.shape[1])
    clock = host_clock(config.threads)
    with torch.inference_mode():
        ours = _native_providers(config, clock, x)
        peers = _torch_providers(config, clock, x) if config.peers else []
        interleave([*ours, *peers], config.rounds, track)
    common = {
        "op": "bitplane_gemv",
        "shape": [config.num_tokens, *config.shape],
        "num_threads": config.threads,
        "clock": clock.name,
        "ring_mb": config.ring_mb,
        "seed": config.seed,
    }
    found = rows([*ours, *peers], common)
    add_ratios(found, _NATIVE, [peer.name for peer in peers])
    return found


def _ring_size(num_bytes: int, ring_mb: int) -> int:
    """Copies of a weight that make up a ring."""
    return max(2, -(-(ring_mb << 20) // num_bytes))


def _ring(first: Tensor, ring_mb: int) -> list[Tensor]:
    """Copies of one weight one behind the other in huge pages, where the lean decoder too keeps weights."""
    size = huge_pages.aligned(first.nbytes)
    num_copies = _ring_size(size, ring_mb)
    block = huge_pages.empty(num_copies * size)
    return [huge_pages.copied(first, block, index * size) for index in range(num_copies)]


def _native_providers(config: GemvBench, clock: Clock, x: Tensor) -> list[Provider]:
    """The read and one provider per width, all on one ring: width b reads the first b planes of each weight."""
    bit_widths = tuple(sorted({*config.bit_widths, 8}))
    weight = random_weight(*config.shape, bit_widths=bit_widths, group_size=config.group_size)
    size = placed_bytes(weight)
    num_copies = _ring_size(size, config.ring_mb)
    block = huge_pages.empty(num_copies * size)
    weights = [place(weight, block, index * size) for index in range(num_copies)]
    gemvs = [NativeGemv(weight, num_threads=config.threads, mode=config.mode) for weight in weights]
    out = torch.empty(len(x), config.shape[0])
    facts = {"isa": gemvs[0].isa, "group_size": config.group_size, "mode": config.mode}
    # The read takes a weight's bytes as they are stored, gaps and all.
    providers = [read_provider(clock, block[: num_copies * size].split(size), config.threads, _CALLS_PER_TURN)]
    for width in config.bit_widths:
        _check_product(gemvs[0], x, width)
        ring = [functools.partial(gemv, x, bit_width=width, out=out) for gemv in gemvs]
        turn = calls(clock, ring, _CALLS_PER_TURN)
        providers.append(Provider(_NATIVE, turn, weights[0].bytes_read(width), {"bit_width": width, **facts}))
    return providers


def _check_product(gemv: NativeGemv, x: Tensor, bit_width: int) -> None:
    """Refuses to time a product whose first rows are wrong: a fast wrong product is not worth a number."""
    weight, top = gemv.weight, slice(0, _CHECKED_ROWS)
    expected = bitplane_gemv(x, weight.rows(top), bit_width=bit_width)
    error = float((gemv(x, bit_width=bit_width)[:, top] - expected).norm() / expected.norm())
    limit = 0.03 if gemv.mode == "int8" else 1e-4  # int8 activations lose about 0.6%
    if not error < limit:
        raise BenchRefusedError(f"the product at {bit_width} bits is wrong by {error:.2g}, more than {limit:g}")


def _torch_providers(config: GemvBench, clock: Clock, x: Tensor) -> list[Provider]:
    """The products of torch: dense float32 and bfloat16, and the two low-bit ones at their best setting (bfloat16)."""
    num_outputs, num_inputs = config.shape
    x_half = x.bfloat16()
    dense = torch.randn(num_outputs, num_inputs)
    pairs4 = torch.rand(num_inputs // 128, num_outputs, 2).bfloat16()
    scale8 = torch.rand(num_outputs).bfloat16()
    ops = torch.ops.aten
    codes4 = torch.randint(0, 16, config.shape, dtype=torch.int32)
    int4 = ops._convert_weight_to_int4pack_for_cpu(codes4, 1)
    int8 = dense.mul(30).to(torch.int8)

    def peer(name: str, bits: int, weight: Tensor, product: Callable[[Tensor], Tensor]) -> Provider:
        ring = [functools.partial(product, copy) for copy in _ring(weight, config.ring_mb)]
        return Provider(name, calls(clock, ring, _CALLS_PER_TURN), weight.nbytes, {"bit_width": bits})

    return [
        peer("torch_fp32", 32, dense, lambda w: functional.linear(x, w)),
        peer("torch_bf16", 16, dense.bfloat16(), lambda w: functional.linear(x_half, w)),
        peer("aten_int8pack_bf16", 8, int8, lambda w: ops._weight_int8pack_mm(x_half, w, scale8)),
        peer("aten_int4pack_g128_bf16", 4, int4, lambda w: ops._weight_int4pack_mm_for_cpu(x_half, w, 128, pairs4)),
    ]
