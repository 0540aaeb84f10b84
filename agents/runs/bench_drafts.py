"""Tokens per second with drafts and without, ours beside llama.cpp's, on the same prompts in one run.

All continue the same token ids by the same number of tokens, or to the end that the model gives its text. A turn is one
prompt; everybody takes a turn on a prompt before the next one, in every second round in reversed order. Greedy texts
are compared too: what verifies at the largest width must give the text of plain decoding, or nothing is reported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flexquant_rl.agents.commands.servable import Servable, load_servable, weighs_units
from flexquant_rl.agents.config import DraftsBench
from flexquant_rl.engine.benches.clocks import HostClock, host_clock
from flexquant_rl.engine.benches.harness import BenchRefusedError, Provider, Row, Track, add_tokens_per_s, rows
from flexquant_rl.engine.benches.llama_cpp import (
    GgufType,
    LlamaCppSession,
    named_peer,
    write_gguf,
)
from flexquant_rl.engine.benches.llama_cpp_drafts import DraftRule, continue_greedily, continue_with_drafts
from flexquant_rl.engine.control.controller import make_controller
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts, may_draft
from flexquant_rl.engine.control.draft_counts import DraftCounts
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.served_drafts import own_ngram_drafts
from flexquant_rl.engine.control.traces import PlannedSequence
from flexquant_rl.engine.decoding.choice import SessionOpener, default_decoder, session_opener
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.freed_memory import return_freed_memory
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.recording_prompts import held_out_prompts

_PLAIN = "fixed:8"  # 8 is the largest width of every nested model
# A text loops if its last tokens, so many, stand once more at most as many tokens before. Drafts then cost nothing.
_LOOP_TOKENS = 32
LLAMA_CPP = "llama_cpp_q8_0"
LLAMA_CPP_DRAFTS = "llama_cpp_q8_0_drafts_q4_0"
"""A loop of ours over llama.cpp's library: llama-cpp-python has no draft models."""


@dataclass(frozen=True)
class Turn:
    """One prompt continued once.

    Attributes:
        token_ids: The continuation; its first token comes from the prompt's pass.
        seconds: Time of all tokens but the first.
        counts: What drafts came to; None without any.
    """

    token_ids: list[int]
    seconds: float
    counts: DraftCounts | None = None


@dataclass
class Contender:
    """One way to continue prompts.

    Attributes:
        name: Of its rows.
        facts: What tells it apart from others of the same name.
        continue_prompt: Takes a prompt's ids.
        plain: Decodes without drafts what this one's text is compared with; None for plain decoding itself.
        must_equal: Whether another text than that of `plain` is a mistake.
        turns: By prompt: the turns so far.
    """

    name: str
    facts: dict[str, Any]
    continue_prompt: Callable[[Sequence[int]], Turn]
    plain: Contender | None = None
    must_equal: bool = False
    turns: list[list[Turn]] = field(default_factory=list)


