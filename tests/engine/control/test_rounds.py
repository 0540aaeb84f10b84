"""Drafts change nothing but the time: the same tokens and ends as at the verify widths, whatever a policy drafts."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from fake_session import MarkovSession, transitions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexquant_rl.engine.control.controller import (
    DraftController,
    NativeController,
    TorchController,
    make_controller,
)
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.decision import Decision, Policy, StaticAllocation
from flexquant_rl.engine.control.draft_counts import DraftCounts
from flexquant_rl.engine.control.draft_limits import MOST_PENDING
from flexquant_rl.engine.control.drafts import Draft, DraftPolicy, RoundState
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.rounds import Rounds
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.served_drafts import drafts_at
from flexquant_rl.engine.decoding.choice import session_opener
from flexquant_rl.engine.decoding.next_token import Sampler
from flexquant_rl.engine.decoding.ngram import NgramIndex
from flexquant_rl.engine.decoding.options import DecoderName
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import Engine

pytestmark = pytest.mark.usefixtures("endless")

PROMPTS = ("hello world", "a", "abc abc abc ab", "once", "zz top of the pops")


@dataclass(eq=False)
class RandomDrafts:
    """Drafts or verifies by chance, at any widths: what no sensible policy does."""

    uses_signals: ClassVar[bool] = False

    verify_bit_widths: Tensor
    stored: tuple[int, ...]
    seed: int
    name: str = "random-drafts"
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, signals: Tensor | None, state: RoundState) -> Decision:
        if state.room == 0 or torch.rand((), generator=self.generator) < 0.3:
            return Decision(self.verify_bit_widths[None])
        choice = torch.randint(len(self.stored), (1, len(self.verify_bit_widths)), generator=self.generator)
        return Decision(torch.tensor(self.stored)[choice], verify=False)


@dataclass(frozen=True, eq=False)
class Watching:
    """Drafts so many tokens a round, and keeps the signals that it was asked with."""

    uses_signals: ClassVar[bool] = True

    name: str
    draft_bit_widths: Tensor
    verify_bit_widths: Tensor
    length: int
    seen: list[tuple[int, Tensor]] = field(default_factory=list)

    def __call__(self, signals: Tensor | None, state: RoundState) -> Decision:
        assert signals is not None
        self.seen.append((state.num_pending, signals.clone()))
        if state.room == 0 or state.num_pending >= self.length:
            return Decision(self.verify_bit_widths[None])
        return Decision(self.draft_bit_widths[None], verify=False)


@pytest.fixture
def tiny_profile() -> Callable[[NestedCausalLM], Profile]:
    """Makes a profile that nothing was measured for."""

    def make(model: NestedCausalLM) -> Profile:
        zeros = torch.zeros(model.num_units, len(model.bit_widths))
        return Profile(roofline_cost(model), zeros, model.bit_widths, model.fingerprint, 0, "8-bit")

    return make


def ids_of(text: str) -> Tensor:
    return torch.tensor([1, *map(ord, text)])


def all_at(model: NestedCausalLM, bit_width: int) -> Tensor:
    return torch.full((model.num_units,), bit_width)


def runner_of(
    model: NestedCausalLM,
    profile: Profile,
    policy: Policy | DraftPolicy,
    *,
    num_rows: int = 1,
    decoder: DecoderName = "lean",
    num_threads: int | None = None,
    ngram_drafts: int = 0,
) -> PolicyRunner:
    controller = make_controller(model, policy, profile, num_rows=num_rows)
    session = session_opener(model, decoder=decoder, num_threads=num_threads)(num_rows)
    return PolicyRunner(session, controller, ngram_drafts=ngram_drafts)


def said(tokens: list[GeneratedToken], count: int = 1) -> list[list[tuple[int, str, str | None]]]:
    """Tokens, texts and ends of each request, in order."""
    return [[(t.token_id, t.text, t.finish_reason) for t in tokens if t.request == index] for index in range(count)]


@settings(max_examples=25)
@given(
    verify=st.sampled_from([4, 6, 8]),
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 3),
    decoder=st.sampled_from(["lean", "hf"]),
    num_threads=st.sampled_from([1, 2]),
    ngram_drafts=st.sampled_from([0, 3, MOST_PENDING]),
)
def test_what_is_said_does_not_depend_on_drafts(
    nested_model: NestedCausalLM,
    profile: Profile,
    verify: int,
    seed: int,
    num_rows: int,
    decoder: DecoderName,
    num_threads: int,
    ngram_drafts: int,
) -> None:
    model = nested_model
    requests = [Request(ids_of(prompt), 5 + (seed + 11 * index) % 23) for index, prompt in enumerate(PROMPTS)]
    plain = StaticAllocation("plain", all_at(model, verify))
    want = list(runner_of(model, profile, plain, num_rows=num_rows, decoder=decoder).generate(requests))
    policy = RandomDrafts(all_at(model, verify), model.bit_widths, seed)
    threads = num_threads if decoder == "lean" else None
    runner = runner_of(
        model,
        profile,
        policy,
        num_rows=num_rows,
        decoder=decoder,
        num_threads=threads,
        ngram_drafts=ngram_drafts,
    )
    got = list(runner.generate(requests))
    assert said(got, len(PROMPTS)) == said(want, len(PROMPTS))
    first = {token.request: token for token in reversed(got)}
    for token in got:
        assert bool((token.bit_widths == (8 if token is first[token.request] else verify)).all())


@pytest.mark.parametrize("length", [1, 2, 4, MOST_PENDING])
@pytest.mark.parametrize("draft", [3, 6])
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_fixed_drafts_of_any_length_to_the_end_of_the_context(
    build: Any, tiny_profile: Callable[[NestedCausalLM], Profile], family: str, draft: int, length: int
) -> None:
    """A request that fills the row: the last rounds have fewer drafts, and never one too many."""
    model = build(family, device="cpu")
    profile = tiny_profile(model)
    request = Request(torch.randint(0, 83, (7,)), model.max_context - 7 + 1)
    assert request.num_held == model.max_context
    (want,) = said(list(runner_of(model, profile, StaticAllocation("plain", all_at(model, 8))).generate([request])))
    policy = drafts_at("fixed", all_at(model, draft), all_at(model, 8), length=length)
    tokens = list(runner_of(model, profile, policy).generate([request]))
    assert said(tokens) == [want]
    assert want[-1][2] == "length"
    counts = tokens[-1].draft_counts
    assert counts is not None
    assert counts.num_tokens == request.max_new_tokens - 1
    assert counts.num_draft_steps == sum(counts.drafted) > 0
    assert len(counts.drafted) <= length


@pytest.mark.parametrize("place", range(2, 9))
def test_eos_and_stop_strings_end_a_text_within_a_round(
    nested_model: NestedCausalLM, profile: Profile, place: int
) -> None:
    """At every place of a round: what follows the end is dropped, and held back text comes out."""
    model, tokenizer = nested_model, nested_model.tokenizer
    plain = StaticAllocation("plain", all_at(model, 8))
    drafts = drafts_at("same", all_at(model, 8), all_at(model, 8), length=4)  # width 8 drafts are all accepted
    request = Request(ids_of("hello"), 20)
    free = list(runner_of(model, profile, plain).generate([request], tokenizer))
    ids, text = [token.token_id for token in free], "".join(token.text for token in free)
    for asked in (
        replace(request, eos_token_ids=(ids[place],)),
        replace(request, stop=(text[place : place + 2],)),
        replace(request, max_new_tokens=place),
    ):
        want = list(runner_of(model, profile, plain).generate([asked], tokenizer))
        got = list(runner_of(model, profile, drafts).generate([asked], tokenizer))
        assert said(got) == said(want)
        assert got[-1].finish_reason is not None
        assert got[-1].finish_reason == want[-1].finish_reason
        counts = got[-1].draft_counts
        if counts is None:
            assert len(got) == 1, "the first token, which is of the prompt, is the end"
            continue
        assert counts.num_tokens == len(got) - 1, "what is dropped counts for nothing"
        assert sum(counts.accepted) == sum(counts.drafted), "at the verify width every draft is accepted"
        if got[-1].finish_reason == "eos":
            assert counts.num_draft_steps <= counts.num_tokens, "nothing is drafted behind an end"


@pytest.mark.parametrize("place", range(1, 9))
def test_a_cancelled_request_ends_with_its_next_token(
    nested_model: NestedCausalLM, profile: Profile, place: int
) -> None:
    drafts = drafts_at("same", all_at(nested_model, 8), all_at(nested_model, 8), length=4)
    request = Request(ids_of("hello"), 30, cancel=threading.Event())
    tokens = []
    for token in runner_of(nested_model, profile, drafts).generate([request]):
        tokens.append(token)
        if len(tokens) == place:
            request.cancel.set()
    assert len(tokens) == place + 1
    assert tokens[-1].finish_reason == "cancelled"


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_signals_after_a_round_are_those_of_plain_decoding(
    nested_model: NestedCausalLM, profile: Profile, kind: str
) -> None:
    """Bit for bit, with rejected drafts in between: they leave no trace."""
    model = nested_model
    full = all_at(model, 8)

    def signals_of(length: int) -> tuple[list[Tensor], list[int]]:
        policy = Watching("watching", all_at(model, 3), full, length)
        runner = runner_of(model, profile, policy)
        if kind == "torch":
            runner.controller = DraftController(policy, TorchController(model, None, profile))
        tokens = list(runner.generate([Request(ids_of("hello"), 30)]))
        counts = tokens[-1].draft_counts
        assert counts is not None
        starts = [signals for num_pending, signals in policy.seen if num_pending == 0]
        return starts, counts.accepted

    class Plain(Watching):
        """Never drafts."""

        def __call__(self, signals: Tensor | None, state: RoundState) -> Decision:
            assert signals is not None
            self.seen.append((0, signals.clone()))
            return Decision(full[None])

    plain = Plain("plain", full, full, 1)
    runner = runner_of(model, profile, plain)
    assert isinstance(runner.controller, DraftController)
    if kind == "torch":
        runner.controller = DraftController(plain, TorchController(model, None, profile))
    else:
        assert isinstance(runner.controller._signals, NativeController)
    list(runner.generate([Request(ids_of("hello"), 30)]))
    every = {tuple(signals[0].tolist()) for _, signals in plain.seen}
    starts, accepted = signals_of(3)
    assert len(starts) > 3
    assert sum(accepted) < 3 * len(starts), "drafts that are all accepted prove little"
    assert all(tuple(signals[0].tolist()) in every for signals in starts)


def test_drafting_moves_the_signals_on(nested_model: NestedCausalLM, profile: Profile) -> None:
    policy = Watching("watching", all_at(nested_model, 3), all_at(nested_model, 8), 2)
    list(runner_of(nested_model, profile, policy).generate([Request(ids_of("hello"), 6)]))
    first, second, third = (signals for _, signals in policy.seen[:3])
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_likelihoods_are_those_of_the_verify_widths(nested_model: NestedCausalLM, profile: Profile) -> None:
    pairs = [([1, 104], [105, 106, 107]), ([1], [98, 99])]
    verify = all_at(nested_model, 6)
    drafts = drafts_at("d", all_at(nested_model, 3), verify, length=3)
    plain = StaticAllocation("plain", verify)
    want = runner_of(nested_model, profile, plain, num_rows=2).loglikelihood(pairs, 1.0)
    assert runner_of(nested_model, profile, drafts, num_rows=2).loglikelihood(pairs, 1.0) == want


def test_a_policy_that_drafts_without_room_is_told(nested_model: NestedCausalLM, profile: Profile) -> None:
    class Endless(Watching):
        def __call__(self, signals: Tensor | None, state: RoundState) -> Decision:
            return Decision(self.draft_bit_widths[None], verify=False)

    policy = Endless("endless", all_at(nested_model, 3), all_at(nested_model, 8), 1)
    with pytest.raises(ValueError, match=r"RoundState.room is 0"):
        list(runner_of(nested_model, profile, policy).generate([Request(ids_of("hello"), 40)]))


def test_what_is_found_in_the_text_is_verified_at_once(nested_model: NestedCausalLM, profile: Profile) -> None:
    """Nobody is asked in such a round, nothing is drafted, and the history stays that of the policy's own rounds."""
    policy = Watching("watching", all_at(nested_model, 3), all_at(nested_model, 8), 2)
    runner = runner_of(nested_model, profile, policy)
    prompt = ids_of("abc abx abc abx abc ab")
    runner.start(prompt[None], torch.ones(1))
    assert isinstance(runner.controller, DraftController)
    rounds = Rounds(runner.decoder, runner.controller, Sampler(1), ngram_drafts=4)
    text = [int(runner.upcoming_token_ids[0])]
    rounds.begin(0, prompt.tolist(), text[0])
    most, found, doubts = 4, 0, 0
    while len(text) < 40:
        asked, steps, history = len(policy.seen), rounds.counts(0).num_draft_steps, rounds.state(0, 40).history
        before = rounds.counts(0).num_found, rounds.counts(0).num_found_accepted
        wanted = NgramIndex([*prompt.tolist(), *text]).continuation(most)
        settled = rounds.step(0, 40)
        if wanted:
            assert len(wanted) <= most
            assert settled is not None
            assert settled.token_ids[:-1] == wanted[: len(settled.token_ids) - 1]
            assert bool((settled.bit_widths == 8).all())
            assert (asked, steps) == (len(policy.seen), rounds.counts(0).num_draft_steps)
            assert rounds.state(0, 40).history is history
            counts = rounds.counts(0)
            new = counts.num_found - before[0], counts.num_found_accepted - before[1]
            assert new == (len(wanted), len(settled.token_ids) - 1)
            found += 1
            most = 4 if 2 * new[1] >= new[0] else 2  # a lookup that was mostly wrong makes the next one short
            doubts += most == 2
        while settled is None:
            settled = rounds.step(0, 40)
        text += settled.token_ids
    assert found > doubts > 0
    assert policy.seen, "where nothing is found the policy is asked"


