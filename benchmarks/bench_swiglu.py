"""Times the fused gate beside torch's two operations, which leave the packing still to do."""

from functools import partial

import torch
from _command import main
from torch.nn import functional

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.kernels.activations import PackedActivations
from flexquant_rl.kernels.swiglu import swiglu

SIZES = ((1, 8192), (1, 14336), (8, 14336), (16, 14336))


def providers(device: torch.device, clock: Clock, num_tokens: int, num_inputs: int) -> list[Provider]:
    """What is timed at one size."""
    gate_up = torch.randn(num_tokens, 2 * num_inputs, device=device, dtype=torch.float16)
    out = PackedActivations.allocate(num_tokens, num_inputs, device=device)

    def plain() -> None:
        functional.silu(gate_up[:, :num_inputs]) * gate_up[:, num_inputs:]

    num_bytes = gate_up.nbytes + num_tokens * num_inputs
    facts = {"tokens": num_tokens, "inputs": num_inputs}
    return [
        Provider("triton", calls(clock, [partial(swiglu, gate_up, out=out)]), num_bytes, facts),
        Provider("torch", calls(clock, [plain]), num_bytes, facts | {"what": "gate only"}),
    ]


if __name__ == "__main__":
    main("swiglu", providers, SIZES)
