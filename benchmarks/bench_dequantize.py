"""Times the decoding of whole matrices, for prompts, beside a plain copy of the decoded matrix."""

from functools import partial

import torch
from _command import main

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.engine.benches.random_weights import random_weight
from flexquant_rl.kernels.dequantize import dequantize

SIZES = ((6144, 4096), (28672, 4096), (4096, 14336))


def providers(device: torch.device, clock: Clock, num_outputs: int, num_inputs: int) -> list[Provider]:
    """What is timed at one size."""
    weight = random_weight(num_outputs, num_inputs, device=device)
    out = torch.empty(num_outputs, num_inputs, device=device, dtype=torch.float16)
    source = torch.zeros_like(out)
    facts = {"outputs": num_outputs, "inputs": num_inputs}
    found = []
    for bit_width in weight.bit_widths:
        call = partial(dequantize, weight, torch.tensor(bit_width, dtype=torch.int32, device=device), out=out)
        num_bytes = weight.bytes_read(bit_width) + out.nbytes
        found.append(Provider("triton", calls(clock, [call]), num_bytes, facts | {"bit_width": bit_width}))
    copy = calls(clock, [partial(out.copy_, source)])
    return [*found, Provider("torch", copy, 2 * out.nbytes, facts | {"what": "plain copy"})]


if __name__ == "__main__":
    main("dequantize", providers, SIZES)