def test_a_policy_looks_up_what_it_was_made_to(nested_model: NestedCausalLM, profile: Profile) -> None:
    """Unless the caller says otherwise; a policy of somebody else's looks nothing up."""
    widths = (all_at(nested_model, 3), all_at(nested_model, 8))
    ours = drafts_at("ours", *widths, length=2, ngram_drafts=5)
    request = Request(ids_of("abc abx abc abx abc ab"), 30)

    def counts(policy: DraftPolicy, ngram_drafts: int | None) -> DraftCounts:
        controller = make_controller(nested_model, policy, profile)
        runner = PolicyRunner(session_opener(nested_model)(1), controller, ngram_drafts=ngram_drafts)
        *_, last = runner.generate([request])
        assert last.draft_counts is not None
        return last.draft_counts

    assert counts(ours, None) == counts(ours, 5) != counts(ours, 0)
    assert counts(ours, 5).num_found > 2
    assert counts(ours, 0).num_found == 0
    others = Watching("others", *widths, 2)
    assert counts(others, None).num_found == 0
    engine = Engine(nested_model, ours, profile)
    *_, last = engine.generate(request)
    assert last.draft_counts == counts(ours, 5)
    engine.close()


@pytest.mark.parametrize("ngram_drafts", [0, 5])
def test_sampled_rows_together_equal_each_alone(
    nested_model: NestedCausalLM, profile: Profile, ngram_drafts: int
) -> None:
    """Each row has a generator of its own, and a round of its own; the same seed gives the same text."""
    policy = drafts_at("d", all_at(nested_model, 4), all_at(nested_model, 8), length=3, min_confidence=0.2)
    requests = [
        Request(ids_of(prompt), 9 + 2 * index, temperature=0.7, top_p=0.9, seed=index)
        for index, prompt in enumerate(PROMPTS)
    ]
    together = list(runner_of(nested_model, profile, policy, num_rows=2, ngram_drafts=ngram_drafts).generate(requests))
    for index, request in enumerate(requests):
        alone = list(runner_of(nested_model, profile, policy, ngram_drafts=ngram_drafts).generate([request]))
        assert said(alone) == [said(together, len(requests))[index]]
        assert len(alone) == request.max_new_tokens


