"""Times the Triton product at every width and tile beside torch's float16 product, on shapes of Llama-3.1-8B.

The weights of a provider are distinct copies that together exceed L2, multiplied one after the other in one graph.
"""

from functools import partial
from typing import Any, Literal

import torch
from _command import main
from torch import Tensor

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.engine.benches.random_weights import random_weight
from flexquant_rl.kernels.activations import PackedActivations, pack_activations
from flexquant_rl.kernels.bitplane import NestedWeight
from flexquant_rl.kernels.gemv import Tile, gemv

SIZES = (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336))
TILES = (Tile(4, 128, 4), Tile(4, 32, 1), Tile(2, 64, 1), Tile(1, 128, 1))
NUM_TOKENS = (1, 2, 4, 8, 16)
NUM_COPIES = 4

Mode = Literal["int8", "float"]


def providers(device: torch.device, clock: Clock, matrix: str, num_outputs: int, num_inputs: int) -> list[Provider]:
    """What is timed of one matrix."""
    weights = [random_weight(num_outputs, num_inputs, device=device) for _ in range(NUM_COPIES)]
    dense = torch.randn(num_outputs, num_inputs, device=device, dtype=torch.float16)
    found: list[Provider] = []
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, num_inputs, device=device, dtype=torch.float16)
        out = torch.empty(num_tokens, num_outputs, device=device, dtype=torch.float16)
        modes: tuple[Mode, ...] = ("int8", "float") if num_tokens == 1 else ("int8",)
        facts: dict[str, Any] = {"matrix": matrix, "tokens": num_tokens}
        for mode in modes:
            found += nested(clock, x, weights, out, mode, facts)
        product = calls(clock, [partial(torch.matmul, x, dense.T, out=out)])
        own = {"mode": "float16", "bit_width": 16, "calls": 1}
        found.append(Provider("torch", product, dense.nbytes, facts | own))
    return found


def nested(
    clock: Clock, x: Tensor, weights: list[NestedWeight], out: Tensor, mode: Mode, facts: dict[str, Any]
) -> list[Provider]:
    """The product at every width and, of one token, with every tile."""
    packed = pack_activations(x, mode=mode)
    found = []
    for bit_width in weights[0].bit_widths:
        width = torch.tensor([bit_width], dtype=torch.int32, device=x.device)
        for tile in TILES if len(x) == 1 else TILES[:1]:
            call = partial(multiply, packed, weights, width, out, tile)
            num_bytes = len(weights) * weights[0].bytes_read(bit_width)
            own = {"mode": mode, "bit_width": bit_width, "tile": f"{tile.rows}x{tile.words}/{tile.num_warps}"}
            own = facts | own | {"calls": len(weights)}
            found.append(Provider("triton", calls(clock, [call]), num_bytes, own))
    return found


def multiply(packed: PackedActivations, weights: list[NestedWeight], width: Tensor, out: Tensor, tile: Tile) -> None:
    """The call that is timed: one product after the other."""
    for weight in weights:
        gemv(packed, weight, width, out=out, tile=tile)


if __name__ == "__main__":
    main("gemv", providers, SIZES)