def bench_drafts(
    config: DraftsBench, track: Track = iter, progress: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Times all contenders on all prompts.

    Args:
        config: What to time.
        track: Wraps the loop over rounds.
        progress: Takes one line about what happens.

    Returns:
        One row per contender and number of threads. `p50_us` is of a token: the median over rounds of the time of all
        prompts. `tokens_per_s_by_prompt` has medians over rounds. `ended_prompts` counts the texts that the model
        ended, `looping_prompts` those that loop; `tokens_per_s_without_loops` is that of the others. Each contender's
        are those of its own texts. `same_tokens` counts the tokens before the first one that differs from plain
        decoding by the same library, in all prompts together; ours with any number of threads are compared with plain
        decoding with the first of `threads`.

    Raises:
        BenchRefusedError: If drafts that are verified at the largest width, or plain decoding with another number of
            threads, give another text than plain decoding.
        InputError: If model, policies or text cannot be used.
    """
    clock = host_clock(max(config.threads))
    policies = _policies(config)
    model = next(iter(policies.values())).model
    prompts = held_out_prompts(
        model,
        config.text,
        num_prompts=config.prompts,
        prompt_tokens=config.prompt_tokens,
        text_field=config.text_field,
    )
    with ExitStack() as stack, torch.inference_mode():
        contenders = list[Contender]()
        for num_threads in config.threads:
            contenders += _lean_contenders(config, clock, policies, num_threads, next(iter(contenders), None))
        files = _gguf_files(config, model, stack, progress)
        if files is not None:
            for num_threads in config.threads:
                contenders += _llama_cpp_contenders(config, clock, files, num_threads, model.eos_token_ids, stack)
        take_turns(contenders, prompts, config.rounds, track)
    return _rows(config, contenders, prompts, model, clock)


def take_turns(
    contenders: Sequence[Contender], prompts: Sequence[PlannedSequence], rounds: int, track: Track = iter
) -> None:
    """Everybody continues a prompt once, which does not count, and then every prompt `rounds` times.

    Raises:
        BenchRefusedError: If a text is another one than it must be.
    """
    for contender in contenders:
        contender.turns = [[] for _ in prompts]
        contender.continue_prompt(prompts[0].prompt_ids)
    for index in track(range(rounds)):
        for number, prompt in enumerate(prompts):
            for contender in contenders if (index + number) % 2 == 0 else reversed(contenders):
                contender.turns[number].append(contender.continue_prompt(prompt.prompt_ids))
            for contender in contenders:
                _check_text(contender, number)


def _check_text(contender: Contender, number: int) -> None:
    if contender.plain is None or not contender.must_equal:
        return
    found, plain = (one.turns[number][-1].token_ids for one in (contender, contender.plain))
    if found != plain:
        raise BenchRefusedError(
            f"{contender.facts.get('policy', contender.name)} on prompt {number}: token {common_prefix(found, plain)} "
            "of the continuation is another one than in plain decoding"
        )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common before the first that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def ends_in_loop(token_ids: Sequence[int]) -> bool:
    """Whether a text ends by saying the same again and again."""
    last = token_ids[-_LOOP_TOKENS:]
    most = min(_LOOP_TOKENS, len(token_ids) - _LOOP_TOKENS)
    return any(token_ids[-_LOOP_TOKENS - period : -period] == last for period in range(1, most + 1))


def _policies(config: DraftsBench) -> dict[str, Servable]:
    """Plain decoding at the largest width, and every policy that is asked for, all of one nested model."""
    path = resolve_model(config.model)
    asked = tuple(dict.fromkeys((_PLAIN, *config.policy)))
    found: dict[str, Servable] = {}
    model: NestedCausalLM | None = None
    # A policy that was trained says how a plain model is nested, so it comes before those that do not care.
    for name in sorted(asked, key=lambda name: not Path(name).is_dir()):
        profile = config.profile if weighs_units(name) else None
        servable = load_servable(path, name, profile=profile, threads=config.threads[0], loaded=model)
        model = model or servable.model
        if servable.model.fingerprint != model.fingerprint:
            raise InputError(
                f"{name} is for weights that are nested in another way than those of the policies before it; nest them "
                "once with fq quantize and name the checkpoint"
            )
        found[name] = replace(servable, model=model)
    return {name: found[name] for name in asked}


def _lean_contenders(
    config: DraftsBench, clock: HostClock, policies: dict[str, Servable], num_threads: int, plain: Contender | None
) -> list[Contender]:
    """All policies with so many threads; `plain` is plain decoding with those that came first, if any did."""
    model = next(iter(policies.values())).model
    opener = session_opener(model, max_length=config.prompt_tokens + config.new_tokens - 1, num_threads=num_threads)
    found: list[Contender] = []
    for name, servable in policies.items():
        policy = servable.policy
        drafts: dict[str, object] = {}
        if may_draft(policy):
            drafts["ngram_drafts"] = own_ngram_drafts(policy)
        is_lossless = name == _PLAIN or (
            isinstance(policy, DeployedDrafts) and policy.verify_width == max(model.bit_widths)
        )
        found.append(
            Contender(
                default_decoder(model)[0],
                {"policy": name, "num_threads": num_threads, **drafts},
                _lean_turn(opener, servable, clock, config),
                # Drafts sample another text, of the same distribution.
                None if config.temperature else plain,
                is_lossless,
            )
        )
        plain = plain or found[0]
    return found


def _lean_turn(
    opener: SessionOpener, servable: Servable, clock: HostClock, config: DraftsBench
) -> Callable[[Sequence[int]], Turn]:
    setting = servable.setting()
    kl_weight = 1.0 if setting is None else setting.kl_weight

    def continue_prompt(prompt_ids: Sequence[int]) -> Turn:
        controller = make_controller(servable.model, servable.policy, servable.profile)
        runner = PolicyRunner(opener(1), controller)
        request = Request(
            torch.tensor(prompt_ids),
            config.new_tokens,
            kl_weight=kl_weight,
            temperature=config.temperature,
        )
        with closing(runner.decoder):
            stream = runner.generate([request])
            tokens: list[GeneratedToken] = [next(stream)]
            seconds = clock.seconds(lambda: tokens.extend(stream))
        return Turn([token.token_id for token in tokens], seconds, tokens[-1].draft_counts)

    return continue_prompt


@dataclass(frozen=True)
class _GgufFiles:
    """The same weights twice; no `draft` where llama.cpp is timed without drafts alone."""

    target: Path
    draft: Path | None


def _gguf_files(
    config: DraftsBench, model: NestedCausalLM, stack: ExitStack, progress: Callable[[str], None]
) -> _GgufFiles | None:
    """The unquantised weights as GGUF, deleted with the stack; None where llama.cpp is not measured."""
    if config.temperature and config.peers:
        progress(f"llama.cpp is not timed: our loops over it are greedy, and the temperature is {config.temperature:g}")
        return None
    types: tuple[GgufType, ...] = ("Q8_0", "Q4_0") if config.draft_lengths else ("Q8_0",)
    hf_model = named_peer(config.model, config.reference, model, types[-1], progress) if config.peers else None
    if hf_model is None:
        return None
    progress(f"writing the unquantised weights as GGUF, at {' and '.join(types)}")
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    files = _GgufFiles(directory / "q8_0.gguf", directory / "q4_0.gguf" if config.draft_lengths else None)
    write_gguf(hf_model, files.target, "Q8_0")
    if files.draft is not None:
        write_gguf(hf_model, files.draft, "Q4_0")
    del hf_model
    return_freed_memory()
    return files


def _llama_cpp_contenders(
    config: DraftsBench,
    clock: HostClock,
    files: _GgufFiles,
    num_threads: int,
    eos_token_ids: tuple[int, ...],
    stack: ExitStack,
) -> list[Contender]:
    max_length = config.prompt_tokens + config.new_tokens + max(config.draft_lengths, default=0)

    def opened(path: Path) -> LlamaCppSession:
        session = LlamaCppSession(path, max_length=max_length, num_threads=num_threads)
        stack.callback(session.close)
        return session

    target = opened(files.target)
    count = config.new_tokens - 1

    def plain(prompt_ids: Sequence[int]) -> Turn:
        tokens = [int(target.prefill(prompt_ids).argmax())]
        seconds = clock.seconds(lambda: tokens.extend(continue_greedily(target, tokens[0], count, eos_token_ids)))
        return Turn(tokens, seconds)

    first = Contender(LLAMA_CPP, {"num_threads": num_threads}, plain)
    if files.draft is None:
        return [first]
    draft = opened(files.draft)

    def drafted(rule: DraftRule) -> Callable[[Sequence[int]], Turn]:
        def continue_prompt(prompt_ids: Sequence[int]) -> Turn:
            draft.prefill(prompt_ids)
            tokens = [int(target.prefill(prompt_ids).argmax())]
            made: list[tuple[list[int], DraftCounts]] = []
            text = [*prompt_ids, *tokens]
            seconds = clock.seconds(
                lambda: made.append(continue_with_drafts(target, draft, text, count, rule, eos_token_ids))
            )
            return Turn(tokens + made[0][0], seconds, made[0][1])

        return continue_prompt

    rules = [DraftRule(length, p_min) for length in config.draft_lengths for p_min in config.p_min]
    return [first] + [
        Contender(
            LLAMA_CPP_DRAFTS,
            {"num_threads": num_threads, "draft_length": rule.length, "p_min": rule.p_min},
            drafted(rule),
            first,
        )
        for rule in rules
    ]


def _rows(
    config: DraftsBench,
    contenders: Sequence[Contender],
    prompts: Sequence[PlannedSequence],
    model: NestedCausalLM,
    clock: HostClock,
) -> list[Row]:
    providers = []
    for contender in contenders:
        facts = contender.facts | _text_facts(contender, model.eos_token_ids)
        facts |= _draft_facts(contender) | _same_facts(contender)
        providers.append(Provider(contender.name, list, None, facts, _seconds_of_a_token(contender.turns)))
    common = {
        "op": "drafts",
        "model": Path(config.model).name,
        "model_fingerprint": model.fingerprint,
        "prompts": len(prompts),
        "prompt_sources": [prompt.source for prompt in prompts],
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "temperature": config.temperature,
        "clock": clock.name,
    }
    found = rows(providers, common)
    add_tokens_per_s(found)
    _compare(found)
    return found


def _seconds_of_a_token(prompts: Sequence[Sequence[Turn]]) -> list[float]:
    """In each round, over all tokens that are timed: every text's but its first.

    Raises:
        InputError: If there are none.
    """
    found: list[float] = []
    for turns in zip(*prompts, strict=True):
        num_timed = sum(len(turn.token_ids) - 1 for turn in turns)
        if not num_timed:
            raise InputError("every text ends with its first token, which leaves nothing to time; give other --text")
        found.append(sum(turn.seconds for turn in turns) / num_timed)
    return found


def _text_facts(contender: Contender, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """How the texts end, and how fast they come."""
    last = [turns[-1].token_ids for turns in contender.turns]
    loops = [ends_in_loop(token_ids) for token_ids in last]
    speeds = [
        round((len(turns[-1].token_ids) - 1) / median(turn.seconds for turn in turns), 1) for turns in contender.turns
    ]
    facts: dict[str, Any] = {
        "tokens_per_s_by_prompt": speeds,
        "timed_tokens": sum(len(token_ids) - 1 for token_ids in last),
        "ended_prompts": sum(token_ids[-1] in eos_token_ids for token_ids in last),
        "looping_prompts": sum(loops),
    }
    others = [turns for turns, is_loop in zip(contender.turns, loops, strict=True) if not is_loop]
    if any(len(turns[-1].token_ids) > 1 for turns in others):
        facts["tokens_per_s_without_loops"] = round(1 / median(_seconds_of_a_token(others)), 2)
    return facts


def _draft_facts(contender: Contender) -> dict[str, Any]:
    """What drafts came to in one round over all prompts; nothing where there were none."""
    counts = [turns[-1].counts for turns in contender.turns]
    known = [one for one in counts if one is not None]
    passes = sum(one.num_verify_passes for one in known)
    if not passes:
        return {}

    def share(kept: int, made: int) -> float | None:
        return round(kept / made, 3) if made else None

    return {
        "tokens_per_pass": round(sum(one.num_tokens for one in known) / passes, 3),
        "acceptance": share(sum(sum(one.accepted) for one in known), sum(sum(one.drafted) for one in known)),
        "acceptance_of_found": share(sum(one.num_found_accepted for one in known), sum(one.num_found for one in known)),
    }


def _same_facts(contender: Contender) -> dict[str, Any]:
    """How much of the text is that of plain decoding by the same library, in one round over all prompts."""
    if contender.plain is None:
        return {}
    texts = [
        (own[-1].token_ids, plain[-1].token_ids)
        for own, plain in zip(contender.turns, contender.plain.turns, strict=True)
    ]
    return {
        "same_tokens": sum(common_prefix(own, plain) for own, plain in texts),
        "all_tokens": sum(len(own) for own, _ in texts),
        "same_prompts": sum(own == plain for own, plain in texts),
    }


def _compare(found: Sequence[Row]) -> None:
    """Marks llama.cpp's best setting of drafts, and notes in our rows how many times faster than others they are."""
    for num_threads in dict.fromkeys(row["num_threads"] for row in found):
        own = [row for row in found if row["num_threads"] == num_threads]
        plain, *others = [row for row in own if "policy" in row]
        peers = [row for row in own if row["provider"] == LLAMA_CPP]
        drafted = [row for row in own if row["provider"] == LLAMA_CPP_DRAFTS]
        if drafted:
            best = min(drafted, key=lambda row: float(row["p50_us"]))
            best["best"] = True
            peers.append(best)
        for row in (plain, *others):
            base = [] if row is plain else [(plain["policy"], plain)]
            compared = base + [(peer["provider"], peer) for peer in peers]
            row["times_faster_than"] = {name: round(other["p50_us"] / row["p50_us"], 3) for name, other in compared}
