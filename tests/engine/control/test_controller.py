"""Controllers: the native one is the torch one, faster."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import (
    Controller,
    NativeController,
    PositionController,
    StaticController,
    TorchController,
    make_controller,
)
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.decision import Decision, PositionPolicy, StaticAllocation, looks
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels.native import supported_isas

needs_library = pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")


@pytest.fixture
def profile(nested_model: NestedCausalLM, generator: torch.Generator) -> Profile:
    sensitivity = torch.rand(nested_model.num_units, 5, generator=generator)
    cost = roofline_cost(nested_model)
    return Profile(cost, sensitivity, nested_model.bit_widths, nested_model.fingerprint, 10, "unquantised")


@pytest.fixture
def policy(nested_model: NestedCausalLM, generator: torch.Generator) -> LearnedPolicy:
    schema = SignalSchema(nested_model.num_units, nested_model.bit_widths)
    net = PrecisionNet(schema)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        net.mean.copy_(torch.randn(net.mean.shape, generator=generator))
        net.std.copy_(torch.rand(net.std.shape, generator=generator) + 0.5)
    return LearnedPolicy(net, PolicyCard(schema, nested_model.fingerprint, ("a", "b", "head")))


def make_native(model: NestedCausalLM, policy: LearnedPolicy, profile: Profile) -> NativeController:
    controller = make_controller(model, policy, profile)
    assert isinstance(controller, NativeController)
    return controller


def random_output(model: NestedCausalLM, generator: torch.Generator, spread: float) -> StepOutput:
    """Logits from almost uniform to so sharp that most probabilities are zero; statistics from nothing to large."""
    logits = spread * torch.randn(1, model.vocab_size, generator=generator)
    statistics = torch.rand(2, 1, model.num_units, generator=generator) * spread
    return StepOutput(logits, statistics[0], statistics[1])


def random_token(model: NestedCausalLM, generator: torch.Generator) -> Tensor:
    return torch.randint(model.vocab_size, (1,), generator=generator)


@needs_library
@pytest.mark.parametrize("isa", supported_isas())
def test_native_equals_torch(
    isa: str,
    nested_model: NestedCausalLM,
    policy: LearnedPolicy,
    profile: Profile,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FQ_CPU_ISA", isa)
    native = make_native(nested_model, policy, profile)
    reference = TorchController(nested_model, policy, profile)
    agreeing = chosen = 0
    seen = set()
    for episode in range(6):
        output, token = random_output(nested_model, generator, 1.0), random_token(nested_model, generator)
        for controller in (native, reference):
            controller.reset(output, token, torch.tensor([2.0 + 10 * episode]))
        for step in range(40):
            torch.testing.assert_close(native.signals(), reference.signals(), atol=2e-5, rtol=2e-5)
            widths = reference.decide().bit_widths
            agreeing += int((native.decide().bit_widths == widths).sum())
            chosen += widths.numel()
            seen |= set(widths.flatten().tolist())
            output = random_output(nested_model, generator, [0.0, 0.1, 3.0, 60.0][step % 4])
            token = random_token(nested_model, generator)
            for controller in (native, reference):
                controller.update(output, widths, token)
    assert len(seen) > 2, "a policy that always chooses the same would prove nothing"
    assert agreeing >= 0.998 * chosen  # scores that tie to the last digit may fall either way


@needs_library
def test_beyond_its_horizon_a_policy_sees_the_same_position(
    nested_model: NestedCausalLM, policy: LearnedPolicy, profile: Profile, generator: torch.Generator
) -> None:
    schema = replace(policy.card.schema, horizon=5)
    policy = LearnedPolicy(policy.net, replace(policy.card, schema=schema))
    native = make_native(nested_model, policy, profile)
    reference = TorchController(nested_model, policy, profile)
    output, token = random_output(nested_model, generator, 1.0), random_token(nested_model, generator)
    seen = []
    for controller in (native, reference):
        controller.reset(output, token, torch.tensor([3.0]))
    for _ in range(9):
        seen.append(float(reference.signals()[0, schema.index("position")]))
        torch.testing.assert_close(native.signals(), reference.signals(), atol=2e-5, rtol=2e-5)
        for controller in (native, reference):
            controller.update(output, torch.tensor([[3, 4, 8]]), token)
    assert seen == pytest.approx([math.log1p(min(step, 5)) / 4 for step in range(9)])
    reference.policy = None  # exchanged as evaluations do it: the horizon goes with its policy
    assert float(reference.signals()[0, schema.index("position")]) == pytest.approx(math.log1p(9) / 4)
    reference.policy = policy
    assert float(reference.signals()[0, schema.index("position")]) == pytest.approx(math.log1p(5) / 4)


@needs_library
def test_any_policy_sees_native_signals(
    nested_model: NestedCausalLM, profile: Profile, generator: torch.Generator
) -> None:
    class Recorder:
        name = "recorder"

        def __call__(self, signals: Tensor) -> Decision:
            self.seen = signals
            return Decision(torch.full((len(signals), 3), 5))

    recorder = Recorder()
    controller = make_controller(nested_model, recorder, profile)
    reference = TorchController(nested_model, recorder, profile)
    output, token = random_output(nested_model, generator, 2.0), random_token(nested_model, generator)
    controller.reset(output, token, torch.tensor([3.0]))
    reference.reset(output, token, torch.tensor([3.0]))
    assert controller.decide().bit_widths.tolist() == [[5, 5, 5]]
    torch.testing.assert_close(recorder.seen, reference.signals(), atol=2e-5, rtol=2e-5)


@needs_library
def test_native_refuses_a_token_beyond_the_vocabulary(
    nested_model: NestedCausalLM, policy: LearnedPolicy, profile: Profile, generator: torch.Generator
) -> None:
    native = make_native(nested_model, policy, profile)
    with pytest.raises(ValueError, match="token 128 is not in the vocabulary of 128"):
        native.reset(random_output(nested_model, generator, 1.0), torch.tensor([128]), torch.tensor([3.0]))
    output = StepOutput(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"logits is torch.float32 \[3\]"):
        native.reset(output, torch.tensor([1]), torch.tensor([3.0]))


def test_static_allocations_look_at_nothing(nested_model: NestedCausalLM, profile: Profile) -> None:
    static = make_controller(nested_model, StaticAllocation("static", torch.tensor([3, 4, 8])), profile)
    assert isinstance(static, StaticController)
    assert static.decide().bit_widths.tolist() == [[3, 4, 8]]


def test_positions_are_counted_row_by_row_and_nothing_is_looked_at(
    nested_model: NestedCausalLM, profile: Profile, generator: torch.Generator
) -> None:
    """The count decides what the torch controller decides from signals, through restarts and returns to a mark."""
    levels = torch.tensor([[8, 8, 4], [4, 5, 6], [3, 3, 3]])
    schema = SignalSchema(nested_model.num_units, nested_model.bit_widths)
    policy = PositionPolicy("levels", lambda positions: levels[positions.clamp_max(2)], schema.tokens_decoded)
    counting = make_controller(nested_model, policy, None, num_rows=2)
    assert isinstance(counting, PositionController)
    assert not looks(policy)
    reference = TorchController(nested_model, policy, profile, num_rows=2)
    both, second = torch.arange(2), torch.tensor([1])

    def output_of(num_rows: int) -> StepOutput:
        logits = torch.randn(num_rows, nested_model.vocab_size, generator=generator)
        return StepOutput(logits, *torch.rand(2, num_rows, 3, generator=generator).unbind())

    def play(rows: Tensor) -> None:
        tokens = torch.randint(nested_model.vocab_size, (len(rows),), generator=generator)
        for controller in (counting, reference):
            controller.update(output_of(len(rows)), levels[rows], tokens, rows)

    def agree() -> list[list[int]]:
        found = counting.decide().bit_widths
        assert torch.equal(found, reference.decide().bit_widths)
        assert torch.equal(counting.decide(second).bit_widths, found[1:])
        return found.tolist()

    for controller in (counting, reference):
        controller.reset(output_of(2), torch.tensor([1, 2]), torch.ones(2))
    assert agree() == levels[[0, 0]].tolist()
    play(both)
    marks = counting.mark(), reference.mark()
    play(second)
    assert agree() == levels[[1, 2]].tolist()
    counting.rollback(marks[0], second)
    reference.rollback(marks[1], second)
    assert agree() == levels[[1, 1]].tolist()
    for controller in (counting, reference):
        controller.reset(output_of(1), torch.tensor([1]), torch.ones(1), second)
    assert agree() == levels[[1, 0]].tolist()


def test_choice(
    nested_model: NestedCausalLM, policy: LearnedPolicy, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        name = "other"

        def __call__(self, signals: Tensor) -> Decision:
            return Decision(torch.full((len(signals), 3), 4))

    def kind(policy: LearnedPolicy | Other) -> type[Controller]:
        return type(make_controller(nested_model, policy, profile))

    if supported_isas():
        assert kind(Other()) is NativeController
        assert kind(policy) is NativeController
    monkeypatch.setattr("flexquant_rl.engine.decoding.lean.load_library", lambda: None)
    assert kind(policy) is TorchController
    assert kind(Other()) is TorchController
