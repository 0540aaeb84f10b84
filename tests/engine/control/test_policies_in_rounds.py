"""Every kind of policy of drafts leaves the text as it is: rules, networks and bandits, on both decoders, to any end.

`test_rounds.py` has what no sensible policy does; these are those that are trained, tuned and exported.
`FQ_REAL_MODELS=FOLDER pytest tests/engine/control/test_policies_in_rounds.py -k real` compares texts of real models
too, 1,024 tokens of each; `FQ_IDENTITY_TOKENS=20000` makes it so many.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_tokenizer
from fake_session import MarkovSession, fake_profile, transitions
from random_models import tiny_causal_lm, tiny_config

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.controller import DraftController, TorchController, make_controller
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.draft_limits import MOST_PENDING, NGRAM_DRAFTS
from flexquant_rl.engine.control.drafting_net import DraftingNet
from flexquant_rl.engine.control.drafting_rules import RULES, DraftingContext, EntropyBound
from flexquant_rl.engine.control.drafts import DraftPolicy
from flexquant_rl.engine.control.profile import unmeasured_profile
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.rounds import Rounds
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.served_drafts import ServedDrafts, drafts_at
from flexquant_rl.engine.control.verified_signals import VerifiedSchema
from flexquant_rl.engine.control.verify_costs import modelled_costs
from flexquant_rl.engine.decoding.choice import default_decoder, session_opener
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.decoding.next_token import Sampler
from flexquant_rl.engine.decoding.options import DecoderName
from flexquant_rl.engine.freed_memory import return_freed_memory
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.kernels import native_decoder

pytestmark = pytest.mark.usefixtures("endless")

SCHEMA = VerifiedSchema(2, 4)
CONTEXT = DraftingContext(SCHEMA, modelled_costs((0.3, 0.5), (1.0, 1.05), depth=4), torch.tensor([0.8, 0.9]).numpy())
KINDS = (*(kind.family for kind in RULES), "net")
ROOM = 40

IDENTITY_TOKENS = int(os.environ.get("FQ_IDENTITY_TOKENS", "1024"))
"""Tokens of each real model that are compared."""
PROMPT_TOKENS, TEXT_TOKENS = 32, 128


@pytest.fixture(scope="module")
def nested(tiny_model_dir: Path) -> NestedCausalLM:
    return load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))


def policy_of(kind: str, num_units: int, *, low: int = 3, high: int = 5, verify: int = 8) -> ServedDrafts:
    """A rule from the middle of its grid, or a network with random weights."""
    widths = torch.tensor([low, high])[:, None].expand(-1, num_units).contiguous()
    full = torch.full((num_units,), verify)
    if kind == "net":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            net = DraftingNet(SCHEMA)
        return ServedDrafts(kind, SCHEMA, widths, full, net.policy(), "signals")
    grid = list(next(rule for rule in RULES if rule.family == kind).grid(SCHEMA))
    chosen = EntropyBound(0, 0.0) if kind == EntropyBound.family else grid[len(grid) // 3]  # random weights are unsure
    return ServedDrafts(kind, SCHEMA, widths, full, chosen.bind(CONTEXT), chosen.sees)


def resident_bytes() -> int:
    """What the process holds of the machine's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def said(
    model: NestedCausalLM,
    policy: DraftPolicy | StaticAllocation,
    requests: list[Request],
    decoder: DecoderName,
    ngram_drafts: int = 0,
) -> tuple[list[tuple[int, str, str | None]], list[GeneratedToken]]:
    session = session_opener(model, max_length=ROOM, decoder=decoder)(1)
    controller = make_controller(model, policy, unmeasured_profile(model))
    tokens = list(PolicyRunner(session, controller, ngram_drafts=ngram_drafts).generate(requests, model.tokenizer))
    session.close()
    return [(token.token_id, token.text, token.finish_reason) for token in tokens], tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("decoder", "ngram_drafts"), [("lean", 0), ("lean", 3), ("hf", 3)])
