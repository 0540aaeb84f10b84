"""Times the Triton product at every width and tile beside torch's float16 product, on shapes of Llama-3.1-8B.

The weights of a case are distinct copies that together exceed L2, multiplied one after the other in one graph.
"""

import torch
from _harness import Case, main, random_weight

from flexquant_rl.kernels.activations import pack_activations
from flexquant_rl.kernels.gemv import Tile, gemv

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TILES = (Tile(4, 128, 4), Tile(4, 32, 1), Tile(2, 64, 1), Tile(1, 128, 1))
NUM_COPIES = 4


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for name, (num_outputs, num_inputs) in SHAPES.items():
        weights = [random_weight(num_outputs, num_inputs, device) for _ in range(NUM_COPIES)]
        for num_tokens in (1, 2, 4, 8):
            x = torch.randn(num_tokens, num_inputs, device=device, dtype=torch.float16)
            out = torch.empty(num_tokens, num_outputs, device=device, dtype=torch.float16)
            for mode in ("int8", "float") if num_tokens == 1 else ("int8",):
                packed = pack_activations(x, mode=mode)
                for bit_width in weights[0].bit_widths:
                    widths = torch.tensor([bit_width], dtype=torch.int32, device=device)
                    for tile in TILES if num_tokens == 1 else TILES[:1]:

                        def call(packed=packed, weights=weights, widths=widths, tile=tile, out=out):
                            for weight in weights:
                                gemv(packed, weight, widths, out=out, tile=tile)

                        facts = {
                            "op": "gemv",
                            "matrix": name,
                            "tokens": num_tokens,
                            "mode": mode,
                            "bit_width": bit_width,
                            "tile": f"{tile.rows}x{tile.words}/{tile.num_warps}",
                            "calls": NUM_COPIES,
                        }
                        cases.append(Case("triton", call, NUM_COPIES * weights[0].bytes_read(bit_width), facts))
            dense = torch.randn(num_outputs, num_inputs, device=device, dtype=torch.float16)

            def matmul(x=x, dense=dense, out=out):
                torch.matmul(x, dense.T, out=out)

            facts = {"op": "gemv", "matrix": name, "tokens": num_tokens, "mode": "float16", "bit_width": 16, "calls": 1}
            cases.append(Case("torch", matmul, dense.nbytes, facts))
    return cases


if __name__ == "__main__":
    main("gemv", make_cases)
