"""Times the decoding of whole matrices, for prompts, beside a plain copy of the decoded matrix."""

import torch
from _harness import Case, main, random_weight

from flexquant_rl.kernels.dequantize import dequantize


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for num_outputs, num_inputs in ((6144, 4096), (28672, 4096), (4096, 14336)):
        weight = random_weight(num_outputs, num_inputs, device)
        out = torch.empty(num_outputs, num_inputs, device=device, dtype=torch.float16)
        source = torch.zeros_like(out)
        for bit_width in weight.bit_widths:
            width = torch.tensor(bit_width, dtype=torch.int32, device=device)
            facts = {"op": "dequantize", "outputs": num_outputs, "inputs": num_inputs, "bit_width": bit_width}

            def call(weight=weight, width=width, out=out):
                dequantize(weight, width, out=out)

            cases.append(Case("triton", call, weight.bytes_read(bit_width) + out.nbytes, facts))
        facts = {"op": "dequantize", "outputs": num_outputs, "inputs": num_inputs, "what": "plain copy"}
        cases.append(Case("torch", lambda out=out, source=source: out.copy_(source), 2 * out.nbytes, facts))
    return cases


if __name__ == "__main__":
    main("dequantize", make_cases)
