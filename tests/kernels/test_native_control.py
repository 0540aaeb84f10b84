"""Marks of native control, and what it refuses.

That it computes the right thing is tested against the engine's controllers.
"""

from __future__ import annotations

import math
import random
import threading
import weakref
from collections.abc import Callable

import pytest
import torch

from flexquant_rl.kernels import signal_constants
from flexquant_rl.kernels.native import Isa, supported_isas
from flexquant_rl.kernels.native_control import (
    ControlMark,
    ControlWeights,
    NativeControl,
    PolicyNetWeights,
    top_probability,
)

Operation = Callable[[NativeControl], None]

NUM_UNITS, VOCAB, WIDTHS, HIDDEN = 3, 29, (3, 4, 8), 32
NUM_GLOBAL, NUM_PER_UNIT = 12 + 4, 2 * len(WIDTHS) + 4

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels"),
]


def make_net(hidden: int = HIDDEN) -> PolicyNetWeights:
    return PolicyNetWeights(
        mean=torch.zeros(NUM_GLOBAL + NUM_PER_UNIT),
        deviation=torch.ones(NUM_GLOBAL + NUM_PER_UNIT),
        encode_global=(torch.randn(hidden, NUM_GLOBAL), torch.randn(hidden)),
        first=(torch.randn(hidden, NUM_PER_UNIT + hidden), torch.randn(hidden)),
        second=(torch.randn(hidden, hidden), torch.randn(hidden)),
        width_head=(torch.randn(len(WIDTHS), hidden), torch.randn(len(WIDTHS))),
    )


def make_weights(net: PolicyNetWeights | None = None, num_dims: int = 4, vocab: int = VOCAB) -> ControlWeights:
    return ControlWeights(
        net=net,
        bit_widths=WIDTHS,
        embedding=torch.randn(vocab, num_dims),
        unit_constants=torch.randn(NUM_UNITS, 2 * len(WIDTHS)),
        depth=torch.tensor([0.0, 0.5, 1.0]),
        weight_share=torch.tensor([0.25, 0.25, 0.5]),
    )


def started(net: PolicyNetWeights | None = None) -> NativeControl:
    control = NativeControl(make_weights(net))
    control.reset(torch.randn(VOCAB), torch.rand(NUM_UNITS), torch.rand(NUM_UNITS), 5, 3.0)
    return control


def test_chooses_stored_widths() -> None:
    control = started(make_net())
    assert control.signals().shape == (control.dim,) == (NUM_GLOBAL + NUM_UNITS * NUM_PER_UNIT,)
    assert set(control.choose(control.signals()).tolist()) <= set(WIDTHS)


def test_decisions_stay_as_they_were() -> None:
    """Their memory comes from blocks, but no two share any of it, and in-place work on them is allowed."""
    control = started(make_net())
    with torch.inference_mode():
        kept = [control.decide()]
    copies = [kept[0].clone()]
    for _ in range(150):  # more than two blocks
        control.update(torch.randn(VOCAB), torch.rand(3), torch.rand(3), kept[-1][0], 1)
        kept.append(control.decide())
        copies.append(kept[-1].clone())
    assert len({tuple(copy[0].tolist()) for copy in copies}) > 1
    assert all(map(torch.equal, kept, copies))
    kept[1].add_(1)
    assert torch.equal(kept[2], copies[2])


def test_without_a_network_there_are_signals_but_no_choice() -> None:
    control = started()
    assert bool(control.signals().isfinite().all())
    with pytest.raises(ValueError, match="no network"):
        control.choose(control.signals())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(VOCAB - 1)}, "logits is"),
        ({"logits": torch.zeros(VOCAB, dtype=torch.float64)}, "logits is"),
        ({"residual_update": torch.zeros(1)}, "residual_update is"),
        ({"crest": torch.zeros(2 * NUM_UNITS)[::2]}, "crest is"),
        ({"bit_widths": torch.full((NUM_UNITS,), 4, dtype=torch.int32)}, "bit_widths is"),
        ({"bit_widths": torch.full((NUM_UNITS + 1,), 4)}, "bit_widths is"),
        ({"next_token_id": VOCAB}, f"token {VOCAB} is not in the vocabulary"),
        ({"next_token_id": -1}, "token -1 is not in the vocabulary"),
    ],
)
def test_bad_updates(change: dict[str, object], message: str) -> None:
    control = started()
    before = control.signals()
    arguments = {
        "logits": torch.zeros(VOCAB),
        "residual_update": torch.zeros(NUM_UNITS),
        "crest": torch.zeros(NUM_UNITS),
        "bit_widths": torch.full((NUM_UNITS,), 4),
        "next_token_id": 1,
    }
    with pytest.raises(ValueError, match=message):
        control.update(**(arguments | change))  # type: ignore[arg-type]  # wrong on purpose
    assert torch.equal(control.signals(), before)