def test_the_text_and_its_end_are_those_of_the_verify_width(
    nested: NestedCausalLM, kind: str, decoder: DecoderName, ngram_drafts: int
) -> None:
    """To the end of the context, at an EOS and at a stop string that begin at each place of a round, and cut short."""
    if decoder == "lean" and default_decoder(nested)[0] != "lean":
        pytest.skip("the native kernels could not be built")
    prompt = torch.tensor([1, *map(ord, "abc abc ab")])
    plain = StaticAllocation("plain", torch.full((nested.num_units,), 8))
    whole = Request(prompt, ROOM - len(prompt) + 1)
    assert whole.num_held == ROOM
    free, _ = said(nested, plain, [whole], decoder)
    assert free[-1][2] == "length"
    short = replace(whole, max_new_tokens=14)
    requests = [whole, replace(whole, max_new_tokens=5)]
    for place in range(3, 8):
        requests.append(replace(short, eos_token_ids=(free[place][0],)))
        requests.append(replace(short, stop=(free[place][1] + free[place + 1][1],)))
    want, _ = said(nested, plain, requests, decoder)
    got, tokens = said(nested, policy_of(kind, nested.num_units), requests, decoder, ngram_drafts)
    assert got == want
    assert {reason for _, _, reason in got} == {None, "length", "eos", "stop"}
    counts = [token.draft_counts for token in tokens if token.draft_counts is not None]
    assert sum(sum(one.drafted) for one in counts) > 3, "a policy that does not draft proves nothing"
    assert 0 < sum(sum(one.accepted) for one in counts) < sum(sum(one.drafted) for one in counts)


@pytest.mark.parametrize(("kind", "ngram_drafts"), [("confidence", 0), ("bandit", 0), ("bandit", 2), ("net", 2)])
def test_sampled_text_has_the_distribution_of_the_verify_width(kind: str, ngram_drafts: int) -> None:
    """Three tokens after a prompt against exact enumeration, by chi-square.

    What these policies decide follows from the drafts that were drawn, and a bandit's from how earlier ones fared.
    """
    num_trials, num_tokens, prompt = 600, 3, [0, 1, 2, 0, 1]
    session = MarkovSession()
    model = session.model
    policy = policy_of(kind, model.num_units)
    signals = TorchController(model, None, fake_profile(model)) if policy.uses_signals else None
    controller = DraftController(policy, signals)
    output = StepOutput(transitions(8)[1:2], torch.ones(1, model.num_units), torch.ones(1, model.num_units))
    controller.reset(output, torch.tensor([2]), torch.ones(1))
    sampler = Sampler(1)
    sampler.start(0, temperature=1.0, top_p=1.0, seed=11)
    rounds = Rounds(session, controller, sampler, ngram_drafts=ngram_drafts)
    counts: dict[tuple[int, ...], int] = {}
    drafted = accepted = 0
    for _ in range(num_trials):
        session._lengths = torch.tensor([len(prompt)])
        rounds.begin(0, prompt, 2)
        text: list[int] = []
        while len(text) < num_tokens:
            settled = rounds.step(0, num_tokens - len(text))
            text += [] if settled is None else settled.token_ids
        counts[tuple(text)] = counts.get(tuple(text), 0) + 1
        known = rounds.counts(0)
        drafted += sum(known.drafted) + known.num_found
        accepted += sum(known.accepted) + known.num_found_accepted
    assert drafted > num_trials / 10
    assert 0.1 < accepted / drafted < 0.97, "all accepted or none, either proves little"
    assert chi_square_p(counts, num_trials, num_tokens) > 1e-3


def chi_square_p(counts: dict[tuple[int, ...], int], num_trials: int, num_tokens: int) -> float:
    """How probable counts as unlike the exact distribution are."""
    table = transitions(8).double().softmax(-1)
    statistic, cells = 0.0, list(itertools.product(range(3), repeat=num_tokens))
    for cell in cells:
        steps = zip((2, *cell), cell, strict=False)
        expected = num_trials * float(torch.stack([table[before][after] for before, after in steps]).prod())
        statistic += (counts.get(cell, 0) - expected) ** 2 / expected
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.fixture(scope="module")
def long_nested() -> NestedCausalLM:
    """A smaller model whose context holds more than 2,000 tokens."""
    llama = tiny_causal_lm(tiny_config("llama", max_position_embeddings=2304))
    return nest(llama, build_tiny_tokenizer(), QuantizationConfig(group_size=32), keep_reference=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "ngram_drafts"), [("bandit", 0), ("net", 0), ("net", 2)])
