"""Times the statistics of the residual stream, all layers at once, beside torch's operations."""

from functools import partial

import torch
from _command import main

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.kernels.layer_statistics import layer_statistics

SIZES = ((16, 1, 2048), (32, 1, 4096), (32, 8, 4096), (80, 1, 8192))


def providers(device: torch.device, clock: Clock, num_layers: int, num_tokens: int, num_inputs: int) -> list[Provider]:
    """What is timed at one size."""
    hidden = torch.randn(num_layers + 1, num_tokens, num_inputs, device=device)
    out = torch.empty(num_tokens, 2, num_layers + 1, device=device)

    def plain() -> None:
        norm = hidden[:-1].norm(dim=2).clamp_min(1e-12)
        hidden.diff(dim=0).norm(dim=2).div(norm)
        hidden[:-1].abs().amax(2).div(norm)

    facts = {"layers": num_layers, "tokens": num_tokens, "inputs": num_inputs}
    return [
        Provider("triton", calls(clock, [partial(layer_statistics, hidden, out=out)]), hidden.nbytes, facts),
        Provider("torch", calls(clock, [plain]), hidden.nbytes, facts),
    ]


if __name__ == "__main__":
    main("layer_statistics", providers, SIZES)