def test_bad_signals() -> None:
    with pytest.raises(ValueError, match="signals is"):
        started(make_net()).choose(torch.zeros(3))


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        NativeControl(make_weights(make_net(hidden=24)))
    with pytest.raises(ValueError, match="a tensor is"):
        NativeControl(make_weights(make_net(), num_dims=5))


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 2048, 2049, 5000])
def test_top_probability(isa: Isa, vocab: int) -> None:
    """Against float64, with logits beyond the end that would win if they were read."""
    held = torch.full((vocab + 64,), 1e30)
    logits = held[:vocab]
    logits.copy_(torch.randn(vocab) * random.choice([0.1, 3, 30]))
    expected = float(logits.double().softmax(-1).max())
    assert top_probability(logits, isa=isa) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("isa", supported_isas())
def test_top_probability_where_some_tokens_have_none(isa: Isa) -> None:
    """Whole blocks of tokens that cannot come, before and behind those that can."""
    logits = torch.full((9000,), -torch.inf)
    logits[4100:4103] = torch.tensor([1.0, 3.0, 2.0])
    expected = float(logits.double().softmax(-1).max())
    assert top_probability(logits, isa=isa) == pytest.approx(expected, rel=2e-5)


def test_top_probability_of_what_native_code_cannot_read() -> None:
    logits = torch.randn(2, 40)
    expected = float(logits[:, 3].softmax(-1).max())
    assert top_probability(logits[:, 3]) == pytest.approx(expected, rel=1e-6)
    assert top_probability(logits[:, 3].double()) == pytest.approx(expected, rel=1e-6)


def test_the_newest_top1() -> None:
    control = started()
    logits = torch.randn(VOCAB) * 3
    control.update(logits, torch.rand(NUM_UNITS), torch.rand(NUM_UNITS), torch.full((NUM_UNITS,), 4), 1)
    assert control.top1 == pytest.approx(float(logits.softmax(-1).max()), rel=2e-5)