def test_memory_stays_as_it_is_within_a_text_of_2000_tokens(
    long_nested: NestedCausalLM, monkeypatch: pytest.MonkeyPatch, kind: str, ngram_drafts: int
) -> None:
    """Rounds cut caches back, mark signals and look up n-grams: nothing of it may pile up before the text ends."""
    if default_decoder(long_nested)[0] != "lean":
        pytest.skip("the native kernels could not be built")
    # Outputs are made so many at a time that they take a megabyte: at a small vocabulary thousands, which come and go.
    monkeypatch.setattr(native_decoder, "_OUTPUT_BYTES", 0)
    session = session_opener(long_nested)(1)
    controller = make_controller(long_nested, policy_of(kind, long_nested.num_units), unmeasured_profile(long_nested))
    runner = PolicyRunner(session, controller, ngram_drafts=ngram_drafts)
    # The cache is touched to its end first: the system gives its pages when they are written.
    list(runner.generate([Request(torch.full((2280,), 97), 20)]))
    held, counts = dict[int, int](), None
    tokens = runner.generate([Request(torch.tensor([1, *map(ord, "abc abc ab")]), 2001)])
    for index, token in enumerate(tokens):  # a list of them would grow
        if index in (200, 2000):
            return_freed_memory()
            held[index] = resident_bytes()
        counts = token.draft_counts
    assert counts is not None
    assert counts.num_tokens == 2000
    assert counts.num_verify_passes > 500, "few rounds prove little"
    assert held[2000] - held[200] < 192 << 10, "a hundred bytes a token"
    session.close()


def identity_policies(model: NestedCausalLM) -> dict[str, tuple[DraftPolicy, int, int]]:
    """What drafts for real models, by name: the policy, threads and n-gram drafts; all widths, lengths of 1 to 15."""
    found = dict[str, tuple[DraftPolicy, int, int]]()
    full = torch.full((model.num_units,), max(model.bit_widths))
    for index, (width, length) in enumerate(((3, 1), (4, 7), (5, 2), (6, MOST_PENDING), (3, 4))):
        policy = drafts_at(f"draft:{width},length={length}", torch.full_like(full, width), full, length=length)
        found[policy.name] = (policy, 1 + index % 2, NGRAM_DRAFTS * (index == 4))
    for index, kind in enumerate(KINDS):
        low, high = ((3, 4), (3, 6), (4, 5))[index % 3]
        policy = policy_of(kind, model.num_units, low=low, high=high)
        found[f"{kind} at {low} and {high}"] = (policy, 2 - index % 2, (0, 3, NGRAM_DRAFTS)[index % 3])
    return found


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(not os.environ.get("FQ_REAL_MODELS"), reason="FQ_REAL_MODELS names no folder of real models")
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_texts_of_real_models_are_the_same_whatever_drafts(name: str) -> None:
    """Greedy texts at 8 bits, by all policies in turn with one thread and two: those of plain decoding with one."""
    model = load_model(str(Path(os.environ["FQ_REAL_MODELS"]) / name), QuantizationConfig())
    full = torch.full((model.num_units,), max(model.bit_widths))
    profile = unmeasured_profile(model)

    def runner_of(policy: DraftPolicy | StaticAllocation, num_threads: int, ngram_drafts: int = 0) -> PolicyRunner:
        room = PROMPT_TOKENS + TEXT_TOKENS
        session = session_opener(model, max_length=room, decoder="lean", num_threads=num_threads)(1)
        return PolicyRunner(session, make_controller(model, policy, profile), ngram_drafts=ngram_drafts)

    plain = runner_of(StaticAllocation("plain", full), 1)
    runners = {name: runner_of(*how) for name, how in identity_policies(model).items()}
    most = min(TEXT_TOKENS, -(-IDENTITY_TOKENS // len(runners)))  # everybody has a turn
    lengths = [min(most, IDENTITY_TOKENS - first) for first in range(0, IDENTITY_TOKENS, most)]
    source = model.token_text.encode(Path(argparse.__file__).read_text(encoding="utf-8"))
    places = torch.linspace(0, len(source) - PROMPT_TOKENS, len(lengths)).long().tolist()
    drafted, accepted = dict.fromkeys(runners, 0), dict.fromkeys(runners, 0)
    for place, length, name in zip(places, lengths, itertools.cycle(runners), strict=False):
        request = Request(torch.tensor(source[place : place + PROMPT_TOKENS]), length)
        want = [token.token_id for token in plain.generate([request])]
        tokens = list(runners[name].generate([request]))
        assert [token.token_id for token in tokens] == want, f"{name}, from token {place} of the source"
        assert len(want) == length
        counts = tokens[-1].draft_counts
        drafted[name] += 0 if counts is None else sum(counts.drafted)
        accepted[name] += 0 if counts is None else sum(counts.accepted)
    drafts = f"{sum(accepted.values())} of {sum(drafted.values())} drafts accepted"
    print(f"{sum(lengths)} tokens in {len(lengths)} texts by {len(runners)} policies in turn are the same; {drafts}")
    assert min(drafted.values()) > 0, f"who does not draft proves nothing: {drafted}"
    assert 0 < sum(accepted.values()) < sum(drafted.values())
