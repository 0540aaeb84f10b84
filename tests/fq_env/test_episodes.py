"""R episodes in lockstep against decoding each sequence alone, one token at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_alone import decode_alone
from fake_session import FakeModel, FakeSession, fake_profile, fake_windows
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flexquant_rl.engine.bits_display import coloured, legend
from flexquant_rl.engine.control.decision import Decision, StaticAllocation
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.config import EnvConfig, Source
from flexquant_rl.fq_env.episodes import Episodes, StepFacts
from flexquant_rl.fq_env.task import LossyTask

PROMPT, STEPS, ROWS = 4, 6, 3
CONFIG = EnvConfig(prompt_tokens=PROMPT, max_new_tokens=STEPS)
STATIC_WIDTHS = (4, 6, 3)
DIALS = torch.tensor([2.0, 20.0, 200.0])


def static_by_dial(kl_weight: Tensor) -> Tensor:
    """A static allocation that depends on the dial."""
    return torch.where(kl_weight[:, None] > 10, torch.tensor(STATIC_WIDTHS), torch.tensor([3, 4, 5]))


def latency_by_hand(profile: Profile, widths: Tensor) -> float:
    """Fixed part plus one table entry per unit."""
    entries = zip(profile.cost.unit_ms, widths.tolist(), strict=True)
    return profile.cost.fixed_ms + sum(float(row[profile.bit_widths.index(width)]) for row, width in entries)


def random_widths(bit_widths: tuple[int, ...], num_units: int, steps: int, rows: int, *, seed: int = 0) -> Tensor:
    picks = torch.randint(len(bit_widths), (steps, rows, num_units), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(bit_widths)[picks]


def start(
    episodes: Episodes,
    windows: Tensor | None = None,
    *,
    dials: Tensor | None = None,
    seeds: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Starts rows (default: all) with windows (default: their own numbers), a dial of 1 and seeds like the rows."""
    rows = torch.arange(episodes.num_rows) if rows is None else rows
    dials = torch.ones(len(rows)) if dials is None else dials
    episodes.start(rows, rows if windows is None else windows, dials, rows if seeds is None else seeds)


def at(*widths: int, rows: int = 1) -> Decision:
    """The same widths for all rows; one stands for all of four units."""
    return Decision(torch.tensor(widths * 4 if len(widths) == 1 else widths).expand(rows, -1))


def column(steps: list[StepFacts], name: str) -> Tensor:
    """`[R, steps]` of one field."""
    return torch.stack([getattr(step, name) for step in steps], dim=1)


@pytest.fixture
def tiny_episodes(tiny_nested: NestedCausalLM, tiny_profile: Profile, tiny_windows: Tensor) -> Callable[..., Episodes]:
    """Builds three rows on the tiny model."""

    def build(config: EnvConfig = CONFIG, *, rows: int = ROWS, **options: Any) -> Episodes:
        session = DecodeSession(tiny_nested, num_rows=rows, max_length=config.window_tokens - 1)
        return Episodes(session, tiny_profile, tiny_windows, config, **options)

    return build


def fake_episodes(
    windows: Tensor | int = 1,
    config: EnvConfig = CONFIG,
    *,
    rows: int = 1,
    model: FakeModel | None = None,
    **options: Any,
) -> Episodes:
    """Rows of a fake model over given windows, or over so many random ones."""
    model = model or FakeModel()
    if isinstance(windows, int):
        windows = fake_windows(windows, config.window_tokens)
    session = FakeSession(model, num_rows=rows, max_length=config.window_tokens - 1)
    return Episodes(session, fake_profile(model), windows, config, **options)


