"""Times the fused gate beside torch's two operations, which leave the packing still to do."""

import torch
from _harness import Case, main
from torch.nn import functional

from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.swiglu import swiglu


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for num_tokens, num_inputs in ((1, 8192), (1, 14336), (8, 14336)):
        gate_up = torch.randn(num_tokens, 2 * num_inputs, device=device, dtype=torch.float16)
        out = PackedActivations.allocate(num_tokens, num_inputs, device=device)
        facts = {"op": "swiglu", "tokens": num_tokens, "inputs": num_inputs}
        num_bytes = gate_up.nbytes + num_tokens * num_inputs

        def plain(gate_up=gate_up, num_inputs=num_inputs):
            return functional.silu(gate_up[:, :num_inputs]) * gate_up[:, num_inputs:]

        cases.append(Case("triton", lambda gate_up=gate_up, out=out: swiglu(gate_up, out=out), num_bytes, facts))
        cases.append(Case("torch", plain, num_bytes, facts | {"what": "gate only"}))
    return cases


if __name__ == "__main__":
    main("swiglu", make_cases)
