"""Times the packing of activations beside a plain copy of them."""

import torch
from _harness import Case, main

from flexquant_rl.kernels.activations import PackedActivations, pack_activations


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for num_tokens, num_inputs in ((1, 4096), (8, 4096), (1, 14336)):
        x = torch.randn(num_tokens, num_inputs, device=device, dtype=torch.float16)
        out, copy = PackedActivations.allocate(num_tokens, num_inputs, device=device), torch.empty_like(x)
        facts = {"op": "pack_activations", "tokens": num_tokens, "inputs": num_inputs}
        cases.append(Case("triton", lambda x=x, out=out: pack_activations(x, out=out), 3 * x.numel(), facts))
        cases.append(Case("torch", lambda x=x, copy=copy: copy.copy_(x), 2 * x.nbytes, facts | {"what": "plain copy"}))
    return cases


if __name__ == "__main__":
    main("activations", make_cases)
