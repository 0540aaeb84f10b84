"""Times rotation and cache write in one kernel beside the same in torch operations."""

from functools import partial

import torch
from _command import main

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.kernels.reference_ops import rotate
from flexquant_rl.kernels.rotary import rotary

NUM_HEADS, NUM_KEY_HEADS, HEAD_DIM, NUM_PLACES = 32, 8, 128, 4096
SIZES = ((1,), (8,), (16,))


def providers(device: torch.device, clock: Clock, num_tokens: int) -> list[Provider]:
    """What is timed with one number of tokens."""
    columns = (NUM_HEADS + 2 * NUM_KEY_HEADS) * HEAD_DIM
    qkv = torch.randn(num_tokens, columns, device=device, dtype=torch.float16)
    angles = torch.rand(NUM_PLACES, HEAD_DIM // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    places = torch.arange(100, 100 + num_tokens, device=device)
    keys = torch.zeros(1, NUM_KEY_HEADS, NUM_PLACES, HEAD_DIM, device=device, dtype=torch.float16)
    values = torch.zeros_like(keys)
    out = torch.empty(num_tokens, NUM_HEADS, HEAD_DIM, device=device, dtype=torch.float16)

    def plain() -> None:
        heads = qkv.view(num_tokens, -1, HEAD_DIM)
        q, k, v = heads.split([NUM_HEADS, NUM_KEY_HEADS, NUM_KEY_HEADS], dim=1)
        out.copy_(rotate(q, cos[places], sin[places]))
        keys[0].index_copy_(1, places, rotate(k, cos[places], sin[places]).transpose(0, 1).half())
        values[0].index_copy_(1, places, v.transpose(0, 1))

    fused = partial(rotary, qkv, cos, sin, places, keys, values, out=out)
    facts = {"tokens": num_tokens}
    return [
        Provider(name, calls(clock, [call]), 2 * qkv.nbytes, facts)
        for name, call in (("triton", fused), ("torch", plain))
    ]


if __name__ == "__main__":
    main("rotary", providers, SIZES)
