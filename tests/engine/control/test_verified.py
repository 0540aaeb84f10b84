"""Drafts and their verification: the text is that of the verifying width, whoever drafts and however it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_session import FakeModel, FakeSession
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.controller import StaticController, TorchController
from flexquant_rl.engine.control.decision import Decision, StaticAllocation
from flexquant_rl.engine.control.drafts import DraftRecord, copied_drafts
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.verification import MAX_DRAFTS, Verification
from flexquant_rl.engine.control.verified import VerifiedRunner, settled_policy
from flexquant_rl.engine.decoding.acceptance import DraftSampler
from flexquant_rl.engine.decoding.decoder import Decoder
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.decoding.next_token import token_probs
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.serving import Engine, generate
from flexquant_rl.kernels.native import supported_isas

needs_native = pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")


class Restless:
    """Other random widths at every step: drafts nobody could foresee."""

    name = "restless"

    def __init__(self, model: NestedCausalLM | FakeModel, seed: int) -> None:
        self._widths, self._num_units = torch.tensor(model.bit_widths), model.num_units
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, signals: Tensor) -> Decision:
        picked = torch.randint(len(self._widths), (len(signals), self._num_units), generator=self._generator)
        return Decision(self._widths[picked])


def lean(model: NestedCausalLM, num_threads: int = 1) -> Callable[[], Decoder]:
    decoder = LeanDecoder(model, num_threads=num_threads)
    return lambda: LeanSession(decoder)


def plain(
    decoder: Decoder, verification: Verification, request: Request, tokenizer: Any = None
) -> list[GeneratedToken]:
    controller = StaticController(settled_policy(verification, decoder.model))
    return list(PolicyRunner(decoder, controller).generate([request], tokenizer))


def said(tokens: list[GeneratedToken]) -> list[tuple[int, str, str | None]]:
    return [(token.token_id, token.text, token.finish_reason) for token in tokens]


@needs_native
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_greedy_text_is_that_of_the_verifying_width(nested_model: NestedCausalLM, profile: Profile, data: Any) -> None:
    draw = data.draw
    verification = Verification(
        draw(st.sampled_from((8, 6, 4))),
        draw(st.integers(0, MAX_DRAFTS)),
        draw(st.sampled_from((0.0, 0.2, 0.6))),
        draw(st.booleans()),
    )
    prompt = torch.tensor(draw(st.lists(st.integers(3, 127), min_size=1, max_size=20)))
    request = Request(prompt, draw(st.integers(1, 60)), eos_token_ids=(draw(st.integers(3, 127)),))
    make = lean(nested_model, draw(st.integers(1, 2)))
    policy = Restless(nested_model, draw(st.integers(0, 999)))
    runner = VerifiedRunner(make(), TorchController(nested_model, policy, profile), verification)
    found = list(runner.generate(request))
    assert said(found) == said(plain(make(), verification, request))
    assert all(token.bit_widths.unique().tolist() == [verification.bit_width] for token in found[1:])
    record = runner.record
    # Of the last round some may be dropped.
    assert len(found) - 1 <= record.num_tokens == record.num_passes + sum(record.accepted_at)
    assert all(kept <= drafted for kept, drafted in zip(record.accepted_at, record.drafted_at, strict=True))
    assert max(len(record.drafted_at), 0) <= verification.max_drafts


@needs_native
def test_hugging_face_modules_agree_too(nested_model: NestedCausalLM, profile: Profile) -> None:
    for seed in range(4):
        request = Request(torch.randint(3, 128, (7,)), 40, eos_token_ids=())
        verification = Verification(8, 5)
        controller = TorchController(nested_model, Restless(nested_model, seed), profile)
        found = list(VerifiedRunner(DecodeSession(nested_model), controller, verification).generate(request))
        expected = plain(DecodeSession(nested_model), verification, request)
        # A pass over several tokens rounds otherwise in torch: equal unless two tokens are as likely.
        assert [token.token_id for token in found] == [token.token_id for token in expected]


@needs_native
def test_signals_are_those_of_what_stayed(nested_model: NestedCausalLM, profile: Profile) -> None:
    """After a round the policy sees what it would have seen had the verifying width decoded token by token."""
    make, prompt = lean(nested_model), torch.randint(3, 128, (9,))
    drafting = TorchController(nested_model, Restless(nested_model, 3), profile)
    runner = VerifiedRunner(make(), drafting, Verification(8, 4))
    first = runner.start(prompt, 2.5)
    settled = [first]
    for _ in range(6):
        settled += runner.advance(20)
    seen = TorchController(nested_model, Restless(nested_model, 3), profile)
    decoder = make()
    output = decoder.prefill(prompt[None])
    seen.reset(output, torch.tensor([first]), torch.tensor([2.5]))
    widths = torch.full((1, nested_model.num_units), 8)
    for token_id, following in pairwise(settled):
        seen.update(decoder.step(torch.tensor([token_id]), widths), widths, torch.tensor([following]))
    torch.testing.assert_close(drafting.signals(), seen.signals(), rtol=0, atol=0)
    assert int(runner.decoder.lengths) == int(decoder.lengths)


@needs_native
def test_ends_inside_a_round(nested_model: NestedCausalLM, profile: Profile) -> None:
    prompt, verification = torch.tensor([80, 81, 82]), Verification(8, 6)
    make = lean(nested_model)
    free = [token.token_id for token in plain(make(), verification, Request(prompt, 50, eos_token_ids=()))]
    text = "".join(map(chr, free))
    cases: dict[str, Request] = {
        "length": Request(prompt, 50, eos_token_ids=()),
        "one": Request(prompt, 1, eos_token_ids=()),
        "eos": Request(prompt, 50, eos_token_ids=(free[9],)),
        "stop": Request(prompt, 50, eos_token_ids=(), stop=(text[11:14],)),
        "context": Request(prompt, nested_model.max_context - len(prompt) + 1, eos_token_ids=()),
    }
    for name, request in cases.items():
        controller = StaticController(StaticAllocation("fixed:6", torch.full((nested_model.num_units,), 6)))
        runner = VerifiedRunner(make(), controller, verification)
        found = list(runner.generate(request, nested_model.token_text))
        assert said(found) == said(plain(make(), verification, request, nested_model.token_text)), name
        assert name == "one" or any(token.is_draft for token in found), "nothing was ever kept"


@needs_native
def test_a_cancelled_request_ends_with_its_next_token(nested_model: NestedCausalLM, profile: Profile) -> None:
    policy = StaticAllocation("fixed:6", torch.full((nested_model.num_units,), 6))
    engine = Engine(nested_model, policy, profile, verification=Verification(8, 3))
    request, record = Request(torch.tensor([80, 81]), 60, eos_token_ids=()), DraftRecord()
    stream = engine.generate(request, record)
    tokens = [next(stream) for _ in range(5)]
    request.cancel.set()
    tokens += list(stream)
    assert tokens[-1].finish_reason == "cancelled"
    assert len(tokens) == 6
    assert record.num_passes > 0
    again = Request(request.prompt_ids, 60, eos_token_ids=(), cancel=threading.Event())
    assert [token.token_id for token in engine.generate(again)][:6] == [token.token_id for token in tokens]
    settled = engine.loglikelihood([([80, 81], [90, 91])], kl_weight=1.0)
    whole = Engine(nested_model, settled_policy(Verification(8), nested_model), profile)
    assert settled == whole.loglikelihood([([80, 81], [90, 91])], kl_weight=1.0)
    engine.close()


class TestSampling:
    """Exact enumeration over a small vocabulary."""

    @pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
    def test_one_draft(self, temperature: float, top_p: float) -> None:
        """The token at the place of a draft is distributed as the verifying logits say."""
        q_logits, p_logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(5)) * 1.5
        sampler = DraftSampler(temperature, top_p, seed=11)
        counts, num_draws = torch.zeros(7), 8_000
        for _ in range(num_draws):
            token, probs = sampler.draft(q_logits)
            result = sampler.accept([token], [probs], torch.stack([p_logits, p_logits]))
            counts[token if result.num_accepted else result.next_token_id] += 1
        assert_distributed(counts, token_probs(p_logits, temperature, top_p))

    def test_a_certain_draft(self) -> None:
        """A copied token is kept as often as it is likely, and never drawn again in its own place."""
        logits = torch.randn(5, generator=torch.Generator().manual_seed(2))
        sampler, counts = DraftSampler(1.0, 1.0, seed=3), torch.zeros(5)
        for _ in range(8_000):
            result = sampler.accept([1], [None], torch.stack([logits, logits]))
            counts[1 if result.num_accepted else result.next_token_id] += 1
        assert_distributed(counts, logits.softmax(-1))

    @pytest.mark.parametrize("copy_drafts", [False, True])
    def test_a_text(self, copy_drafts: bool) -> None:
        """The first, second and third token of a text, and pairs of their classes."""
        model, verification = FakeModel(), Verification(8, 3, copy_drafts=copy_drafts)
        temperature, top_p, prompt = 0.8, 0.9, torch.tensor([5, 9, 5, 9, 5])
        widths = torch.full((model.num_units,), 8)

        def following(token_ids: Tensor) -> Tensor:
            logits = model.logits(token_ids, model.own_kl_nats(token_ids, widths.expand(len(token_ids), -1)))
            return torch.stack([token_probs(row, temperature, top_p) for row in logits]).double()

        step = following(torch.arange(model.vocab_size))
        expected = [following(prompt[-1:])[0]]
        for _ in range(3):
            expected.append(expected[-1] @ step)
        counts = torch.zeros(4, model.vocab_size)
        pairs = torch.zeros(model.vocab_size, model.vocab_size)
        session = FakeSession(model)
        controller = StaticController(StaticAllocation("fixed:3", torch.full((model.num_units,), 3)))
        num_accepted = 0
        for seed in range(700):
            runner = VerifiedRunner(session, controller, verification)
            tokens = [runner.start(prompt, 1.0, temperature=temperature, top_p=top_p, seed=seed)]
            while len(tokens) < 4:
                tokens += runner.advance(4)
            for place, token_id in enumerate(tokens[:4]):
                counts[place, token_id] += 1
            pairs[tokens[1], tokens[2]] += 1
            num_accepted += sum(runner.record.accepted_at)
        assert num_accepted > 100
        for place in range(4):
            assert_distributed(counts[place], expected[place])
        joint = expected[1][:, None] * step
        assert_distributed(coarse(pairs), coarse(joint))


def coarse(table: Tensor) -> Tensor:
    """`[32, 32]` in blocks of 8 tokens, `[16]`."""
    return table.reshape(4, 8, 4, 8).sum((1, 3)).flatten()


def assert_distributed(counts: Tensor, probs: Tensor) -> None:
    """Pearson's chi-square, cells of few expected counts together; false alarms once in 100,000."""
    expected = probs.double() * counts.sum()
    assert float(counts[expected == 0].sum()) == 0, "what cannot be drawn was drawn"
    large = expected >= 5
    parts = [(counts[large], expected[large])]
    if bool((expected[~large] > 0).any()):
        parts.append((counts[~large].sum()[None], expected[~large].sum()[None]))
    statistic = sum(float(((got - want).square() / want).sum()) for got, want in parts)
    cells = sum(len(want) for _, want in parts)
    half = torch.tensor([(cells - 1) / 2, statistic / 2], dtype=torch.float64)
    assert float(torch.special.gammaincc(*half)) > 1e-5, f"{statistic} with {cells} cells"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 6))
