"""Log-probabilities of generated and of given tokens, against a plain softmax in float64 and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.log_probs import token_log_probs
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.served_drafts import drafts_at
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import Engine

PROMPT = torch.tensor([1, 104, 101, 108, 108, 111])


def allocation(model: NestedCausalLM, width: int) -> StaticAllocation:
    return StaticAllocation(f"fixed:{width}", torch.full((model.num_units,), width))


def request(**options: object) -> Request:
    return Request(PROMPT, 10, eos_token_ids=(), log_probs=3, **options)  # type: ignore[arg-type]


def test_against_numpy() -> None:
    logits = 9 * torch.randn(50, generator=torch.Generator().manual_seed(torch.seed() % (1 << 62)))
    exact = logits.double().numpy() - np.log(np.exp(logits.double().numpy()).sum())
    found = token_log_probs(logits, 7, 4)
    assert found.log_prob_nats == pytest.approx(exact[7], abs=1e-12)
    order = np.argsort(-exact)[:4]
    assert [token_id for token_id, _ in found.likeliest] == order.tolist()
    assert [value for _, value in found.likeliest] == pytest.approx(exact[order].tolist(), abs=1e-12)


@pytest.mark.parametrize("width", [3, 8])
def test_generated_tokens_say_how_likely_they_were(nested_model: NestedCausalLM, profile: Profile, width: int) -> None:
    engine = Engine(nested_model, allocation(nested_model, width), profile, decoder="hf")
    tokens = list(engine.generate(request(temperature=1.0, seed=4)))
    session = DecodeSession(nested_model)
    logits = session.prefill(PROMPT[None]).logits[0]
    for token in tokens:
        assert token.log_probs == token_log_probs(logits, token.token_id, 3)
        logits = session.step(torch.tensor([token.token_id]), torch.full((nested_model.num_units,), width)).logits[0]
    assert next(iter(engine.generate(Request(PROMPT, 1)))).log_probs is None


def test_drafts_change_no_log_probability_and_are_marked(nested_model: NestedCausalLM, profile: Profile) -> None:
    widths = {bits: torch.full((nested_model.num_units,), bits) for bits in (6, 8)}
    drafts = drafts_at("draft:6", widths[6], widths[8], length=3)
    engine = Engine(nested_model, drafts, profile)
    drafted = list(engine.generate(request()))
    plain = list(engine.generate(request(), allocation(nested_model, 8)))

    def likelihoods(tokens: list[GeneratedToken]) -> list[float]:
        return [token.log_probs.log_prob_nats for token in tokens if token.log_probs is not None]

    assert [token.token_id for token in drafted] == [token.token_id for token in plain]
    assert likelihoods(drafted) == pytest.approx(likelihoods(plain), abs=1e-6)
    assert len(likelihoods(drafted)) == 10
    counts = drafted[-1].draft_counts
    assert counts is not None
    assert sum(token.is_draft for token in drafted) == sum(counts.accepted) > 0
    assert not any(token.is_draft for token in plain)


def test_a_request_may_have_a_policy_of_its_own(nested_model: NestedCausalLM, profile: Profile) -> None:
    engine = Engine(nested_model, allocation(nested_model, 3), profile)
    own = list(engine.generate(request(), allocation(nested_model, 8)))
    assert {int(width) for token in own for width in token.bit_widths} == {8}
    alone = list(Engine(nested_model, allocation(nested_model, 8), profile).generate(request()))
    assert [token.token_id for token in own] == [token.token_id for token in alone]
    with pytest.raises(InputError, match="7"):
        list(engine.generate(request(), allocation(nested_model, 7)))


def test_scores_of_a_text_are_its_likelihood(nested_model: NestedCausalLM, profile: Profile) -> None:
    engine = Engine(nested_model, allocation(nested_model, 4), profile)
    scores = list(engine.judge_text(PROMPT, kl_weight=2.0, num_likeliest=1))
    ids = PROMPT.tolist()
    (whole,) = engine.loglikelihood([(ids[:1], ids[1:])], kl_weight=2.0)
    assert [score.token_id for score in scores] == ids[1:]
    assert sum(score.log_prob_nats for score in scores) == pytest.approx(whole.log_prob_nats, abs=1e-5)
    assert all(score.likeliest[0][1] >= score.log_prob_nats for score in scores)
    assert list(engine.judge_text(PROMPT[:1], kl_weight=2.0)) == []


def test_bad_numbers(nested_model: NestedCausalLM, profile: Profile) -> None:
    engine = Engine(nested_model, allocation(nested_model, 4), profile)
    with pytest.raises(InputError, match="log_probs=129 must be 0 to 128"):
        list(engine.generate(Request(PROMPT, 1, log_probs=129)))
    with pytest.raises(InputError, match="log_probs=-1"):
        list(engine.judge_text(PROMPT, kl_weight=1.0, num_likeliest=-1))
    with pytest.raises(InputError, match="empty"):
        list(engine.judge_text(PROMPT[:0], kl_weight=1.0))
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(engine.judge_text(PROMPT, kl_weight=1.0))
