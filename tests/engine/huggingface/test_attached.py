"""A policy inside `generate`: the tokens and widths of `fq generate`, in every row, and one line where it cannot be."""

from __future__ import annotations

import copy
import inspect
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import tiny_causal_lm, tiny_config
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from flexquant_rl import FlexQuantConfig, attach_policy
from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.decision import Decision, StaticAllocation
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import Request
from flexquant_rl.engine.control.served_drafts import drafts_at
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.huggingface.quantizer import nested_model
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import Engine

PROMPT = torch.tensor([[1, 104, 101, 108, 108, 111]])
PROMPTS = [PROMPT[0, :2], PROMPT[0], PROMPT[0, 3:]]
ENDLESS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
COUNT = 200
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("gpt2", {}),
    ("gpt_neox", {}),
]


def load(family: str, folder: Path, **options: Any) -> PreTrainedModel:
    """A tiny random model of a family, nested by transformers, with room for 256 tokens."""
    room = {"max_position_embeddings": 256} | ({"n_positions": 256} if family == "gpt2" else {})
    config = tiny_config(family, **room, **options)
    tiny_causal_lm(config).save_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FlexQuantConfig(group_size=32, unit="half")
    )
    return model


def profile_of(nested: NestedCausalLM) -> Profile:
    sensitivity = torch.tensor([0.5, 0.1, 0.03, 0.01, 0.0]).expand(nested.num_units, -1)
    return Profile(roofline_cost(nested), sensitivity, nested.bit_widths, nested.fingerprint, 9, "8-bit")


def learned(nested: NestedCausalLM) -> LearnedPolicy:
    """An untrained policy whose widths differ from token to token and unit to unit."""
    card = PolicyCard.of_model(nested, {}, horizon=64)
    card = replace(
        card, dial=(DialPoint(3.0, 1.1, 0.1, 6.0), DialPoint(7.0, 1.3, 0.2, 5.0), DialPoint(9.0, 1.6, 0.3, 4))
    )
    net = PrecisionNet(card.schema)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return LearnedPolicy(net, card)


