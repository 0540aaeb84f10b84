"""Times what a controller adds to every token, natively as it is served and in torch: signals, policy, a confidence."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from flexquant_rl.engine.benches.clocks import Call, host_clock
from flexquant_rl.engine.benches.harness import Provider, Row, Track, calls, interleave, rows
from flexquant_rl.engine.benches.options import PolicyBench
from flexquant_rl.engine.control.controller import NativeController
from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema, SignalTracker
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.kernels.native import load_library
from flexquant_rl.kernels.native_control import top_probability

_CALLS_PER_TURN = 50
_EMBEDDING_DIM = 64  # read once, when the tracker is made
_BIT_WIDTHS = (3, 4, 5, 6, 8)


def bench_policy(config: PolicyBench, track: Track = iter) -> list[Row]:
    """Times the policy, the signals, and both as a decode loop calls them.

    Args:
        config: What to time.
        track: Wraps the loop over rounds.

    Returns:
        One row per provider.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)
    clock = host_clock(1)
    schema = SignalSchema(config.units, _BIT_WIDTHS)
    card = PolicyCard(schema, "random", tuple(f"unit.{index}" for index in range(config.units)))
    policy = LearnedPolicy(PrecisionNet(schema), card)
    profile = _profile(config)
    embedding = torch.randn(config.vocab, _EMBEDDING_DIM)
    depths = [index / config.units for index in range(config.units)]
    tracker = SignalTracker(schema, profile, embedding, depths, num_rows=1)
    outputs = [_output(config) for _ in range(8)]
    token, width = torch.tensor([1 % config.vocab]), torch.tensor([8.0])
    widths = torch.full((1, config.units), max(_BIT_WIDTHS))
    tracker.reset(outputs[0], token, torch.tensor([100.0]), torch.tensor([0]))
    vector = tracker.signals()

    def observe(output: StepOutput) -> Tensor:
        tracker.update(output, widths, token, width)
        return tracker.signals()

    def decide(output: StepOutput) -> Decision:
        return policy(observe(output))

    def confidence(logits: Tensor) -> Tensor:
        return logits.softmax(-1).max()

    def provider(name: str, ring: Iterable[Call]) -> Provider:
        return Provider(name, calls(clock, ring, _CALLS_PER_TURN))

    providers = []
    if load_library() is not None:
        native = NativeController(policy, profile, embedding, depths, torch.ones(config.units))
        native.reset(outputs[0], token, torch.tensor([100.0]))

        def serve(output: StepOutput) -> Decision:
            native.update(output, widths, token)
            return native.decide()

        providers = [
            provider("native_policy", [native.decide]),
            provider("native_signals_and_policy", [partial(serve, output) for output in outputs]),
            provider("native_confidence", [partial(top_probability, output.logits[0]) for output in outputs]),
        ]
    providers += [
        provider("policy", [partial(policy, vector)]),
        provider("signals", [partial(observe, output) for output in outputs]),
        provider("signals_and_policy", [partial(decide, output) for output in outputs]),
        provider("confidence", [partial(confidence, output.logits[0]) for output in outputs]),
    ]
    interleave(providers, config.rounds, track)
    common = {"op": "policy", "units": config.units, "vocab": config.vocab, "num_threads": 1, "clock": clock.name}
    return rows(providers, common | {"seed": config.seed})


def _profile(config: PolicyBench) -> Profile:
    times = torch.rand(config.units, len(_BIT_WIDTHS), dtype=torch.float64).cumsum(1)
    cost = CostTable("roofline", 1.0, times, _BIT_WIDTHS, "random", "cpu", 1)
    sensitivity = torch.rand(config.units, len(_BIT_WIDTHS))
    return Profile(cost, sensitivity, _BIT_WIDTHS, "random", 1, "8-bit")


def _output(config: PolicyBench) -> StepOutput:
    logits = 3 * torch.randn(1, config.vocab)
    return StepOutput(logits, torch.rand(1, config.units), 1 + torch.rand(1, config.units))
