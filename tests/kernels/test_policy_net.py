"""The policy kernel against the network that is trained."""

from __future__ import annotations

import pytest
import torch

from flexquant_rl.engine.control.policy import PrecisionNet
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.kernels import reference_ops
from flexquant_rl.kernels.policy_net import PolicyWeights, choose_widths

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")


def make_net(num_units: int, bit_widths: tuple[int, ...] = (3, 4, 5, 6, 8)) -> PrecisionNet:
    schema = SignalSchema(num_units, bit_widths)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(6)
        net = PrecisionNet(schema)
        net.width_head.weight.normal_()  # as initialised, all widths score almost the same
        net.set_normalisation(torch.randn(64, schema.dim) * 2 + 1)
    return net


@torch.no_grad()
def check(net: PrecisionNet, num_rows: int, device: torch.device) -> None:
    schema = net.schema
    signals = torch.randn(num_rows, schema.dim, generator=torch.Generator().manual_seed(3)) * 3
    weights = PolicyWeights.from_state_dict(net.state_dict(), schema.bit_widths, device=device)
    logits = torch.empty(num_rows, schema.num_units, len(schema.bit_widths), device=device)
    widths = choose_widths(weights, signals.to(device), num_units=schema.num_units, logits=logits)
    expected = net.logits(signals)
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert widths.dtype == torch.int32
    assert torch.equal(widths.cpu().long(), torch.tensor(schema.bit_widths)[expected.argmax(-1)])
    assert len(widths.unique()) > 1


@pytest.mark.parametrize(("num_rows", "num_units", "bit_widths"), [(1, 9, (3, 4, 5, 6, 8)), (2, 3, (3, 8))])
def test_matches_the_network(device: torch.device, num_rows: int, num_units: int, bit_widths: tuple[int, ...]) -> None:
    check(make_net(num_units, bit_widths), num_rows, device)


@torch.no_grad()
def test_the_reference_is_the_network() -> None:
    net = make_net(4)
    signals = torch.randn(3, net.schema.dim)
    logits = reference_ops.policy_logits(net.state_dict(), signals, num_units=4)
    torch.testing.assert_close(logits, net.logits(signals))


def test_equal_scores_choose_the_narrower_width(device: torch.device) -> None:
    net = make_net(2)
    state = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()} | {"std": net.std}
    weights = PolicyWeights.from_state_dict(state, net.schema.bit_widths, device=device)
    out = torch.empty(1, 2, dtype=torch.int32, device=device)
    assert choose_widths(weights, torch.ones(1, net.schema.dim, device=device), num_units=2, out=out) is out
    assert out.tolist() == [[3, 3]]


def test_bad_arguments(device: torch.device) -> None:
    net = make_net(2)
    state = net.state_dict()
    with pytest.raises(ValueError, match="the state dict has no width_head.bias"):
        PolicyWeights.from_state_dict({k: v for k, v in state.items() if k != "width_head.bias"}, (3, 8), device="cpu")
    with pytest.raises(ValueError, match="width_head.weight is torch.float32 \\[5, 64\\]; pass float32 \\[2, 64\\]"):
        PolicyWeights.from_state_dict(state, (3, 8), device="cpu")
    weights = PolicyWeights.from_state_dict(state, net.schema.bit_widths, device=device)
    with pytest.raises(ValueError, match="signals is torch.float32 \\[1, 7\\]"):
        choose_widths(weights, torch.zeros(1, 7, device=device), num_units=2)
    signals = torch.zeros(1, net.schema.dim, device=device)
    with pytest.raises(ValueError, match="out is torch.int64"):
        choose_widths(weights, signals, num_units=2, out=torch.zeros(1, 2, dtype=torch.int64, device=device))


@pytest.mark.gpu
def test_real_size_on_a_gpu(device: torch.device) -> None:
    check(make_net(65), 4, device)
