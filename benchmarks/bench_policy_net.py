"""Times the policy kernel, for one token of models with 9 to 65 units, beside the network in torch operations."""

from functools import partial

import torch
from _command import main

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.engine.control.policy import PrecisionNet
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.kernels.policy_net import PolicyWeights, choose_widths

SIZES = ((9,), (33,), (65,))


def providers(device: torch.device, clock: Clock, num_units: int) -> list[Provider]:
    """What is timed with one number of units."""
    schema = SignalSchema(num_units, (3, 4, 5, 6, 8))
    net = PrecisionNet(schema).to(device).eval().requires_grad_(False)
    weights = PolicyWeights.from_state_dict(net.state_dict(), schema.bit_widths, device=device)
    signals = torch.randn(1, schema.dim, device=device)
    out = torch.empty(1, num_units, dtype=torch.int32, device=device)
    num_bytes = signals.nbytes + sum(tensor.nbytes for tensor in weights.tensors)
    fused = partial(choose_widths, weights, signals, num_units=num_units, out=out)
    facts = {"units": num_units}
    return [
        Provider("triton", calls(clock, [fused]), num_bytes, facts),
        Provider("torch", calls(clock, [lambda: net.logits(signals).argmax(-1)]), num_bytes, facts),
    ]


if __name__ == "__main__":
    main("policy_net", providers, SIZES)
