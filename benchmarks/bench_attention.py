"""Times attention of one token, 32 query and 8 key heads of 128, over static caches of many sizes and lengths."""

import torch
from _command import main
from torch.nn import functional

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.attention import AttentionParts, attend

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
# Places of the cache, and how many of them are taken.
SIZES = tuple((places, length) for places in (256, 2048, 8192, 32768) for length in (places // 2, places))


def providers(device: torch.device, clock: Clock, places: int, length: int) -> list[Provider]:
    """What is timed at one size."""
    cache = torch.randn(2, 1, KEY_HEADS, places, HEAD_DIM, device=device, dtype=torch.float16)
    queries = torch.randn(1, HEADS, HEAD_DIM, device=device, dtype=torch.float16)
    parts = AttentionParts.allocate(1, HEADS, HEAD_DIM, places, device=device)
    out = PackedActivations.allocate(1, HEADS * HEAD_DIM, device=device)
    position = torch.tensor([length - 1], device=device)
    mask = (torch.arange(places, device=device) < length)[None, None, None]
    # Query heads that share a key head as positions of one head: nothing is repeated.
    grouped = queries.view(1, KEY_HEADS, HEADS // KEY_HEADS, HEAD_DIM)

    def fused() -> None:
        attend(queries, cache[0], cache[1], position, scale=0.09, parts=parts, out=out)

    def plain() -> None:
        functional.scaled_dot_product_attention(grouped, cache[0], cache[1], attn_mask=mask, scale=0.09)

    num_bytes = cache.nbytes * length // places
    facts = {"places": places, "length": length}
    return [
        Provider("triton", calls(clock, [fused]), num_bytes, facts),
        Provider("torch", calls(clock, [plain]), num_bytes, facts | {"what": "attention only, whole cache"}),
    ]


if __name__ == "__main__":
    main("attention", providers, SIZES)
