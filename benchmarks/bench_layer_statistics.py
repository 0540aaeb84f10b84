"""Times the statistics of the residual stream, all layers at once, beside torch's operations."""

import torch
from _harness import Case, main

from flexquant_rl.kernels.layer_statistics import layer_statistics


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for num_layers, num_inputs in ((16, 2048), (32, 4096), (80, 8192)):
        hidden = torch.randn(num_layers + 1, num_inputs, device=device)
        out = torch.empty(2, num_layers + 1, device=device)
        facts = {"op": "layer_statistics", "layers": num_layers, "inputs": num_inputs}

        def fused(hidden=hidden, out=out):
            layer_statistics(hidden, out=out)

        def plain(hidden=hidden):
            norm = hidden[:-1].norm(dim=1).clamp_min(1e-12)
            hidden.diff(dim=0).norm(dim=1).div(norm)
            hidden[:-1].abs().amax(1).div(norm)

        cases += [Case("triton", fused, hidden.nbytes, facts), Case("torch", plain, hidden.nbytes, facts)]
    return cases


if __name__ == "__main__":
    main("layer_statistics", make_cases)
