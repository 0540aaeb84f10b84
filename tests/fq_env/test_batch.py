"""R episodes in lockstep against decoding each sequence alone, one token at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_profile, fake_windows
from torch import Tensor

from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.batch import BatchStep, DecodeBatch
from flexquant_rl.fq_env.task import EnvConfig

PROMPT, STEPS, ROWS = 4, 6, 3
CONFIG = EnvConfig(prompt_tokens=PROMPT, max_new_tokens=STEPS)
STATIC_WIDTHS = (4, 6, 3)
DIALS = torch.tensor([2.0, 20.0, 200.0])


def static_by_dial(kl_weight: Tensor) -> Tensor:
    """A static allocation that depends on the dial."""
    return torch.where(kl_weight[:, None] > 10, torch.tensor(STATIC_WIDTHS), torch.tensor([3, 4, 5]))


@dataclass
class Slow:
    """What one sequence gives when it is decoded alone; lists over steps."""

    kl: list[float]
    nll: list[float]
    agrees: list[bool]
    tokens: list[int]


def decode_alone(
    model: NestedCausalLM, window: Tensor, widths: Tensor, choose: Callable[[Tensor], int] | None = None
) -> Slow:
    """Two single-row sessions, stepped side by side; `widths`: `[STEPS, U]`; `choose` continues freely."""
    quantised, reference = (DecodeSession(model, max_length=PROMPT + STEPS) for _ in range(2))
    unquantised = torch.zeros(model.num_units, dtype=torch.int64)
    output = quantised.prefill(window[None, :PROMPT])
    reference.prefill(window[None, :PROMPT], bit_widths=unquantised)
    token = int(window[PROMPT]) if choose is None else choose(output.logits[0])
    slow = Slow([], [], [], [])
    for step in range(STEPS):
        slow.tokens.append(token)
        q = quantised.step(torch.tensor([token]), widths[step]).logits[0].double()
        p = reference.step(torch.tensor([token]), unquantised).logits[0].double()
        token = int(window[PROMPT + step + 1]) if choose is None else choose(q)
        log_q, log_p = q - q.logsumexp(0), p - p.logsumexp(0)
        slow.kl.append(sum(float(log_p[i].exp() * (log_p[i] - log_q[i])) for i in range(len(log_p))))
        slow.nll.append(-float(log_q[token]))
        slow.agrees.append(int(q.argmax()) == int(p.argmax()))
    return slow


def latency_by_hand(profile: Profile, widths: Tensor) -> float:
    """Fixed part plus one table entry per unit."""
    entries = zip(profile.cost.unit_ms, widths.tolist(), strict=True)
    return profile.cost.fixed_ms + sum(float(row[profile.bit_widths.index(width)]) for row, width in entries)


def random_widths(bit_widths: tuple[int, ...], num_units: int, steps: int, rows: int, *, seed: int = 0) -> Tensor:
    picks = torch.randint(len(bit_widths), (steps, rows, num_units), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(bit_widths)[picks]


def start(batch: DecodeBatch, windows: Tensor, *, dials: Tensor | None = None, seeds: Tensor | None = None) -> None:
    rows = torch.arange(len(windows))
    batch.reset(rows, windows, torch.ones(len(rows)) if dials is None else dials, rows if seeds is None else seeds)


def column(steps: list[BatchStep], name: str) -> Tensor:
    """`[R, steps]` of one field."""
    return torch.stack([getattr(step, name) for step in steps], dim=1)


@pytest.fixture
def tiny_batch(tiny_nested: NestedCausalLM, tiny_profile: Profile) -> Callable[..., DecodeBatch]:
    """Builds a batch of three rows on the tiny model."""

    def build(config: EnvConfig = CONFIG, **options: object) -> DecodeBatch:
        session = DecodeSession(tiny_nested, num_rows=ROWS, max_length=config.window_tokens - 1)
        return DecodeBatch(session, tiny_profile, config, num_rows=ROWS, **options)  # type: ignore[arg-type]

    return build


def test_replay_equals_decoding_alone(
    tiny_batch: Callable[..., DecodeBatch], tiny_nested: NestedCausalLM, tiny_profile: Profile, tiny_windows: Tensor
) -> None:
    windows = tiny_windows[:ROWS]
    widths = random_widths(tiny_nested.bit_widths, 3, STEPS, ROWS)
    batch = tiny_batch(static=static_by_dial)
    start(batch, windows, dials=DIALS)
    steps = [batch.step(widths[t]) for t in range(STEPS)]

    full_ms = latency_by_hand(tiny_profile, torch.tensor([8, 8, 8]))
    for row in range(ROWS):
        slow = decode_alone(tiny_nested, windows[row], widths[:, row])
        torch.testing.assert_close(column(steps, "output_kl_nats")[row], torch.tensor(slow.kl), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(column(steps, "token_nll_nats")[row], torch.tensor(slow.nll), rtol=1e-4, atol=1e-5)
        assert column(steps, "top1_agreement")[row].tolist() == slow.agrees
        static_widths = static_by_dial(DIALS)[row]
        static_slow = decode_alone(tiny_nested, windows[row], static_widths.expand(STEPS, -1))
        static_speedup = full_ms / latency_by_hand(tiny_profile, static_widths)
        for t, step in enumerate(steps):
            latency_ms = latency_by_hand(tiny_profile, widths[t, row])
            assert float(step.latency_ms[row]) == pytest.approx(latency_ms)
            assert float(step.speedup[row]) == pytest.approx(full_ms / latency_ms)
            expected = full_ms / latency_ms - 1 - float(DIALS[row]) * slow.kl[t]
            assert float(step.reward.total[row]) == pytest.approx(expected, rel=1e-3, abs=1e-3)
            expected = static_speedup - 1 - float(DIALS[row]) * static_slow.kl[t]
            assert float(step.static_reward[row]) == pytest.approx(expected, rel=1e-3, abs=1e-3)
            mean = float((widths[t, row] * tiny_nested.unit_weights).sum() / tiny_nested.unit_weights.sum())
            assert float(step.mean_bit_width[row]) == pytest.approx(mean)


def test_static_policy_has_no_advantage_over_itself(
    tiny_batch: Callable[..., DecodeBatch], tiny_windows: Tensor
) -> None:
    batch = tiny_batch(static=static_by_dial)
    start(batch, tiny_windows[:ROWS], dials=DIALS)
    steps = [batch.step(static_by_dial(DIALS)) for _ in range(STEPS)]
    advantage = torch.stack([step.reward.total - step.static_reward for step in steps])
    torch.testing.assert_close(advantage, torch.zeros_like(advantage), rtol=0, atol=2e-3)  # 1e-5 nats at a dial of 200
    assert column(steps, "static_reward").std() > 0.01


def test_full_width_without_loss_earns_nothing(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    batch = DecodeBatch(FakeSession(fake_model), fake_model_profile, CONFIG, num_rows=1)
    windows = fake_windows(1, CONFIG.window_tokens)
    start(batch, windows)
    step = batch.step(torch.full((1, 4), 8))
    assert float(step.speedup) == 1.0
    loss = float(fake_model.own_kl_nats(windows[:, PROMPT], torch.full((1, 4), 8)))
    assert 0 < loss < 1e-3
    assert float(step.reward.total) == pytest.approx(-loss, abs=1e-6)
    assert float(step.static_reward) == 0.0


def test_a_nested_model_alone_is_compared_with_its_largest_width() -> None:
    model = FakeModel(has_reference=False)
    batch = DecodeBatch(FakeSession(model), fake_profile(model), CONFIG, num_rows=1)
    start(batch, fake_windows(1, 11))
    assert float(batch.step(torch.full((1, 4), 8)).output_kl_nats) == 0.0
    assert float(batch.step(torch.full((1, 4), 3)).output_kl_nats) > 0.1


def test_free_greedy_reads_its_own_tokens(
    tiny_batch: Callable[..., DecodeBatch], tiny_nested: NestedCausalLM, tiny_windows: Tensor
) -> None:
    config = dataclasses.replace(CONFIG, source="free")
    widths = random_widths(tiny_nested.bit_widths, 3, STEPS, ROWS, seed=1)
    batch = tiny_batch(config)
    start(batch, tiny_windows[:ROWS])
    steps = [batch.step(widths[t]) for t in range(STEPS)]
    for row in range(ROWS):
        slow = decode_alone(tiny_nested, tiny_windows[row], widths[:, row], lambda logits: int(logits.argmax()))
        assert slow.tokens != tiny_windows[row, PROMPT : PROMPT + STEPS].tolist()
        torch.testing.assert_close(column(steps, "output_kl_nats")[row], torch.tensor(slow.kl), rtol=1e-3, atol=1e-6)
        assert column(steps, "top1_agreement")[row].tolist() == slow.agrees
    assert column(steps, "token_nll_nats").isnan().all()
    assert column(steps, "truncated")[:, -1].all()


class RecordingSession(FakeSession):
    """Keeps the tokens that it is told to read."""

    def __init__(self, model: FakeModel, *, num_rows: int, max_length: int = 256) -> None:
        super().__init__(model, num_rows=num_rows, max_length=max_length)
        self.read: list[Tensor] = []

    def step(self, token_ids: Tensor, bit_widths: Tensor, **kwargs: object):  # type: ignore[no-untyped-def]
        self.read.append(token_ids.clone())
        return super().step(token_ids, bit_widths, **kwargs)


def sampled_tokens(seeds: list[int], *, temperature: float = 1.0, steps: int = 20) -> Tensor:
    """`[R, steps]` tokens that a free continuation reads."""
    model = FakeModel()
    config = EnvConfig(prompt_tokens=4, max_new_tokens=steps, source="free", temperature=temperature)
    session = RecordingSession(model, num_rows=len(seeds))
    batch = DecodeBatch(session, fake_profile(model), config, num_rows=len(seeds))
    start(batch, fake_windows(1, config.window_tokens).expand(len(seeds), -1), seeds=torch.tensor(seeds))
    for _ in range(steps):
        batch.step(torch.full((len(seeds), 4), 5))
    return torch.stack(session.read, dim=1)


def test_free_sampling_is_seeded_row_by_row() -> None:
    tokens = sampled_tokens([11, 22, 11])
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(sampled_tokens([22, 99])[0], tokens[1])


def test_temperature_zero_ignores_the_seed() -> None:
    greedy = sampled_tokens([1, 2], temperature=0.0)
    assert torch.equal(greedy[0], greedy[1])
    assert torch.equal(sampled_tokens([3], temperature=1e-4)[0], greedy[0])


@pytest.mark.parametrize(("at", "ends"), [(1, 1), (3, 3), (STEPS, STEPS)])
def test_eos_in_the_text_terminates(fake_model: FakeModel, fake_model_profile: Profile, at: int, ends: int) -> None:
    windows = fake_windows(2, CONFIG.window_tokens)
    windows[0, PROMPT + at] = 30
    batch = DecodeBatch(FakeSession(fake_model, num_rows=2), fake_model_profile, CONFIG, num_rows=2, eos_token_id=30)
    start(batch, windows)
    for number in range(1, ends + 1):
        step = batch.step(torch.full((2, 4), 8))
        assert step.terminated.tolist() == [number == ends, False]
        assert step.truncated.tolist() == [False, number == STEPS]


def test_eos_of_the_model_terminates_a_free_continuation(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    greedy = sampled_tokens([0], temperature=0.0, steps=STEPS)[0]
    eos = int(greedy[3])
    first = greedy.tolist().index(eos)
    config = dataclasses.replace(CONFIG, source="free")
    batch = DecodeBatch(FakeSession(fake_model), fake_model_profile, config, num_rows=1, eos_token_id=eos)
    start(batch, fake_windows(1, CONFIG.window_tokens))
    terminated = [bool(batch.step(torch.full((1, 4), 5)).terminated) for _ in range(first)]
    assert first > 0
    assert terminated == [False] * (first - 1) + [True]


def test_without_an_eos_token_only_the_limit_ends(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    windows = fake_windows(1, CONFIG.window_tokens)
    windows[0, PROMPT + 2] = 30
    batch = DecodeBatch(FakeSession(fake_model), fake_model_profile, CONFIG, num_rows=1)
    start(batch, windows)
    steps = [batch.step(torch.full((1, 4), 8)) for _ in range(STEPS)]
    assert not column(steps, "terminated").any()
    assert column(steps, "truncated").tolist() == [[False] * (STEPS - 1) + [True]]


def test_probes_show_the_kl_and_are_paid_for(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    config = dataclasses.replace(CONFIG, probe_every=3)
    batch = DecodeBatch(FakeSession(fake_model), fake_model_profile, config, num_rows=1)
    start(batch, fake_windows(1, CONFIG.window_tokens))
    cost = fake_model_profile.cost
    widths = torch.full((1, 4), 4)
    plain_ms, full_ms = float(cost.latency_ms(widths)), float(cost.latency_ms(cost.full_width()))
    floor = -3.0  # log10(1e-6) / 2
    shown = floor
    for number in range(1, STEPS + 1):
        step = batch.step(widths)
        is_probe = number % 3 == 0
        assert float(step.latency_ms) == pytest.approx(plain_ms + full_ms * is_probe)
        assert float(step.speedup) == pytest.approx(full_ms / (plain_ms + full_ms * is_probe))
        if is_probe:
            shown = math.log10(float(step.output_kl_nats)) / 2
        signals = batch.signals()[0]
        assert float(signals[batch.schema.index("probe_kl")]) == pytest.approx(shown, abs=1e-5)
        age = float(signals[batch.schema.index("tokens_since_probe")])
        expected_age = math.log1p(number % 3) / math.log1p(256) if number >= 3 else 1.0
        assert age == pytest.approx(expected_age, abs=1e-5)
    assert shown > floor


def test_restarting_a_row_leaves_the_others_alone(
    tiny_batch: Callable[..., DecodeBatch], tiny_nested: NestedCausalLM, tiny_windows: Tensor
) -> None:
    widths = random_widths(tiny_nested.bit_widths, 3, STEPS, ROWS, seed=2)
    undisturbed = tiny_batch(static=static_by_dial)
    start(undisturbed, tiny_windows[:ROWS], dials=DIALS)
    expected = [undisturbed.step(widths[t]) for t in range(STEPS)]

    batch = tiny_batch(static=static_by_dial)
    start(batch, tiny_windows[:ROWS], dials=DIALS)
    steps = [batch.step(widths[t]) for t in range(2)]
    batch.reset(torch.tensor([1]), tiny_windows[3:4], torch.tensor([5.0]), torch.tensor([0]))
    assert batch.schema.is_first_step(batch.signals()).tolist() == [False, True, False]
    steps += [batch.step(widths[t]) for t in range(2, STEPS)]
    for name in ("output_kl_nats", "token_nll_nats", "speedup", "static_reward"):
        torch.testing.assert_close(
            column(steps, name)[[0, 2]], column(expected, name)[[0, 2]], rtol=1e-3, atol=1e-4, msg=name
        )

    fresh = tiny_batch(static=static_by_dial)
    start(fresh, tiny_windows[3:4].expand(ROWS, -1), dials=torch.full((ROWS,), 5.0))
    alone = [fresh.step(widths[t]) for t in range(2, STEPS)]
    for name in ("output_kl_nats", "token_nll_nats", "static_reward"):
        torch.testing.assert_close(column(steps[2:], name)[1], column(alone, name)[1], rtol=1e-3, atol=1e-4, msg=name)
    assert not steps[-1].truncated[1]


@pytest.mark.parametrize("source", ["replay", "free"])
def test_restarts_are_exact_without_a_model(source: str) -> None:
    model = FakeModel(carry=0.5)
    config = dataclasses.replace(CONFIG, source=source, temperature=1.0)  # type: ignore[arg-type]
    windows = fake_windows(4, CONFIG.window_tokens)
    widths = random_widths(model.bit_widths, 4, STEPS, 3, seed=4)

    def build() -> DecodeBatch:
        return DecodeBatch(FakeSession(model, num_rows=3), fake_profile(model), config, num_rows=3)

    whole, mixed = build(), build()
    start(whole, windows[:3])
    start(mixed, windows[[0, 3, 2]])
    mixed.step(widths[0])
    mixed.reset(
        torch.tensor([2, 0, 1]), windows[[2, 0, 1]], torch.ones(3), torch.tensor([2, 0, 1])
    )  # all, in any order
    for t in range(STEPS):
        assert torch.equal(whole.signals(), mixed.signals())
        one, other = whole.step(widths[t]), mixed.step(widths[t])
        assert torch.equal(one.reward.total, other.reward.total)
        assert torch.equal(one.truncated, other.truncated)


def test_the_reference_of_the_same_text_is_not_mixed_up(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    """Resetting with the text of the last reset reuses its reference, also after a row has been restarted between."""
    windows = fake_windows(3, CONFIG.window_tokens)
    batch = DecodeBatch(FakeSession(fake_model, num_rows=2), fake_model_profile, CONFIG, num_rows=2)
    widths = torch.full((2, 4), 4)

    def kl_of(texts: Tensor) -> Tensor:
        return fake_model.own_kl_nats(texts[:, PROMPT], widths).float()

    for texts in (windows[:2], windows[:2], windows[1:], windows[:2]):
        start(batch, texts)
        torch.testing.assert_close(batch.step(widths).output_kl_nats, kl_of(texts), rtol=1e-4, atol=1e-6)
    batch.reset(torch.tensor([1]), windows[2:], torch.ones(1), torch.zeros(1, dtype=torch.int64))
    start(batch, windows[:2])
    torch.testing.assert_close(batch.step(widths).output_kl_nats, kl_of(windows[:2]), rtol=1e-4, atol=1e-6)


def test_signals_carry_dial_and_position(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    batch = DecodeBatch(FakeSession(fake_model, num_rows=2), fake_model_profile, CONFIG, num_rows=2)
    start(batch, fake_windows(2, CONFIG.window_tokens), dials=torch.tensor([10.0, 100.0]))
    dial, position = (batch.schema.index(name) for name in ("dial", "position"))
    assert batch.signals()[:, dial].tolist() == pytest.approx([1.0, 2.0])
    assert batch.signals()[:, position].tolist() == [0.0, 0.0]
    widths = torch.tensor([[3, 4, 5, 6], [8, 8, 3, 3]])
    batch.step(widths)
    assert torch.equal(batch.schema.last_widths(batch.signals()), widths)
    assert batch.kl_weight.tolist() == [10.0, 100.0]


def test_control_variate_needs_a_fixed_text(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    config = dataclasses.replace(CONFIG, source="free")
    with pytest.raises(InputError, match="a control variate needs source=replay"):
        DecodeBatch(FakeSession(fake_model), fake_model_profile, config, num_rows=1, static=static_by_dial)


def test_steps_beyond_the_limit_are_refused(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    session = FakeSession(fake_model, max_length=CONFIG.window_tokens - 1)
    batch = DecodeBatch(session, fake_model_profile, CONFIG, num_rows=1)
    start(batch, fake_windows(1, CONFIG.window_tokens))
    for _ in range(STEPS):
        batch.step(torch.full((1, 4), 8))
    with pytest.raises(InputError, match="do not fit"):
        batch.step(torch.full((1, 4), 8))


@pytest.mark.parametrize("source", ["replay", "free"])
def test_measured_steps_take_wall_clock_time(
    tiny_batch: Callable[..., DecodeBatch], tiny_windows: Tensor, source: str
) -> None:
    batch = tiny_batch(dataclasses.replace(CONFIG, source=source), measured=True)  # type: ignore[arg-type]
    start(batch, tiny_windows[:ROWS])
    full_ms = batch.measure_full_step_ms(num_steps=3)
    assert batch.session.lengths.tolist() == [PROMPT] * ROWS
    step = batch.step(torch.full((ROWS, 3), 3))
    assert (step.latency_ms > 0).all()
    torch.testing.assert_close(step.speedup, full_ms / step.latency_ms)


@pytest.mark.parametrize("source", ["replay", "free"])
def test_close_frees_every_session(fake_model: FakeModel, fake_model_profile: Profile, source: str) -> None:
    sessions = [FakeSession(fake_model)]

    def fork() -> FakeSession:
        sessions.append(FakeSession(fake_model))
        return sessions[-1]

    sessions[0].fork = fork  # type: ignore[method-assign]
    config = dataclasses.replace(CONFIG, source=source)  # type: ignore[arg-type]
    batch = DecodeBatch(sessions[0], fake_model_profile, config, num_rows=1)
    batch.close()
    batch.close()
    assert all(session.is_closed for session in sessions)
    assert len(sessions) == (2 if source == "free" else 1)
