"""Times attention of one token, 32 query and 8 key heads of 128, over static caches of many sizes and lengths."""

import torch
from _harness import Case, main
from torch.nn import functional

from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.attention import AttentionParts, attend

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for places in (256, 2048, 8192, 32768):
        cache = torch.randn(2, 1, KEY_HEADS, places, HEAD_DIM, device=device, dtype=torch.float16)
        queries = torch.randn(1, HEADS, HEAD_DIM, device=device, dtype=torch.float16)
        parts = AttentionParts.allocate(1, HEADS, HEAD_DIM, places, device=device)
        out = PackedActivations.allocate(1, HEADS * HEAD_DIM, device=device)
        for length in (places // 2, places):
            position = torch.tensor([length - 1], device=device)
            mask = (torch.arange(places, device=device) < length)[None, None, None]
            facts = {"op": "attention", "places": places, "length": length}
            num_bytes = cache.nbytes * length // places

            def fused(queries=queries, cache=cache, position=position, parts=parts, out=out):
                attend(queries, cache[0], cache[1], position, scale=0.09, parts=parts, out=out)

            def plain(queries=queries, cache=cache, mask=mask):
                # Query heads that share a key head as positions of one head: nothing is repeated.
                grouped = queries.view(1, KEY_HEADS, HEADS // KEY_HEADS, HEAD_DIM)
                functional.scaled_dot_product_attention(grouped, cache[0], cache[1], attn_mask=mask, scale=0.09)

            cases += [
                Case("triton", fused, num_bytes, facts),
                Case("torch", plain, num_bytes, facts | {"what": "attention only, whole cache"}),
            ]
    return cases


if __name__ == "__main__":
    main("attention", make_cases)
