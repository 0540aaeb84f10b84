"""Recording traces: a model continues prompts greedily, and drafts from every position at every draft width.

Each draft starts from a *clean past*: keys and values that the verify width wrote. Drafts are recorded to their full
depth, beyond the first that disagrees with the continuation too, because a controller that is still drafting then sees
exactly those signals and does not know better.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.engine.control.signals import (
    OUTPUT_SIGNALS,
    SignalSchema,
    log_probabilities,
    output_signals,
    project_embedding,
)
from flexquant_rl.engine.control.traces import (
    MAX_DEPTH,
    NO_TOKEN,
    RecordingPlan,
    SequenceTrace,
    is_whole,
    occurring_tokens,
    read_sequence,
    sequence_path,
    start_recording,
    write_embedding,
    write_sequence,
)
from flexquant_rl.engine.decoding.choice import session_opener
from flexquant_rl.engine.decoding.decoder import Decoder, check_max_length, greedy_tokens
from flexquant_rl.engine.decoding.lean import why_not_lean
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wraps a loop: what to go through, what it is, how many there are."""


def check_plan(plan: RecordingPlan, model: NestedCausalLM) -> None:
    """Raises InputError if a model cannot be recorded as planned."""
    plan.check_model(model.fingerprint)
    stored = ", ".join(map(str, model.bit_widths))
    allocated = [width for allocation in plan.mixed for width in allocation]
    for width in (plan.verify_width, *filter(is_whole, plan.draft_widths), *allocated):
        if width not in model.bit_widths:
            raise InputError(f"width {width} is not stored; this model holds {stored}: choose one of them")
    if any(len(allocation) != model.num_units for allocation in plan.mixed):
        raise InputError(f"an allocation is not for {model.num_units} units; record this model with `fq record`")
    if not plan.draft_widths or max(plan.draft_widths) >= plan.verify_width:
        raise InputError(
            f"draft widths {list(plan.draft_widths)} must be one or more below the verify width {plan.verify_width}"
        )
    if not 1 <= plan.depth <= MAX_DEPTH:
        raise InputError(f"depth={plan.depth} must be 1 to {MAX_DEPTH} tokens")
    if plan.max_new_tokens < 2:
        raise InputError(f"max_new_tokens={plan.max_new_tokens} leaves nothing to draft; give 2 or more")
    check_max_length(_row_length(plan), model)
    reason = why_not_lean(model) if plan.decoder == "lean" else None
    if reason is not None:
        raise InputError(f"the lean decoder cannot run this model ({reason}); use --decoder hf")


def record(
    plan: RecordingPlan,
    model: NestedCausalLM,
    directory: Path,
    *,
    num_threads: int = 1,
    progress: Progress = lambda items, label, total: items,
) -> int:
    """Makes the sequences of a recording that are not there yet; the bytes are those of one that was not interrupted.

    Args:
        plan: What to record.
        model: The model.
        directory: Where.
        num_threads: Sequences recorded at a time, each by a lean decoder with one thread. 1 with `hf`.
        progress: Wraps the loop over sequences.

    Returns:
        Sequences made now.

    Raises:
        InputError: If the plan does not fit the model, or the directory holds something else.
        KeyboardInterrupt: After an interruption, with what to do next.
    """
    check_plan(plan, model)
    start_recording(directory, plan)
    todo = [index for index in range(len(plan.sequences)) if not sequence_path(directory, index).is_file()]
    try:
        if todo:
            _record_sequences(plan, model, directory, todo, num_threads, progress)
        sequences = tuple(read_sequence(directory, plan, index) for index in range(len(plan.sequences)))
        token_ids = occurring_tokens(sequences)
        num_dims = SignalSchema(model.num_units, model.bit_widths).num_embedding_dims
        embedding = project_embedding(model.embedding_matrix(), num_dims).cpu()
        write_embedding(directory, plan, token_ids, embedding[token_ids])
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt("the same command goes on from there") from interruption
    return len(todo)


def _row_length(plan: RecordingPlan) -> int:
    """Tokens of the longest prompt and a whole continuation."""
    return max((len(planned.prompt_ids) for planned in plan.sequences), default=0) + plan.max_new_tokens


def _record_sequences(
    plan: RecordingPlan,
    model: NestedCausalLM,
    directory: Path,
    todo: list[int],
    num_threads: int,
    progress: Progress,
) -> None:
    length = _row_length(plan)
    num_workers = min(num_threads, len(todo)) if plan.decoder == "lean" else 1
    sessions = [session_opener(model, max_length=length, decoder=plan.decoder)(1) for _ in range(num_workers)]
    free = list(sessions)
    stop = threading.Event()

    def make(index: int) -> None:
        session = free.pop()
        try:
            trace = record_sequence(plan, session, plan.sequences[index].prompt_ids, stop)
            if trace is not None:
                write_sequence(directory, plan, index, trace)
        finally:
            free.append(session)

    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(make, index) for index in todo]
        try:
            for future in progress(as_completed(futures), "recording sequences", len(futures)):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    for session in sessions:
        session.close()


def record_sequence(
    plan: RecordingPlan, decoder: Decoder, prompt_ids: tuple[int, ...], stop: threading.Event | None = None
) -> SequenceTrace | None:
    """Continues one prompt and drafts from each of its positions.

    Args:
        plan: How.
        decoder: Has one row, with room for the prompt and the continuation.
        prompt_ids: The prompt.
        stop: Once set, nothing is returned.
    """
    units = decoder.model.num_units
    verify = torch.full((units,), plan.verify_width)
    levels = plan.levels(units)
    # At the largest width, as every prompt that is served.
    log_probs = log_probabilities(decoder.prefill(torch.tensor([prompt_ids])).logits)
    token = greedy_tokens(log_probs)
    tokens, settled = [token], [output_signals(log_probs, token, None)]
    drafts, signals = list[Tensor](), list[Tensor]()
    while len(drafts) < plan.max_new_tokens and (not drafts or int(token) not in plan.eos_token_ids):
        if stop is not None and stop.is_set():
            return None
        depth = plan.draft_depth(len(drafts))
        chains = [_draft(decoder, token, log_probs, widths, depth, plan.depth) for widths in levels]
        drafts.append(torch.stack([ids for ids, _ in chains]))
        signals.append(torch.stack([values for _, values in chains]))
        previous, log_probs = log_probs, log_probabilities(decoder.step(token, verify).logits)
        token = greedy_tokens(log_probs)
        tokens.append(token)
        settled.append(output_signals(log_probs, token, previous))
    return SequenceTrace(
        token_ids=torch.cat(tokens).int(),
        settled_signals=torch.cat(settled).cpu(),
        draft_ids=torch.stack(drafts),
        draft_signals=torch.stack(signals),
    )


def _draft(
    decoder: Decoder, token: Tensor, log_probs: Tensor, widths: Tensor, depth: int, room: int
) -> tuple[Tensor, Tensor]:
    """Drafts `depth` tokens at one width and forgets them: `[room]` int32 and `[room, 5]` float32."""
    held = decoder.lengths.clone()
    ids = torch.full((room,), NO_TOKEN, dtype=torch.int32)
    signals = torch.zeros(room, len(OUTPUT_SIGNALS), dtype=torch.float32)
    for index in range(depth):
        previous, log_probs = log_probs, log_probabilities(decoder.step(token, widths).logits)
        token = greedy_tokens(log_probs)
        ids[index] = token[0]
        signals[index] = output_signals(log_probs, token, previous)[0]
    decoder.truncate(held)
    return ids, signals
