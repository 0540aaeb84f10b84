"""Times the packing of activations beside a plain copy of them."""

from functools import partial

import torch
from _command import main

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.kernels.activations import PackedActivations, pack_activations

SIZES = ((1, 4096), (8, 4096), (1, 14336))


def providers(device: torch.device, clock: Clock, num_tokens: int, num_inputs: int) -> list[Provider]:
    """What is timed at one size."""
    x = torch.randn(num_tokens, num_inputs, device=device, dtype=torch.float16)
    out, copy = PackedActivations.allocate(num_tokens, num_inputs, device=device), torch.empty_like(x)
    facts = {"tokens": num_tokens, "inputs": num_inputs}
    return [
        Provider("triton", calls(clock, [partial(pack_activations, x, out=out)]), 3 * x.numel(), facts),
        Provider("torch", calls(clock, [partial(copy.copy_, x)]), 2 * x.nbytes, facts | {"what": "plain copy"}),
    ]


if __name__ == "__main__":
    main("activations", providers, SIZES)
