"""The loop over tokens: rows of different lengths, the ends of a text, likelihoods under a policy that switches."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_profile
from torch import Tensor

from flexquant_rl.engine.control.controller import TorchController, make_controller
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.decision import Decision, Policy, StaticAllocation
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.served_drafts import drafts_at
from flexquant_rl.engine.control.streamed_text import StopStrings
from flexquant_rl.engine.decoding.choice import default_decoder, session_opener
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.decoding.next_token import Replay, nucleus
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM

pytestmark = pytest.mark.usefixtures("endless")

PROMPTS = ("hello world", "a", "what is this", "once", "zz top of the pops")


class Switching:
    """Widths that depend on the signals and so change from token to token."""

    name = "switching"

    def __call__(self, signals: Tensor) -> Decision:
        wide = (signals[:, :12].sum(1) * 7).floor().remainder(3)[:, None]
        low, middle, high = torch.tensor([3, 4, 5]), torch.tensor([6, 3, 4]), torch.tensor([5, 8, 6])
        return Decision(torch.where(wide == 0, low, torch.where(wide == 1, middle, high)))


@pytest.fixture(scope="module")
def profile(nested_model: NestedCausalLM) -> Profile:
    sensitivity = torch.rand(nested_model.num_units, 5, generator=torch.Generator().manual_seed(0))
    cost = roofline_cost(nested_model)
    return Profile(cost, sensitivity, nested_model.bit_widths, nested_model.fingerprint, 10, "unquantised")


def runner_of(model: NestedCausalLM, profile: Profile, num_rows: int, policy: Policy | None = None) -> PolicyRunner:
    controller = make_controller(model, policy or Switching(), profile, num_rows=num_rows)
    return PolicyRunner(session_opener(model)(num_rows), controller)


def ids_of(text: str) -> Tensor:
    return torch.tensor([1, *map(ord, text)])


def by_request(tokens: list[GeneratedToken], count: int) -> list[list[GeneratedToken]]:
    return [[token for token in tokens if token.request == index] for index in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_rows_together_equal_each_alone(nested_model: NestedCausalLM, profile: Profile, temperature: float) -> None:
    """Five requests of different lengths through two rows: the same tokens and widths as one after the other."""
    requests = [
        Request(ids_of(prompt), 4 + 3 * index, kl_weight=5.0, temperature=temperature, top_p=0.9, seed=index)
        for index, prompt in enumerate(PROMPTS)
    ]
    together = list(runner_of(nested_model, profile, 2).generate(requests))
    for index, (own, request) in enumerate(zip(by_request(together, 5), requests, strict=True)):
        (alone,) = by_request(list(runner_of(nested_model, profile, 1).generate([request])), 1)
        assert [token.token_id for token in own] == [token.token_id for token in alone], index
        for ours, theirs in zip(own, alone, strict=True):
            assert torch.equal(ours.bit_widths, theirs.bit_widths)
        assert [token.finish_reason for token in own] == [None] * (request.max_new_tokens - 1) + ["length"]
    assert len({tuple(token.bit_widths.tolist()) for token in together}) > 2, (
        "a policy that never switches proves little"
    )


def test_any_of_several_tokens_ends_a_text(
    nested_model: NestedCausalLM, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(ids_of("hello"), 12)
    free = [token.token_id for token in runner_of(nested_model, profile, 1).generate([request])]
    eos = (126, free[5])
    asked = replace(request, eos_token_ids=eos)
    monkeypatch.setattr(NestedCausalLM, "eos_token_ids", eos)
    for same in (asked, request):  # named by the request, or by the model
        ended = list(runner_of(nested_model, profile, 1).generate([same]))
        assert [token.token_id for token in ended] == free[: free.index(free[5]) + 1]
        assert ended[-1].finish_reason == "eos"
    unending = list(runner_of(nested_model, profile, 1).generate([replace(request, eos_token_ids=())]))
    assert [token.token_id for token in unending] == free


def test_a_stop_string_over_two_tokens_ends_a_text(nested_model: NestedCausalLM, profile: Profile) -> None:
    request = Request(ids_of("hello"), 12)
    tokenizer = nested_model.tokenizer
    free = "".join(token.text for token in runner_of(nested_model, profile, 1).generate([request], tokenizer))
    stop = free[4:6]
    tokens = list(runner_of(nested_model, profile, 1).generate([replace(request, stop=("\0never", stop))], tokenizer))
    assert "".join(token.text for token in tokens) == free[: free.index(stop)]
    assert tokens[-1].finish_reason == "stop"
    assert len(tokens) < 12


def test_stop_strings_hold_back_what_may_become_one() -> None:
    stop = StopStrings(["</end>", "END"])
    assert [stop.add(piece) for piece in ("a<", "/", "b", "EN", "x")] == ["a", "", "</b", "", "ENx"]
    assert [stop.add("y</"), stop.add("end> and more")] == ["y", ""]
    assert stop.is_found
    unfinished = StopStrings(["END"])
    assert unfinished.add("the E") == "the "
    assert unfinished.finish() == "E"
    assert not unfinished.is_found


def test_a_cancelled_request_ends_with_its_next_token(nested_model: NestedCausalLM, profile: Profile) -> None:
    cancelled, other = Request(ids_of("hello"), 30, cancel=threading.Event()), Request(ids_of("world"), 5)
    tokens = []
    for token in runner_of(nested_model, profile, 2).generate([cancelled, other]):
        tokens.append(token)
        if len(tokens) == 4:
            cancelled.cancel.set()
    first, second = by_request(tokens, 2)
    assert first[-1].finish_reason == "cancelled"
    assert len(first) == 3
    assert [token.finish_reason for token in second] == [None] * 4 + ["length"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": torch.zeros(0, dtype=torch.int64)}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"prompt_ids": torch.tensor([500])}, "token 500 is outside the vocabulary of 128"),
        ({"max_new_tokens": 500}, "6 tokens of prompt and 500 new ones do not fit into a row of 128"),
        ({"kl_weight": 0.0}, "kl_weight=0 must be positive"),
        ({"kl_weight": float("nan")}, "kl_weight=nan must be positive"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"top_p": 0.0}, "top_p=0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(
    nested_model: NestedCausalLM, profile: Profile, changes: dict[str, object], message: str
) -> None:
    good = Request(ids_of("hello"), 3)
    runner = runner_of(nested_model, profile, 1)
    with pytest.raises(InputError, match=message):
        next(runner.generate([good, replace(good, **changes)]))
    assert runner.decoder.lengths.tolist() == [0]


def test_stop_strings_need_a_tokenizer(nested_model: NestedCausalLM, profile: Profile) -> None:
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        next(runner_of(nested_model, profile, 1).generate([Request(ids_of("a"), 3, stop=("b",))]))


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_sum() -> None:
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert nucleus(probs, 0.5).tolist() == pytest.approx([0, 0.4, 0, 0.3])
    assert nucleus(probs, 0.4).tolist() == pytest.approx([0, 0.4, 0, 0])
    assert nucleus(probs, 1e-9).tolist() == pytest.approx([0, 0.4, 0, 0])
    assert nucleus(probs, 1.0).tolist() == pytest.approx(probs.tolist())


PAIRS = [("hello ", "world"), ("a", "b"), ("what is ", "this thing"), ("once", " upon a time"), ("x", "yz")]


def manual(model: NestedCausalLM, profile: Profile, context: str, continuation: str) -> tuple[float, bool]:
    """One pair by hand: a session, a controller, one token after the other."""
    session, controller = session_opener(model)(1), make_controller(model, Switching(), profile)
    ids = [ord(letter) for letter in continuation]
    output = session.prefill(ids_of(context)[None])
    nats, greedy = 0.0, True
    for index, token in enumerate(ids):
        log_probs = output.logits.double().log_softmax(-1)[0]
        nats += float(log_probs[token])
        greedy &= int(log_probs.argmax()) == token
        if index == 0:
            controller.reset(output, torch.tensor([token]), torch.tensor([5.0]))
        else:
            controller.update(output, widths, torch.tensor([token]))  # noqa: F821  # set in the round before
        widths = controller.decide().bit_widths
        if index + 1 < len(ids):
            output = session.step(torch.tensor([token]), widths)
    return nats, greedy


@pytest.mark.parametrize("num_rows", [1, 2, 8])
def test_likelihoods_equal_decoding_by_hand(nested_model: NestedCausalLM, profile: Profile, num_rows: int) -> None:
    pairs = [(ids_of(context).tolist(), [ord(c) for c in text]) for context, text in PAIRS]
    greedy_text = [
        token.token_id for token in runner_of(nested_model, profile, 1).generate([Request(ids_of("q"), 4, 5.0)])
    ]
    pairs.append((ids_of("q").tolist(), greedy_text))
    found = runner_of(nested_model, profile, num_rows).loglikelihood(pairs, kl_weight=5.0)
    for likelihood, (context, text) in zip(found, PAIRS, strict=False):
        nats, greedy = manual(nested_model, profile, context, text)
        assert likelihood.log_prob_nats == pytest.approx(nats, abs=1e-4)
        assert likelihood.is_greedy == greedy
    assert found[-1].is_greedy, "what the model itself generates is greedy at every token"
    assert not found[0].is_greedy


@pytest.mark.parametrize("decoder", ["lean", "hf"])
@pytest.mark.parametrize("name", ["by signals", "static", "drafts"])
def test_one_row_reads_a_context_once_for_all_its_continuations(
    nested_model: NestedCausalLM, profile: Profile, name: str, decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as several rows that each read it, to the last bit where a pass has the bits of single steps."""
    if decoder == "lean" and default_decoder(nested_model)[0] != "lean":
        pytest.skip("the native kernels could not be built")
    widths = torch.tensor([4, 3, 6])
    policy: Any = {
        "by signals": Switching(),
        "static": StaticAllocation("static", widths),
        "drafts": drafts_at("drafts", torch.tensor([3, 3, 3]), torch.tensor([5, 4, 8]), length=3),
    }[name]
    contexts = [ids_of(text).tolist() for text in ("hello ", "hell", "hello ")]
    texts = [[97 + place % 26 for place in range(count)] for count in (5, 1, 40, 16, 17)]
    pairs = [(contexts[index % 3], text) for index, text in enumerate(texts * 2)]
    opener = session_opener(nested_model, max_length=100, decoder=decoder)
    prompts = list[int]()
    session = opener(1)
    prefill = session.prefill

    def counted(ids: Tensor, **options: Any) -> StepOutput:
        prompts.append(ids.shape[1])
        return prefill(ids, **options)

    monkeypatch.setattr(session, "prefill", counted)
    found = PolicyRunner(session, make_controller(nested_model, policy, profile)).loglikelihood(pairs, 5.0)
    assert len(prompts) == 2, "a context is read once"
    rows = PolicyRunner(opener(3), make_controller(nested_model, policy, profile, num_rows=3)).loglikelihood(pairs, 5.0)
    for one, several in zip(found, rows, strict=True):
        assert one.is_greedy == several.is_greedy
        assert one.log_prob_nats == pytest.approx(several.log_prob_nats, abs=1e-12 if decoder == "lean" else 1e-4)


