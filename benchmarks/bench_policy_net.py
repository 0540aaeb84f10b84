"""Times the policy kernel, for one token of models with 9 to 65 units, beside the network in torch operations."""

import torch
from _harness import Case, main

from flexquant_rl.engine.control.policy import PrecisionNet
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.kernels.policy_net import PolicyWeights, choose_widths


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for num_units in (9, 33, 65):
        schema = SignalSchema(num_units, (3, 4, 5, 6, 8))
        net = PrecisionNet(schema).to(device).eval().requires_grad_(False)
        weights = PolicyWeights.from_state_dict(net.state_dict(), schema.bit_widths, device=device)
        signals = torch.randn(1, schema.dim, device=device)
        out = torch.empty(1, num_units, dtype=torch.int32, device=device)
        num_bytes = signals.nbytes + sum(tensor.nbytes for tensor in weights.tensors)
        facts = {"op": "policy_net", "units": num_units}

        def fused(weights=weights, signals=signals, num_units=num_units, out=out):
            choose_widths(weights, signals, num_units=num_units, out=out)

        cases.append(Case("triton", fused, num_bytes, facts))
        cases.append(Case("torch", lambda net=net, x=signals: net.logits(x).argmax(-1), num_bytes, facts))
    return cases


if __name__ == "__main__":
    main("policy_net", make_cases)
