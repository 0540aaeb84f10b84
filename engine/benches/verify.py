"""Times a pass of the lean decoder over several tokens, by their number, in steps: what verifying drafts costs.

A pass reads every weight once, whatever the number of tokens, so a step is the least that it can cost. All passes start
from the same cache; none is timed unless its logits are, bit for bit, those of single steps.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexquant_rl.engine.benches.clocks import HostClock, host_clock
from flexquant_rl.engine.benches.decode import no_tokenizer, random_llama
from flexquant_rl.engine.benches.harness import BenchRefusedError, Provider, Row, Track, Turn, interleave, rows
from flexquant_rl.engine.benches.llama_cpp import (
    NOT_INSTALLED,
    GgufType,
    LlamaCppSession,
    has_llama_cpp,
    named_peer,
    write_gguf,
)
from flexquant_rl.engine.benches.options import VerifyBench
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest

_LEAN = "lean"
_LLAMA_CPP_TYPE: GgufType = "Q8_0"


def bench_verify(
    config: VerifyBench, track: Track = iter, progress: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Times passes of every number of tokens at every width.

    Args:
        config: What to time.
        track: Wraps the loop over rounds.
        progress: Takes one line about what happens.

    Returns:
        One row per provider, number of threads, width and number of tokens; `steps` is its time over that of one token.

    Raises:
        BenchRefusedError: If a pass gives other logits than single steps.
        InputError: If the checkpoint cannot be read, or holds fewer positions than a pass needs.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)
    clock = host_clock(max(config.threads))
    random_model = random_llama(replace(config, new_tokens=max(config.num_tokens))) if config.model is None else None
    if random_model is None:
        assert config.model is not None
        progress("loading the model")
        model = load_model(resolve_model(config.model), config.quantization, keep_reference=False)
    else:
        progress("nesting the weights")
        model = nest(copy.deepcopy(random_model), no_tokenizer(), config.quantization, keep_reference=False)
    token_ids = torch.randint(model.vocab_size, (1, config.prompt_tokens + max(config.num_tokens)))
    with ExitStack() as stack, torch.inference_mode():
        providers = [
            provider
            for num_threads in config.threads
            for provider in _lean_providers(config, clock, model, token_ids, num_threads)
        ]
        peer = _peer_model(config, model, random_model, progress) if config.peers else None
        if peer is not None:
            progress("writing the same weights as GGUF")
            providers += _llama_cpp_providers(config, clock, peer, token_ids[0].tolist(), stack)
            del peer
        interleave(providers, config.rounds, track)
    common = {
        "op": "verify",
        "model": "random" if config.model is None else Path(resolve_model(config.model)).name,
        "units": model.num_units,
        "prompt_tokens": config.prompt_tokens,
        "clock": clock.name,
        "seed": config.seed,
    }
    found = rows(providers, common)
    add_steps(found)
    return found


def _peer_model(
    config: VerifyBench, model: NestedCausalLM, random_model: PreTrainedModel | None, progress: Callable[[str], None]
) -> PreTrainedModel | None:
    """The unquantised weights, for llama.cpp; None, and a line why, where it is not measured."""
    if config.model is not None:
        return named_peer(config.model, config.reference, model, _LLAMA_CPP_TYPE, progress)
    if has_llama_cpp():
        return random_model
    progress(NOT_INSTALLED)
    return None


def add_steps(found: Sequence[Row]) -> None:
    """Notes in each row its time over that of one token by the same provider, at the same width and threads."""
    steps = {_kind(row): row["p50_us"] for row in found if row["num_tokens"] == 1}
    for row in found:
        row["steps"] = round(row["p50_us"] / steps[_kind(row)], 3)


def _kind(row: Row) -> tuple[Any, ...]:
    return row["provider"], row["num_threads"], row["bit_width"]


def _lean_providers(
    config: VerifyBench, clock: HostClock, model: NestedCausalLM, token_ids: Tensor, num_threads: int
) -> list[Provider]:
    session = LeanSession(LeanDecoder(model, max_length=token_ids.shape[1], num_threads=num_threads))
    session.prefill(token_ids[:, : config.prompt_tokens])
    found = []
    for width in config.bit_widths:
        widths = torch.full((model.num_units,), width)
        _check_rows(session, token_ids[:, config.prompt_tokens :], widths, config.num_tokens)
        num_bytes = sum(model.weight_bytes(unit, width) for unit in range(model.num_units))
        for count in config.num_tokens:
            drafts = token_ids[:, config.prompt_tokens :][:, :count]
            turn = functools.partial(_lean_turn, config, clock, session, drafts, widths)
            facts = {"bit_width": width, "num_threads": num_threads, "num_tokens": count}
            found.append(Provider(_LEAN, turn, num_bytes, facts))
    return found


def _lean_turn(
    config: VerifyBench, clock: HostClock, session: LeanSession, drafts: Tensor, widths: Tensor
) -> Iterable[float]:
    # A single token is decoded by a step, which takes a shorter way than a pass over several.
    step = drafts.shape[1] == 1
    call = (lambda: session.step(drafts[:, 0], widths)) if step else (lambda: session.extend(drafts, widths))
    for _ in range(config.new_tokens):
        yield clock.seconds(call)
        session.truncate(torch.tensor([config.prompt_tokens]))


def _check_rows(session: LeanSession, drafts: Tensor, widths: Tensor, counts: Iterable[int]) -> None:
    """Refuses to time passes whose logits are not those of single steps; leaves the session as it was."""
    start = session.lengths
    steps = torch.stack([session.step(token_id, widths).logits for token_id in drafts.unbind(1)], 1)
    session.truncate(start)
    for count in counts:
        logits = session.extend(drafts[:, :count], widths).logits
        session.truncate(start)
        if not torch.equal(logits, steps[:, :count]):
            raise BenchRefusedError(f"a pass over {count} tokens at {int(widths[0])} bits has other logits than steps")


def _llama_cpp_providers(
    config: VerifyBench, clock: HostClock, hf_model: Any, token_ids: list[int], stack: ExitStack
) -> list[Provider]:
    """llama.cpp's batches on the same weights at 8 bits, logits of every token asked for."""
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.gguf"
    write_gguf(hf_model, path, _LLAMA_CPP_TYPE)
    prompt, drafts = token_ids[: config.prompt_tokens], token_ids[config.prompt_tokens :]
    found = []
    for num_threads in config.threads:
        session = LlamaCppSession(path, max_length=len(token_ids), num_threads=num_threads)
        stack.callback(session.close)
        for count in config.num_tokens:
            facts = {"bit_width": 8.5, "num_threads": num_threads, "num_tokens": count}
            turn = _llama_cpp_turn(config, clock, session, prompt, drafts[:count])
            found.append(Provider(f"llama_cpp_{_LLAMA_CPP_TYPE.lower()}", turn, None, facts))
    return found


def _llama_cpp_turn(
    config: VerifyBench, clock: HostClock, session: LlamaCppSession, prompt: list[int], drafts: list[int]
) -> Turn:
    def turn() -> Iterable[float]:
        session.prefill(prompt)
        for _ in range(config.new_tokens):
            yield clock.seconds(lambda: session.extend(drafts))
            session.truncate(len(prompt))

    return turn