@pytest.fixture
def fresh() -> random.Random:
    """Other inputs in every run, which the name of a failing run tells."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return random.Random(seed)


def random_update(fresh: random.Random, vocab: int = VOCAB) -> Operation:
    generator = torch.Generator().manual_seed(fresh.randrange(2**31))
    logits = fresh.choice([0.1, 3.0, 80.0]) * torch.randn(vocab, generator=generator)
    update, crest = torch.rand(2, NUM_UNITS, generator=generator)
    widths = torch.tensor([fresh.choice(WIDTHS) for _ in range(NUM_UNITS)])
    token = fresh.randrange(vocab)
    return lambda control: control.update(logits, update, crest, widths, token)


def random_reset(fresh: random.Random, vocab: int = VOCAB) -> Operation:
    generator = torch.Generator().manual_seed(fresh.randrange(2**31))
    logits, token, dial = torch.randn(vocab, generator=generator), fresh.randrange(vocab), 10 ** fresh.uniform(-2, 2)
    update, crest = torch.rand(2, NUM_UNITS, generator=generator)
    return lambda control: control.reset(logits, update, crest, token, dial)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("max_marks", [1, 5])
def test_rolled_back_updates_never_happened(isa: Isa, max_marks: int, fresh: random.Random) -> None:
    """Any order of updates, resets, marks, rollbacks and dropped marks equals a control that saw what was kept."""
    weights = make_weights(make_net())
    control, kept = NativeControl(weights, isa=isa), [random_reset(fresh)]
    kept[0](control)
    marks: list[tuple[ControlMark, list[Operation]]] = []
    for _ in range(250):
        action = fresh.choices(("update", "mark", "rollback", "drop", "reset"), (8, 3, 3, 2, 1))[0]
        if action == "mark" and len(marks) < max_marks:
            marks.append((control.mark(), list(kept)))
        elif action == "rollback" and marks:
            index = fresh.randrange(len(marks))
            control.rollback(marks[index][0])  # under no name, which would keep it alive
            kept = list(marks[index][1])
        elif action == "drop" and marks:
            marks.pop(fresh.randrange(len(marks)))
        elif action in ("update", "reset"):
            operation = random_update(fresh) if action == "update" else random_reset(fresh)
            operation(control)
            kept = [*kept, operation] if action == "update" else [operation]
        twin = NativeControl(weights, isa=isa)
        for operation in kept:
            operation(twin)
        assert torch.equal(control.signals(), twin.signals())
        assert torch.equal(control.choose(control.signals()), twin.decide()[0])


def test_logits_are_kept_as_long_as_they_are_needed() -> None:
    control = started()

    def update() -> weakref.ref[torch.Tensor]:
        logits = torch.randn(VOCAB)
        control.update(logits, torch.rand(3), torch.rand(3), torch.full((3,), 4), 1)
        return weakref.ref(logits)

    current = update()
    assert current() is not None
    mark = control.mark()
    following = update()
    assert current() is not None, "a mark needs them"
    assert following() is not None
    del mark
    assert current() is None
    update()
    assert following() is None


def test_an_update_comes_after_a_start() -> None:
    control = NativeControl(make_weights())
    with pytest.raises(ValueError, match="no sequence has been started; call reset"):
        control.update(torch.randn(VOCAB), torch.rand(3), torch.rand(3), torch.full((3,), 4), 1)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("vocab", [1, 15, 16, 2047, 2048, 2049, 5000])
def test_statistics_of_distributions(isa: Isa, vocab: int, fresh: random.Random) -> None:
    """Blocks whose largest logit rises, falls or is missing altogether, against float64."""
    control = NativeControl(make_weights(vocab=vocab), isa=isa)
    generator = torch.Generator().manual_seed(fresh.randrange(2**31))
    slope = torch.linspace(-1, 1, vocab)
    previous: torch.Tensor | None = None
    ema = 0.0
    for tilt, masked in ((0.0, 0), (40.0, 0), (-40.0, 0), (1.0, vocab // 2), (0.0, 0), (200.0, 0)):
        logits = 2 * torch.randn(vocab, generator=generator) + tilt * slope + 50
        logits[:masked] = -torch.inf
        token = fresh.randrange(vocab)
        statistics = torch.rand(2, NUM_UNITS, generator=generator)
        if previous is None:
            control.reset(logits, *statistics, token, 1.0)
        else:
            control.update(logits, *statistics, torch.full((NUM_UNITS,), 4), token)
        log_probs = logits.double().log_softmax(-1).clamp_min(-110)
        entropy = float(-(log_probs.exp() * log_probs).sum())
        ema = entropy if previous is None else 0.9 * ema + 0.1 * entropy
        top = log_probs.exp().topk(min(2, vocab)).values.tolist()
        kl = 0.0 if previous is None else float((log_probs.exp() * (log_probs - previous)).sum())
        signals = control.signals().tolist()
        nats, decades = signal_constants.NATS_SCALE, signal_constants.DECADES_SCALE
        assert signals[0] * nats == pytest.approx(entropy, rel=1e-5, abs=1e-4)
        assert signals[1] * nats == pytest.approx(ema, rel=1e-5, abs=1e-4)
        assert signals[3] == pytest.approx(top[0], rel=1e-4)
        assert signals[4] == pytest.approx(top[0] - (top[1] if vocab > 1 else 0.0), abs=1e-4)
        assert min(signals[5] * nats, 39.9) == pytest.approx(min(-float(log_probs[token]), 39.9), rel=1e-4, abs=1e-4)
        assert signals[6] == pytest.approx(math.log10(max(kl, 1e-6)) / decades, abs=1e-3)
        previous = log_probs


def test_a_mark_outlives_a_refused_update(fresh: random.Random) -> None:
    control = started()
    before, mark = control.signals(), control.mark()
    with pytest.raises(ValueError, match="not in the vocabulary"):
        control.update(torch.randn(VOCAB), torch.rand(3), torch.rand(3), torch.full((3,), 4), VOCAB)
    assert torch.equal(control.signals(), before)
    random_update(fresh)(control)
    control.rollback(mark)
    assert torch.equal(control.signals(), before)


def test_a_mark_of_another_control(fresh: random.Random) -> None:
    control, other = started(), started()
    before, mark = control.signals(), other.mark()
    random_update(fresh)(other)
    with pytest.raises(ValueError, match="another NativeControl"):
        control.rollback(mark)
    assert torch.equal(control.signals(), before)


def test_another_thread_sees_no_half_made_step(fresh: random.Random) -> None:
    weights = make_weights(vocab=20_000)
    control, twin = NativeControl(weights), NativeControl(weights)
    operations = [random_reset(fresh, 20_000), *(random_update(fresh, 20_000) for _ in range(200))]
    states = []
    for operation in operations:
        operation(twin)
        states.append(twin.signals())
    operations[0](control)
    seen, is_done = [], threading.Event()

    def look() -> None:
        while not is_done.is_set():
            seen.append(control.signals())

    thread = threading.Thread(target=look)
    thread.start()
    for operation in operations[1:]:
        operation(control)
    is_done.set()
    thread.join(timeout=60)
    possible = {tuple(state.tolist()) for state in states}
    assert seen
    assert {tuple(state.tolist()) for state in seen} <= possible
