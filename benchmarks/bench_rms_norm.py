"""Times the fused norm beside torch's, which leaves the packing still to do."""

from functools import partial

import torch
from _command import main
from torch.nn import functional

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.rms_norm import rms_norm

SIZES = ((1, 2048), (1, 4096), (8, 4096), (16, 4096), (1, 8192))


def providers(device: torch.device, clock: Clock, num_tokens: int, num_inputs: int) -> list[Provider]:
    """What is timed at one size."""
    x = torch.randn(num_tokens, num_inputs, device=device, dtype=torch.float16)
    weight = torch.rand(num_inputs, device=device, dtype=torch.float16)
    out = PackedActivations.allocate(num_tokens, num_inputs, device=device)
    fused = partial(rms_norm, x, weight, eps=1e-5, out=out)
    plain = partial(functional.rms_norm, x, (num_inputs,), weight, 1e-5)
    num_bytes = 3 * x.numel() + weight.nbytes
    facts = {"tokens": num_tokens, "inputs": num_inputs}
    return [
        Provider("triton", calls(clock, [fused]), num_bytes, facts),
        Provider("torch", calls(clock, [plain]), num_bytes, facts | {"what": "norm only"}),
    ]


if __name__ == "__main__":
    main("rms_norm", providers, SIZES)