def wanted_distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """By sorting and adding, in float64."""
    probs = (logits.double() / temperature).softmax(-1)
    kept = torch.zeros_like(probs)
    total = 0.0
    for index in sorted(range(len(probs)), key=lambda place: -float(probs[place])):
        if total >= top_p:
            break
        kept[index] = probs[index]
        total += float(probs[index])
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "ngram_drafts"), [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.3, 0.8, 0), (1.0, 0.9, 3)]
)
def test_sampled_drafts_leave_the_distribution_as_it_is(temperature: float, top_p: float, ngram_drafts: int) -> None:
    """Three tokens after a prompt against exact enumeration, by chi-square."""
    num_trials, text = 1500, 3
    widths = torch.full((4,), 8)
    policy = drafts_at("d", torch.full((4,), 3), widths, length=2)
    session = MarkovSession()
    sampler = Sampler(1)
    sampler.start(0, temperature=temperature, top_p=top_p, seed=7)
    rounds = Rounds(session, DraftController(policy, None), sampler, ngram_drafts=ngram_drafts)
    prompt = [0, 1, 2, 0, 1]
    counts: dict[tuple[int, ...], int] = {}
    num_drafts, num_accepted = 0, 0
    for _ in range(num_trials):
        session._lengths = torch.tensor([len(prompt)])
        rounds.begin(0, prompt, 2)
        cell: list[int] = []
        while len(cell) < text:
            settled = rounds.step(0, text - len(cell))
            cell += settled.token_ids if settled is not None else []
        counts[tuple(cell)] = counts.get(tuple(cell), 0) + 1
        num_drafts += sum(rounds.counts(0).drafted)
        num_accepted += sum(rounds.counts(0).accepted)
    assert 0.2 < num_accepted / num_drafts < 0.95, "all accepted or none, either proves little"
    table = [wanted_distribution(row, temperature, top_p) for row in transitions(8)]
    statistic, num_cells = 0.0, 0
    for said_tokens in itertools.product(range(3), repeat=text):
        steps = zip((2, *said_tokens), said_tokens, strict=False)
        expected = num_trials * float(torch.stack([table[before][after] for before, after in steps]).prod())
        if expected < 1e-9:
            assert said_tokens not in counts, "a token outside the nucleus"
            continue
        statistic += (counts.get(said_tokens, 0) - expected) ** 2 / expected
        num_cells += 1
    freedom = torch.tensor((num_cells - 1) / 2, dtype=torch.float64)
    p_value = float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))
    assert p_value > 1e-3, (statistic, num_cells)