def test_likelihoods_at_fixed_widths_equal_a_score(nested_model: NestedCausalLM, profile: Profile) -> None:
    widths = torch.tensor([4, 3, 6])
    context, continuation = ids_of("hello ").tolist(), [ord(letter) for letter in "world"]
    policy = StaticAllocation("static", widths)
    session = DecodeSession(nested_model, num_rows=2)
    runner = PolicyRunner(session, make_controller(nested_model, policy, profile, num_rows=2))
    (likelihood,) = runner.loglikelihood([(context, continuation)], kl_weight=1.0)
    ids = torch.tensor([context + continuation])
    per_token = widths.repeat(1, ids.shape[1] - 1, 1)
    per_token[:, : len(context)] = 8  # the context is a prompt
    log_probs = session.score(ids[:, :-1], per_token, first=len(context) - 1).log_softmax(-1)[0]
    expected = log_probs.gather(1, torch.tensor(continuation)[:, None]).sum()
    assert likelihood.log_prob_nats == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [5]), "a context or continuation is empty"),
        (([5], []), "a context or continuation is empty"),
        (([5], [500]), "token 500 is outside"),
        (([5] * 100, [6] * 30), "100 and 30 tokens do not fit into a row of 128"),
    ],
)
def test_wrong_pairs(
    nested_model: NestedCausalLM, profile: Profile, pair: tuple[list[int], list[int]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        runner_of(nested_model, profile, 2).loglikelihood([([1], [5]), pair], kl_weight=1.0)


def test_a_pair_may_fill_a_row(nested_model: NestedCausalLM, profile: Profile) -> None:
    (likelihood,) = runner_of(nested_model, profile, 1).loglikelihood([([5] * 99, [6] * 30)], kl_weight=1.0)
    assert likelihood.log_prob_nats < 0


def test_decisions_from_outside_are_taken_as_they_are() -> None:
    model = FakeModel()
    controller = TorchController(model, None, fake_profile(model), num_rows=2)
    text = torch.randint(4, 28, (2, 9), generator=torch.Generator().manual_seed(0))
    runner = PolicyRunner(FakeSession(model, num_rows=2), controller, Replay(text[:, 4:]), timed=True)
    runner.start(text[:, :4], torch.tensor([3.0, 30.0]))
    widths = torch.tensor([[3, 4, 5, 6], [8, 8, 3, 3]])
    step = runner.step(Decision(widths))
    assert torch.equal(step.token_ids, text[:, 4])
    assert torch.equal(step.next_token_ids, text[:, 5])
    assert torch.equal(runner.upcoming_token_ids, text[:, 5])
    assert torch.equal(step.decision.bit_widths, widths)
    assert step.pass_ms is not None
    assert step.pass_ms > 0
    assert torch.equal(controller.schema.last_widths(controller.signals()), widths)
