"""Times attention of one token or several of a row, 32 query and 8 key heads of 128, over static caches."""

import torch
from _command import main
from torch.nn import functional

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.attention import AttentionParts, attend

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
# Places of the cache, how many of them the last token sees, and how many tokens there are.
SIZES = tuple(
    (places, length, num_tokens)
    for places in (256, 2048, 8192, 32768)
    for length in (places // 2, places)
    for num_tokens in (1, 4, 16)
)


def providers(device: torch.device, clock: Clock, places: int, length: int, num_tokens: int) -> list[Provider]:
    """What is timed at one size."""
    cache = torch.randn(2, 1, KEY_HEADS, places, HEAD_DIM, device=device, dtype=torch.float16)
    queries = torch.randn(num_tokens, HEADS, HEAD_DIM, device=device, dtype=torch.float16)
    parts = AttentionParts.allocate(num_tokens, HEADS, HEAD_DIM, places, device=device)
    out = PackedActivations.allocate(num_tokens, HEADS * HEAD_DIM, device=device)
    positions = torch.arange(length - num_tokens, length, device=device)
    group = HEADS // KEY_HEADS
    # Query heads that share a key head as positions of one head: nothing is repeated.
    grouped = queries.view(num_tokens, KEY_HEADS, group, HEAD_DIM).transpose(0, 1).reshape(1, KEY_HEADS, -1, HEAD_DIM)
    mask = torch.arange(places, device=device) <= positions.repeat_interleave(group)[None, None, :, None]

    def fused() -> None:
        attend(queries, cache[0], cache[1], positions, scale=0.09, parts=parts, out=out)

    def plain() -> None:
        functional.scaled_dot_product_attention(grouped, cache[0], cache[1], attn_mask=mask, scale=0.09)

    num_bytes = cache.nbytes * length // places
    facts = {"places": places, "length": length, "tokens": num_tokens}
    return [
        Provider("triton", calls(clock, [fused]), num_bytes, facts),
        Provider("torch", calls(clock, [plain]), num_bytes, facts | {"what": "attention only, whole cache"}),
    ]


if __name__ == "__main__":
    main("attention", providers, SIZES)