def test_fixed_drafts_stop_at_their_length_and_at_an_unsure_draft() -> None:
    low, high = torch.full((2,), 3), torch.full((2,), 8)
    policy = drafts_at("d", low, high, length=3, min_confidence=0.4)
    sure = Draft(1, low, torch.tensor([0.0, 3.0, 0.0]))
    unsure = Draft(1, low, torch.tensor([0.0, 0.05, 0.0]))
    found = Draft(1)
    assert sure.confidence == pytest.approx(float(torch.tensor([0.0, 3.0, 0.0]).softmax(-1)[1]))
    assert found.confidence is None

    def verifies(*pending: Draft, room: int = 5) -> bool:
        decision = policy(None, RoundState(pending, room))
        assert torch.equal(decision.bit_widths, (high if decision.verify else low)[None])
        return decision.verify

    assert not verifies()
    assert verifies(room=0)
    assert not verifies(sure, sure)
    assert not verifies(found)
    assert not verifies(unsure, sure)
    assert verifies(sure, unsure)
    assert verifies(sure, sure, sure)


@pytest.mark.parametrize("wrong", [-1, MOST_PENDING + 1, 2.5, 0.0, "x", "", True])
def test_ngram_drafts_that_no_round_holds(nested_model: NestedCausalLM, profile: Profile, wrong: Any) -> None:
    low, high = all_at(nested_model, 3), all_at(nested_model, 8)
    policy = drafts_at("d", low, high, length=3)
    message = re.escape(f"ngram_drafts={wrong!r} must be 0 to 15, a whole number")
    with pytest.raises(InputError, match=message):
        runner_of(nested_model, profile, policy, ngram_drafts=wrong)
    with pytest.raises(InputError, match=message):
        drafts_at("d", low, high, length=3, ngram_drafts=wrong)
    with pytest.raises(InputError, match=message):
        Engine(nested_model, policy, profile, ngram_drafts=wrong)


