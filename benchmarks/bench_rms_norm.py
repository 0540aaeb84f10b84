"""Times the fused norm beside torch's, which leaves the packing still to do."""

import torch
from _harness import Case, main
from torch.nn import functional

from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.rms_norm import rms_norm


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for num_tokens, num_inputs in ((1, 2048), (1, 4096), (8, 4096), (1, 8192)):
        x = torch.randn(num_tokens, num_inputs, device=device, dtype=torch.float16)
        weight = torch.rand(num_inputs, device=device, dtype=torch.float16)
        out = PackedActivations.allocate(num_tokens, num_inputs, device=device)
        facts = {"op": "rms_norm", "tokens": num_tokens, "inputs": num_inputs}
        num_bytes = 3 * x.numel() + weight.nbytes

        def fused(x=x, weight=weight, out=out):
            rms_norm(x, weight, eps=1e-5, out=out)

        def plain(x=x, weight=weight):
            functional.rms_norm(x, (x.shape[1],), weight, 1e-5)

        cases += [
            Case("triton", fused, num_bytes, facts),
            Case("torch", plain, num_bytes, facts | {"what": "norm only"}),
        ]
    return cases


if __name__ == "__main__":
    main("rms_norm", make_cases)