def test_copied_drafts_follow_the_latest_repetition(text: list[int], max_drafts: int) -> None:
    expected: list[int] = []
    for size in (3, 2):
        places = [i for i in range(len(text) - size) if text[i : i + size] == text[-size:]]
        if places:
            expected = text[places[-1] + size :][:max_drafts]
            break
    assert copied_drafts(np.array(text, dtype=np.int64), max_drafts) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit_width": 7}, "verify_width=7 is not stored; use one of 3, 4, 5, 6, 8"),
        ({"bit_width": 8, "max_drafts": 16}, "max_drafts=16 must be a whole number from 0 to 15"),
        ({"bit_width": 8, "max_drafts": -1}, "max_drafts=-1 must be"),
        ({"bit_width": 8, "max_drafts": 1.0}, "max_drafts=1.0 must be"),
        ({"bit_width": 8, "min_confidence": float("nan")}, "min_confidence=nan must be from 0 to 1"),
    ],
)
def test_what_is_no_verification(options: Any, message: str, nested_model: NestedCausalLM, profile: Profile) -> None:
    policy = StaticAllocation("fixed:3", torch.full((nested_model.num_units,), 3))
    with pytest.raises(InputError, match=message):
        next(generate(nested_model, policy, profile, "ab", max_new_tokens=3, verification=Verification(**options)))


@pytest.fixture(scope="module")
def real_model() -> NestedCausalLM:
    return load_model(
        str(Path(os.environ["FQ_REAL_MODELS"]) / "smollm2-135m"), QuantizationConfig(), keep_reference=False
    )


@needs_native
@pytest.mark.skipif(not os.environ.get("FQ_REAL_MODELS"), reason="FQ_REAL_MODELS names no folder of real models")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_real_model(real_model: NestedCausalLM, num_threads: int) -> None:
    make = lean(real_model, num_threads)
    prompt = torch.tensor(real_model.token_text.encode("The most interesting thing about rivers is"))
    request = Request(prompt, 80, eos_token_ids=())
    expected = plain(make(), Verification(8), request)
    for width, max_drafts in ((3, 2), (4, 5), (5, 7)):
        drafting = StaticController(StaticAllocation("drafts", torch.full((real_model.num_units,), width)))
        runner = VerifiedRunner(make(), drafting, Verification(8, max_drafts))
        assert said(list(runner.generate(request))) == said(expected), (width, max_drafts)
        assert runner.record.tokens_per_pass > 1.3