def test_replay_equals_decoding_alone(
    tiny_episodes: Callable[..., Episodes], tiny_nested: NestedCausalLM, tiny_profile: Profile, tiny_windows: Tensor
) -> None:
    widths = random_widths(tiny_nested.bit_widths, 3, STEPS, ROWS)
    episodes = tiny_episodes()
    task = LossyTask(tiny_nested, tiny_profile, CONFIG, static=static_by_dial)
    start(episodes, dials=DIALS)
    task.start(episodes, torch.arange(ROWS))
    steps = [episodes.step(Decision(widths[t])) for t in range(STEPS)]
    rewards = [task.reward(facts) for facts in steps]

    full_ms = latency_by_hand(tiny_profile, torch.tensor([8, 8, 8]))
    for row in range(ROWS):
        slow = decode_alone(tiny_nested, tiny_windows[row], widths[:, row])
        torch.testing.assert_close(column(steps, "output_kl_nats")[row], torch.tensor(slow.kl), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(column(steps, "token_nll_nats")[row], torch.tensor(slow.nll), rtol=1e-4, atol=1e-5)
        assert column(steps, "top1_agreement")[row].tolist() == slow.agrees
        static_widths = static_by_dial(DIALS)[row]
        static_slow = decode_alone(tiny_nested, tiny_windows[row], static_widths.expand(STEPS, -1))
        static_time_share = latency_by_hand(tiny_profile, static_widths) / full_ms
        for t, (facts, reward) in enumerate(zip(steps, rewards, strict=True)):
            assert torch.equal(facts.decision.bit_widths, widths[t])
            assert facts.position[row] == t
            assert facts.kl_weight[row] == DIALS[row]
            latency_ms = latency_by_hand(tiny_profile, widths[t, row])
            assert float(facts.latency_ms[row]) == pytest.approx(latency_ms)
            assert facts.full_latency_ms == pytest.approx(full_ms)
            plain = 1 - latency_ms / full_ms - float(DIALS[row]) * slow.kl[t]
            assert float(reward.terms["reward_plain"][row]) == pytest.approx(plain, rel=1e-3, abs=1e-3)
            static = 1 - static_time_share - float(DIALS[row]) * static_slow.kl[t]
            assert float(reward.total[row]) == pytest.approx(plain - static, rel=1e-3, abs=2e-3)
            mean = float((widths[t, row] * tiny_nested.unit_weights).sum() / tiny_nested.unit_weights.sum())
            assert float(facts.mean_bit_width[row]) == pytest.approx(mean)


def test_static_policy_has_no_advantage_over_itself(
    tiny_episodes: Callable[..., Episodes], tiny_nested: NestedCausalLM, tiny_profile: Profile
) -> None:
    episodes = tiny_episodes()
    task = LossyTask(tiny_nested, tiny_profile, CONFIG, static=static_by_dial)
    start(episodes, dials=DIALS)
    task.start(episodes, torch.arange(ROWS))
    rewards = [task.reward(episodes.step(Decision(static_by_dial(DIALS)))) for _ in range(STEPS)]
    advantage = torch.stack([reward.total for reward in rewards])
    torch.testing.assert_close(advantage, torch.zeros_like(advantage), rtol=0, atol=2e-3)  # 1e-5 nats at a dial of 200
    assert torch.stack([reward.terms["reward_plain"] for reward in rewards]).std() > 0.01


def test_text_read_at_given_widths_is_text_decoded_at_them(tiny_episodes: Callable[..., Episodes]) -> None:
    episodes = tiny_episodes()
    start(episodes)
    widths = torch.tensor([[3, 4, 5], [8, 8, 3], [6, 5, 4]])
    whole = episodes.text_kl_nats(torch.arange(ROWS), widths)
    some = episodes.text_kl_nats(torch.tensor([2, 0]), widths[[2, 0]])
    steps = [episodes.step(Decision(widths)) for _ in range(STEPS)]
    torch.testing.assert_close(whole, column(steps, "output_kl_nats"), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(some, whole[[2, 0]], rtol=1e-3, atol=1e-6)


def test_the_controller_decides_where_no_decision_is_given(tiny_episodes: Callable[..., Episodes]) -> None:
    """With a policy: the same facts as with its decisions, made from the same signals."""
    by_hand, by_policy = tiny_episodes(), tiny_episodes()
    widths = torch.tensor([4, 3, 6])
    by_policy.controller.policy = StaticAllocation("static", widths)
    start(by_hand)
    start(by_policy)
    for _ in range(STEPS):
        assert torch.equal(by_hand.signals(), by_policy.signals())
        given, decided = by_hand.step(Decision(widths.expand(ROWS, -1))), by_policy.step()
        assert torch.equal(given.decision.bit_widths, decided.decision.bit_widths)
        assert torch.equal(given.output_kl_nats, decided.output_kl_nats)


def test_full_width_without_loss_earns_nothing(fake_model: FakeModel, fake_model_profile: Profile) -> None:
    windows = fake_windows(1, CONFIG.window_tokens)
    episodes = fake_episodes(windows)
    start(episodes)
    facts = episodes.step(at(8))
    reward = LossyTask(fake_model, fake_model_profile, CONFIG).reward(facts)
    assert float(reward.terms["time_saved"]) == 0.0
    loss = float(fake_model.own_kl_nats(windows[:, PROMPT], torch.full((1, 4), 8)))
    assert 0 < loss < 1e-3
    assert float(reward.total) == pytest.approx(-loss, abs=1e-6)


def test_a_nested_model_alone_is_compared_with_its_largest_width() -> None:
    episodes = fake_episodes(model=FakeModel(has_reference=False))
    start(episodes)
    assert float(episodes.step(at(8)).output_kl_nats) == 0.0
    assert float(episodes.step(at(3)).output_kl_nats) > 0.1


def test_free_greedy_reads_its_own_tokens(
    tiny_episodes: Callable[..., Episodes], tiny_nested: NestedCausalLM, tiny_windows: Tensor
) -> None:
    widths = random_widths(tiny_nested.bit_widths, 3, STEPS, ROWS, seed=1)
    episodes = tiny_episodes(dataclasses.replace(CONFIG, source="free"))
    start(episodes)
    steps = [episodes.step(Decision(widths[t])) for t in range(STEPS)]
    for row in range(ROWS):
        slow = decode_alone(tiny_nested, tiny_windows[row], widths[:, row], lambda logits: int(logits.argmax()))
        assert slow.tokens != tiny_windows[row, PROMPT : PROMPT + STEPS].tolist()
        torch.testing.assert_close(column(steps, "output_kl_nats")[row], torch.tensor(slow.kl), rtol=1e-3, atol=1e-6)
        assert column(steps, "top1_agreement")[row].tolist() == slow.agrees
    assert column(steps, "token_nll_nats").isnan().all()
    assert column(steps, "truncated")[:, -1].all()


class RecordingSession(FakeSession):
    """Keeps the tokens that it is told to read; its forks keep theirs."""

    def __init__(self, model: FakeModel, *, num_rows: int, max_length: int = 256) -> None:
        super().__init__(model, num_rows=num_rows, max_length=max_length)
        self.read: list[Tensor] = []
        self.forks: list[RecordingSession] = []

    def step(self, token_ids: Tensor, bit_widths: Tensor, **kwargs: Any) -> StepOutput:
        self.read.append(token_ids.clone())
        return super().step(token_ids, bit_widths, **kwargs)

    def fork(self) -> RecordingSession:
        self.forks.append(RecordingSession(self.model, num_rows=len(self.lengths), max_length=self.max_length))
        return self.forks[-1]


def sampled_tokens(seeds: list[int], *, temperature: float = 1.0, steps: int = 20) -> Tensor:
    """`[R, steps]` tokens that a free continuation reads, and its reference with it."""
    model = FakeModel()
    config = EnvConfig(prompt_tokens=4, max_new_tokens=steps, source="free", temperature=temperature)
    session = RecordingSession(model, num_rows=len(seeds))
    episodes = Episodes(session, fake_profile(model), fake_windows(1, config.window_tokens), config)
    start(episodes, torch.zeros(len(seeds), dtype=torch.int64), seeds=torch.tensor(seeds))
    for _ in range(steps):
        episodes.step(at(5, rows=len(seeds)))
    (reference,) = session.forks
    assert torch.equal(torch.stack(reference.read), torch.stack(session.read))
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


@pytest.mark.parametrize("eos", [(30,), (29, 30), (30, 7, 29)])
@pytest.mark.parametrize(("place", "ends"), [(1, 1), (3, 3), (STEPS, STEPS)])
def test_eos_in_the_text_terminates(place: int, ends: int, eos: tuple[int, ...]) -> None:
    windows = fake_windows(2, CONFIG.window_tokens).clamp_min(8)
    windows[0, PROMPT + place] = 30
    episodes = fake_episodes(windows, rows=2, eos_token_ids=eos)
    start(episodes)
    for number in range(1, ends + 1):
        facts = episodes.step(at(8, rows=2))
        assert facts.terminated.tolist() == [number == ends, False]
        assert facts.truncated.tolist() == [False, number == STEPS]


def test_eos_of_the_model_terminates_a_free_continuation() -> None:
    greedy = sampled_tokens([0], temperature=0.0, steps=STEPS)[0]
    eos = int(greedy[3])
    first = greedy.tolist().index(eos)
    episodes = fake_episodes(config=dataclasses.replace(CONFIG, source="free"), eos_token_ids=(eos,))
    start(episodes)
    terminated = [bool(episodes.step(at(5)).terminated) for _ in range(first)]
    assert first > 0
    assert terminated == [False] * (first - 1) + [True]


def test_without_an_eos_token_only_the_limit_ends() -> None:
    windows = fake_windows(1, CONFIG.window_tokens)
    windows[0, PROMPT + 2] = 30
    episodes = fake_episodes(windows)
    start(episodes)
    steps = [episodes.step(at(8)) for _ in range(STEPS)]
    assert not column(steps, "terminated").any()
    assert column(steps, "truncated").tolist() == [[False] * (STEPS - 1) + [True]]


def test_probes_show_the_kl_and_are_paid_for(fake_model_profile: Profile) -> None:
    episodes = fake_episodes(config=dataclasses.replace(CONFIG, probe_every=3))
    start(episodes)
    cost = fake_model_profile.cost
    plain_ms, full_ms = (float(cost.latency_ms(torch.full((1, 4), width))) for width in (4, 8))
    floor = -3.0  # log10(1e-6) / 2
    shown = floor
    for number in range(1, STEPS + 1):
        facts = episodes.step(at(4))
        is_probe = number % 3 == 0
        assert float(facts.latency_ms) == pytest.approx(plain_ms + full_ms * is_probe)
        assert facts.full_latency_ms == pytest.approx(full_ms)
        if is_probe:
            shown = math.log10(float(facts.output_kl_nats)) / 2
        signals = episodes.signals()[0]
        assert float(signals[episodes.schema.index("probe_kl")]) == pytest.approx(shown, abs=1e-5)
        age = float(signals[episodes.schema.index("tokens_since_probe")])
        expected_age = math.log1p(number % 3) / math.log1p(256) if number >= 3 else 1.0
        assert age == pytest.approx(expected_age, abs=1e-5)
    assert shown > floor


def test_restarting_a_row_leaves_the_others_alone(
    tiny_episodes: Callable[..., Episodes], tiny_nested: NestedCausalLM, tiny_profile: Profile
) -> None:
    widths = random_widths(tiny_nested.bit_widths, 3, STEPS, ROWS, seed=2)

    def build() -> tuple[Episodes, LossyTask]:
        return tiny_episodes(), LossyTask(tiny_nested, tiny_profile, CONFIG, static=static_by_dial)

    def play(episodes: Episodes, task: LossyTask, times: range) -> dict[str, Tensor]:
        steps = [episodes.step(Decision(widths[t])) for t in times]
        columns = {
            name: column(steps, name) for name in ("output_kl_nats", "token_nll_nats", "latency_ms", "truncated")
        }
        return columns | {"reward": torch.stack([task.reward(facts).total for facts in steps], dim=1)}

    undisturbed = build()
    start(undisturbed[0], dials=DIALS)
    undisturbed[1].start(undisturbed[0], torch.arange(ROWS))
    expected = play(*undisturbed, range(STEPS))

    episodes, task = build()
    start(episodes, dials=DIALS)
    task.start(episodes, torch.arange(ROWS))
    before = play(episodes, task, range(2))
    one = torch.tensor([1])
    start(episodes, torch.tensor([3]), dials=torch.tensor([5.0]), rows=one)
    task.start(episodes, one)
    assert episodes.schema.is_first_step(episodes.signals()).tolist() == [False, True, False]
    after = play(episodes, task, range(2, STEPS))
    for name, tensor in expected.items():
        both = torch.cat([before[name], after[name]], dim=1)
        torch.testing.assert_close(both[[0, 2]], tensor[[0, 2]], rtol=1e-3, atol=2e-4, msg=name)

    fresh, fresh_task = build()
    start(fresh, torch.full((ROWS,), 3), dials=torch.full((ROWS,), 5.0))
    fresh_task.start(fresh, torch.arange(ROWS))
    for name, tensor in play(fresh, fresh_task, range(2, STEPS)).items():
        torch.testing.assert_close(after[name][1], tensor[1], rtol=1e-3, atol=2e-4, msg=name)
    assert not after["truncated"][1, -1]


@pytest.mark.parametrize("source", ["replay", "free"])
def test_restarts_are_exact_without_a_model(source: Source) -> None:
    model = FakeModel(carry=0.5)
    config = dataclasses.replace(CONFIG, source=source, temperature=1.0)
    widths = random_widths(model.bit_widths, 4, STEPS, 3, seed=4)
    whole, mixed = (fake_episodes(4, config, rows=3, model=model) for _ in range(2))
    task = LossyTask(model, fake_profile(model), config)
    start(whole)
    start(mixed, torch.tensor([0, 3, 2]))
    mixed.step(Decision(widths[0]))
    shuffled = torch.tensor([2, 0, 1])
    start(mixed, shuffled, rows=shuffled)  # all, in any order
    for t in range(STEPS):
        assert torch.equal(whole.signals(), mixed.signals())
        one, other = whole.step(Decision(widths[t])), mixed.step(Decision(widths[t]))
        assert torch.equal(task.reward(one).total, task.reward(other).total)
        assert torch.equal(one.truncated, other.truncated)


def test_the_reference_of_the_same_text_is_not_mixed_up(fake_model: FakeModel) -> None:
    """Starting with the text of the last start reuses its reference, also after a row has been restarted between."""
    windows = fake_windows(3, CONFIG.window_tokens)
    episodes = fake_episodes(windows, rows=2)

    def check(chosen: list[int]) -> None:
        start(episodes, torch.tensor(chosen))
        expected = fake_model.own_kl_nats(windows[chosen, PROMPT], torch.full((2, 4), 4)).float()
        torch.testing.assert_close(episodes.step(at(4, rows=2)).output_kl_nats, expected, rtol=1e-4, atol=1e-6)

    for chosen in ([0, 1], [0, 1], [1, 2], [0, 1]):
        check(chosen)
    start(episodes, torch.tensor([2]), rows=torch.tensor([1]))
    check([0, 1])


def test_the_reference_of_the_same_text_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    score = FakeSession.score
    monkeypatch.setattr(FakeSession, "score", lambda self, *args, **kw: scored.append(1) or score(self, *args, **kw))
    episodes = fake_episodes(3, rows=2)
    for windows in ([0, 1], [0, 1], [0, 1], [1, 2]):
        start(episodes, torch.tensor(windows))
    assert len(scored) == 2


def test_signals_carry_dial_and_position() -> None:
    episodes = fake_episodes(2, rows=2)
    start(episodes, dials=torch.tensor([10.0, 100.0]))
    dial, position = (episodes.schema.index(name) for name in ("dial", "position"))
    assert episodes.signals()[:, dial].tolist() == pytest.approx([1.0, 2.0])
    assert episodes.signals()[:, position].tolist() == [0.0, 0.0]
    widths = torch.tensor([[3, 4, 5, 6], [8, 8, 3, 3]])
    episodes.step(Decision(widths))
    assert torch.equal(episodes.schema.last_widths(episodes.signals()), widths)
    assert episodes.kl_weight.tolist() == [10.0, 100.0]


def test_facts_are_kept_when_a_row_restarts() -> None:
    """What was reported of a step does not change with the episodes that follow."""
    episodes = fake_episodes(2, rows=2)
    start(episodes, dials=torch.tensor([10.0, 100.0]))
    facts = episodes.step(at(4, rows=2))
    start(episodes, dials=torch.tensor([1.0, 1.0]))
    episodes.step(at(4, rows=2))
    assert facts.kl_weight.tolist() == [10.0, 100.0]
    assert facts.position.tolist() == [0, 0]


def test_steps_beyond_the_limit_are_refused() -> None:
    episodes = fake_episodes()
    start(episodes)
    for _ in range(STEPS):
        episodes.step(at(8))
    with pytest.raises(InputError, match="do not fit"):
        episodes.step(at(8))


@pytest.mark.parametrize("source", ["replay", "free"])
def test_measured_steps_take_wall_clock_time(tiny_episodes: Callable[..., Episodes], source: Source) -> None:
    episodes = tiny_episodes(dataclasses.replace(CONFIG, source=source), rows=1, measured=True)
    start(episodes)
    times = []
    for number in range(STEPS):
        facts = episodes.step(at(3, 3, 3))
        assert facts.position.tolist() == [number], "timing full-width steps moves nothing"
        times.append(float(facts.latency_ms))
        assert facts.full_latency_ms > 0.01  # the roofline says 12 microseconds; a real step takes longer
    assert len(set(times)) > 1
    assert min(times) > 0.01


def test_several_rows_are_not_timed() -> None:
    with pytest.raises(
        InputError, match="num_envs=2: a pass over several rows takes the time of none of them"
    ) as error:
        fake_episodes(2, rows=2, measured=True)
    assert "\n" not in str(error.value)


def test_rendering_is_what_generate_prints(
    tiny_episodes: Callable[..., Episodes], tiny_windows: Tensor, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Each token on the colour of the widths that it was chosen at, the first one on that of the prompt."""
    episodes = tiny_episodes(tokenizer=tiny_tokenizer)
    assert episodes.coloured(0) == "\n" + legend((3, 4, 5, 6, 8))
    start(episodes)
    text = "".join(map(chr, tiny_windows[1, PROMPT:].tolist()))
    shown = [coloured(text[0], 8, (3, 8))]
    for number in range(1, STEPS + 1):
        assert episodes.coloured(1) == "".join(shown) + "\n" + legend((3, 4, 5, 6, 8))
        mean = float(episodes.step(at(3, 3 + number % 2, 8, rows=ROWS)).mean_bit_width[1])
        shown.append(coloured(text[number], mean, (3, 8)))
    assert episodes.coloured(1) == "".join(shown) + "\n" + legend((3, 4, 5, 6, 8))


def test_rendering_needs_a_tokenizer() -> None:
    episodes = fake_episodes()
    start(episodes)
    with pytest.raises(ValueError, match="pass the model's"):
        episodes.coloured(0)


@pytest.mark.parametrize("source", ["replay", "free"])
def test_close_frees_every_session(fake_model: FakeModel, fake_model_profile: Profile, source: Source) -> None:
    sessions = [FakeSession(fake_model)]

    def fork() -> FakeSession:
        sessions.append(FakeSession(fake_model))
        return sessions[-1]

    sessions[0].fork = fork  # type: ignore[method-assign]
    config = dataclasses.replace(CONFIG, source=source)
    episodes = Episodes(sessions[0], fake_model_profile, fake_windows(1, config.window_tokens), config)
    episodes.close()
    episodes.close()
    assert all(session.is_closed for session in sessions)
    assert len(sessions) == (2 if source == "free" else 1)