def test_counts_by_position() -> None:
    counts = DraftCounts()
    assert counts.tokens_per_pass is None
    for num_pending, num_accepted in ((3, 3), (2, 0), (0, 0), (1, 1)):
        counts.add_round(num_pending, num_accepted)
    assert counts.drafted == [3, 2, 1]
    assert counts.accepted == [2, 1, 1]
    assert counts.acceptance_by_position == [2 / 3, 1 / 2, 1.0]
    assert counts.tokens_per_pass == 8 / 4


def test_what_is_dropped_does_not_count() -> None:
    counts = DraftCounts()
    counts.add_round(2, 1)
    counts.add_round(4, 3)
    counts.drop(2)  # of three accepted drafts and the token gained, two drafts were taken
    assert (counts.drafted, counts.accepted) == ([2, 2], [2, 1])
    assert counts.num_tokens == 2 + 2
    counts.add_round(3, 1)
    counts.drop(1)
    assert (counts.drafted, counts.accepted, counts.num_tokens) == ([3, 2], [3, 1], 5)
    counts.add_round(7, 5, is_found=True)
    assert (counts.num_found, counts.num_found_accepted, counts.num_tokens) == (7, 5, 11)
    counts.drop(3)  # of five accepted and the token gained, three were taken
    assert (counts.num_found, counts.num_found_accepted, counts.num_tokens) == (3, 3, 8)
    assert counts.drafted == [3, 2], "counted apart"