class Confident:
    """A policy of a user's own: low widths where the entropy is below its average."""

    name = "confident"

    def __init__(self, num_units: int) -> None:
        self._num_units = num_units

    def __call__(self, signals: Tensor) -> Decision:
        low = (signals[:, 0] < signals[:, 1])[:, None]
        return Decision(torch.where(low, 3, 6).expand(-1, self._num_units))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A tiny Llama without a policy. Copy it before one is attached."""
    return load("llama", tmp_path_factory.mktemp("attached"))


@pytest.fixture
def model(shared: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(shared)


@pytest.fixture
def policy(shared: PreTrainedModel) -> LearnedPolicy:
    return learned(nested_model(shared))


@pytest.fixture
def profile(shared: PreTrainedModel) -> Profile:
    return profile_of(nested_model(shared))


def continuation(model: PreTrainedModel, prompt: Tensor = PROMPT, count: int = 12, **options: Any) -> list[int]:
    found = model.generate(prompt, max_new_tokens=count, **(ENDLESS | options))
    ids: list[int] = found[0, prompt.shape[1] :].tolist()
    return ids


@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_equals_our_own_generation(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = load(family, tmp_path, **options)
    nested = nested_model(model)
    policy, profile = learned(nested), profile_of(nested)
    engine = Engine(nested, policy, profile, decoder="hf")
    nested._token_text = EndlessText()  # type: ignore[assignment]
    expected = list(engine.generate(Request(PROMPT[0], COUNT, kl_weight=7.0, eos_token_ids=())))
    attached = attach_policy(model, policy, profile=profile)
    assert attached.kl_weight == 7.0, "the middle of the dial"
    assert continuation(model, count=COUNT) == [token.token_id for token in expected]
    chosen = torch.cat(attached.bit_widths)
    assert torch.equal(chosen, torch.stack([token.bit_widths for token in expected[1:]]))
    assert len(chosen.unique()) > 2
    assert len(chosen.unique(dim=0)) > 2, "widths do not differ from token to token"
    assert attached.mean_bit_width == pytest.approx(float(nested.mean_bit_width(chosen).mean()))


class EndlessText:
    """A tokenizer without an end, whose text nobody reads."""

    eos_token_id = None

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "x" * len(ids)


def test_rows_of_a_padded_batch_decide_for_themselves(
    model: PreTrainedModel, policy: LearnedPolicy, profile: Profile
) -> None:
    attached = attach_policy(model, policy, profile=profile)
    longest = max(map(len, PROMPTS))
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in PROMPTS])
    mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in PROMPTS]).long()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, **ENDLESS)
    chosen = torch.stack(attached.bit_widths, dim=1)
    assert len(chosen.flatten(1).unique(dim=0)) == 3, "rows do not differ"
    for row, prompt in enumerate(PROMPTS):
        assert together[row, longest:].tolist() == continuation(model, prompt[None])
        assert torch.equal(torch.cat(attached.bit_widths), chosen[row])


def test_sampling_streams_and_several_sequences(
    model: PreTrainedModel, policy: LearnedPolicy, profile: Profile, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    attached = attach_policy(model, policy, profile=profile)
    options = {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2, "max_new_tokens": 9}
    torch.manual_seed(0)
    found = model.generate(PROMPT, **(ENDLESS | options))
    chosen = torch.stack(attached.bit_widths, dim=1)
    assert chosen.shape == (2, 8, nested_model(model).num_units)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(chosen[0], chosen[1])
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True)
    with ThreadPoolExecutor(1) as pool:  # as the streamer's own documentation has it
        pool.submit(continuation, model, streamer=streamer)
        text = "".join(streamer)
    assert text == tiny_tokenizer.decode(continuation(model))


def test_pipeline(
    model: PreTrainedModel, policy: LearnedPolicy, profile: Profile, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    attached = attach_policy(model, policy, profile=profile)
    generate = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)
    text = tiny_tokenizer.decode(PROMPT[0, 1:])
    expected = continuation(model, PROMPT[:, 1:])
    widths = torch.cat(attached.bit_widths)
    config = GenerationConfig(max_new_tokens=12, **ENDLESS)
    (result,) = generate(text, generation_config=config, return_full_text=False, add_special_tokens=False)
    assert result["generated_text"] == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    assert torch.equal(torch.cat(attached.bit_widths), widths)


def test_policy_and_profile_from_a_directory(
    model: PreTrainedModel, policy: LearnedPolicy, profile: Profile, tmp_path: Path
) -> None:
    save_policy(policy, profile, tmp_path / "policy")
    attach_policy(model, policy, profile=profile, speed=1.6)
    expected = continuation(model)
    attached = attach_policy(model, str(tmp_path / "policy"), speed=1.6)
    assert attached.kl_weight == 9.0
    assert continuation(model) == expected
    attached = attach_policy(model, tmp_path, speed=1.6)  # as a run has it
    assert continuation(model) == expected
    attached.kl_weight = 3.0
    chosen = list(attached.bit_widths)
    continuation(model)
    assert not torch.equal(torch.cat(chosen), torch.cat(attached.bit_widths)), "the dial does nothing"


def test_static_allocation_and_a_class_of_ones_own(model: PreTrainedModel, profile: Profile) -> None:
    units = nested_model(model).num_units
    low = StaticAllocation("low", torch.full((units,), 3))
    attached = attach_policy(model, low)
    at_three = continuation(model)
    assert torch.equal(torch.cat(attached.bit_widths), torch.full((11, units), 3))
    attached = attach_policy(model, StaticAllocation("high", torch.full((units,), 8)))
    at_eight = continuation(model)
    assert at_three != at_eight
    attached = attach_policy(model, Confident(units), profile=profile, kl_weight=2.0)
    continuation(model)
    assert len(torch.cat(attached.bit_widths).unique(dim=0)) == 2
    attached.detach()
    assert continuation(model) == at_eight


def test_detached_model_is_as_before(model: PreTrainedModel, policy: LearnedPolicy, profile: Profile) -> None:
    signature = inspect.signature(model.forward)
    expected = continuation(model)
    first = attach_policy(model, policy, profile=profile)
    second = attach_policy(model, policy, profile=profile)
    assert inspect.signature(model.forward) == signature
    assert continuation(model) != expected
    assert first.bit_widths == []
    assert math.isnan(first.mean_bit_width)
    assert not math.isnan(second.mean_bit_width)
    first.detach()  # which was replaced
    assert continuation(model) != expected
    second.detach()
    second.detach()
    assert not {"forward", "generate", "attached_policy"} & vars(model).keys()
    assert continuation(model) == expected


def test_calls_outside_generate_read_the_largest_width(
    model: PreTrainedModel, policy: LearnedPolicy, profile: Profile
) -> None:
    with torch.no_grad():
        expected = model(PROMPT).logits
        attach_policy(model, policy, profile=profile)
        assert torch.equal(model(PROMPT).logits, expected)


def test_a_failed_call_leaves_nothing_behind(model: PreTrainedModel, policy: LearnedPolicy, profile: Profile) -> None:
    attach_policy(model, policy, profile=profile)
    expected = continuation(model)

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        continuation(model, logits_processor=[fail])
    assert continuation(model) == expected


def test_copies_and_threads_do_not_meet(model: PreTrainedModel, policy: LearnedPolicy, profile: Profile) -> None:
    attach_policy(model, policy, profile=profile)
    expected = [continuation(model, prompt[None]) for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda prompt: continuation(model, prompt[None]), PROMPTS)) == expected
    twin = copy.deepcopy(model)
    model.attached_policy.detach()
    assert [continuation(twin, prompt[None]) for prompt in PROMPTS] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "beam search cannot be served"),
        ({"num_beams": 2, "do_sample": True}, "beam sample cannot be served"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation cannot be served"),
        ({"assistant_model": "itself"}, "assistant_model cannot be used"),
        ({"custom_generate": "some/code"}, "custom_generate cannot be used"),
        ({"use_cache": False}, "use_cache=False cannot be used"),
        ({"guidance_scale": 1.5}, "guidance_scale cannot be used"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size cannot be used"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' cannot be used"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "beam search cannot be served"),
    ],
)
def test_what_a_policy_cannot_serve_is_one_line(
    model: PreTrainedModel, policy: LearnedPolicy, profile: Profile, options: dict[str, Any], message: str
) -> None:
    attach_policy(model, policy, profile=profile)
    expected = continuation(model)
    with pytest.raises(InputError, match=message) as error:
        model.generate(PROMPT, max_new_tokens=4, **options)
    assert "detach the policy" in str(error.value)
    assert "\n" not in str(error.value)
    assert continuation(model) == expected


def test_padding_on_the_right_is_refused(model: PreTrainedModel, policy: LearnedPolicy, profile: Profile) -> None:
    attach_policy(model, policy, profile=profile)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    with pytest.raises(InputError, match="a prompt ends in padding"):
        continuation(model, attention_mask=mask)


def test_what_cannot_be_attached_is_one_line(
    model: PreTrainedModel, policy: LearnedPolicy, profile: Profile, tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    units = nested_model(model).num_units
    static = StaticAllocation("static", torch.full((units,), 4))
    foreign = LearnedPolicy(policy.net, replace(policy.card, model_fingerprint="0" * 64))
    low = torch.full((units,), 3)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (tiny_llama, policy, {"profile": profile}, "is not a nested model"),
        (model, tmp_path / "none", {}, "no directory of a run or an exported policy"),
        (model, "fixed:4", {}, "fixed:4 is no directory of a run"),
        (model, tmp_path, {}, "no readable policy"),
        (model, policy, {"profile": profile, "speed": "fast"}, "speed='fast' must be a number"),
        (model, foreign, {"profile": profile}, "was trained for model 000000000000"),
        (model, policy, {}, "pass the one it was trained with"),
        (model, policy, {"profile": replace(profile, fingerprint="0" * 64)}, "the profile is of model 000000000000"),
        (model, policy, {"profile": profile, "kl_weight": 0.0}, "must be positive"),
        (model, policy, {"profile": profile, "speed": 9.0}, "speed 9 is outside"),
        (model, policy, {"profile": profile, "speed": 1.2, "kl_weight": 1.0}, "set the same dial"),
        (model, static, {"kl_weight": 3.0}, "kl_weight=3 sets a dial, and static has none"),
        (model, static, {"speed": 1.5}, "speed=1.5 sets a dial"),
        (model, StaticAllocation("two", torch.full((units,), 2)), {}, "bit-width 2 is not stored"),
        (model, drafts_at("draft:3", low, torch.full((units,), 8), length=4), {}, "drafts, which takes passes"),
        (model, LearnedPolicy(policy.net, replace(policy.card, dial=())), {"profile": profile}, "give the KL weight"),
    ]
    for target, candidate, options, message in cases:
        with pytest.raises(InputError, match=message):
            attach_policy(target, candidate, **options)
    assert not {"forward", "generate", "attached_policy"} & vars(model).keys()
