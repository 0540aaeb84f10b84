"""Which prompts recordings and benchmarks continue: cut from texts, a few of many documents, by split and by text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from flexquant_rl.engine.control.recording import check_plan
from flexquant_rl.engine.control.traces import PlannedSequence, RecordingPlan, is_whole
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.decoding.options import DecoderName
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.prompts import PromptWindows, Split, load_windows, spread

SHARES: dict[Split, float] = {"train": 0.5, "validation": 0.2, "test": 0.3}
"""Parts of a recording. More is judged than in the lossy mode: a sequence has few independent rounds."""
_DEFAULT_SOURCE = "stdlib"


def plan_recording(
    model: NestedCausalLM,
    texts: Sequence[Path],
    *,
    decoder: DecoderName,
    verify_width: int,
    widths: Sequence[float],
    mixed: Sequence[Sequence[int]] = (),
    depth: int,
    tokens: int,
    prompt_tokens: int,
    max_new_tokens: int,
    text_field: str | None = None,
) -> RecordingPlan:
    """What a recording of a model holds, checked before its text is read.

    Args:
        model: The model.
        texts: As for `plan_sequences`.
        decoder: Whose arithmetic; `auto`: lean where it can run the model.
        verify_width: Width of the continuations.
        widths: Those that draft, a mean one for each allocation.
        mixed: The allocations `[U]` of the widths that are not whole, ascending.
        depth: Tokens drafted from every position.
        tokens: Tokens to record in all.
        prompt_tokens: Tokens of a prompt.
        max_new_tokens: Tokens of a continuation at most.
        text_field: As for `plan_sequences`.

    Raises:
        InputError: If the model cannot be recorded like that, or as `plan_sequences`.
    """
    if twice := [width for width in sorted(set(widths)) if list(widths).count(width) > 1]:
        given = " ".join(f"{width:g}" for width in widths)
        raise InputError(f"draft widths {given} name {twice[0]:g} twice; name each once")
    plan = RecordingPlan(
        fingerprint=model.fingerprint,
        decoder=default_decoder(model)[0] if decoder == "auto" else decoder,
        verify_width=verify_width,
        draft_widths=tuple(int(width) if is_whole(width) else width for width in sorted(widths)),
        depth=depth,
        max_new_tokens=max_new_tokens,
        eos_token_ids=tuple(model.eos_token_ids),
        sequences=(),
        mixed=tuple(map(tuple, mixed)),
    )
    check_plan(plan, model)
    sequences = plan_sequences(
        model,
        texts,
        num_sequences=-(-tokens // max_new_tokens),
        prompt_tokens=prompt_tokens,
        text_field=text_field,
    )
    return plan.of_sequences(sequences)


def plan_sequences(
    model: NestedCausalLM,
    texts: Sequence[Path],
    *,
    num_sequences: int,
    prompt_tokens: int,
    text_field: str | None = None,
) -> tuple[PlannedSequence, ...]:
    """Cuts prompts from texts, the same number from each and in `SHARES` from its splits, one of each in turn.

    Args:
        model: Has the tokenizer.
        texts: Files, as for `load_windows`, each a source of its own; none: the held-out standard library.
        num_sequences: Prompts in all, raised to one from each split of each text.
        prompt_tokens: Tokens of a prompt.
        text_field: As for `load_windows`.

    Raises:
        InputError: If a text cannot be read or a split of it holds no prompt, or two files have the same name.
    """
    names = [path.name for path in texts] or [_DEFAULT_SOURCE]
    if len(set(names)) < len(names):
        raise InputError(f"--text {' '.join(map(str, texts))}: two files have one name; rename one of them")
    files: list[tuple[Path, ...]] = [(path,) for path in texts] or [()]
    columns, num_documents = list[list[PlannedSequence]](), 0
    for name, file in zip(names, files, strict=True):
        windows = load_windows(model.tokenizer, prompt_tokens, file, text_field=text_field)
        for split in get_args(Split):
            count = max(1, round(SHARES[split] * num_sequences / len(names)))
            prompts, documents = _pick(windows, split, count)
            columns.append(
                [
                    PlannedSequence(tuple(prompt), split, num_documents + document, name)
                    for prompt, document in zip(prompts.tolist(), documents.tolist(), strict=True)
                ]
            )
            num_documents += int(windows.documents(split).max()) + 1
    # In turn, so that whatever part of a recording is there is of all texts and splits.
    order = [
        (place / len(column), index, sequence)
        for index, column in enumerate(columns)
        for place, sequence in enumerate(column)
    ]
    return tuple(sequence for _, _, sequence in sorted(order, key=lambda item: item[:2]))


def held_out_prompts(
    model: NestedCausalLM,
    texts: Sequence[Path],
    *,
    num_prompts: int,
    prompt_tokens: int,
    text_field: str | None = None,
) -> list[PlannedSequence]:
    """Prompts from the test split, which neither training nor a recording's other splits have seen.

    Args:
        model: Has the tokenizer.
        texts: Files, as for `load_windows`, each a source of its own; none: the held-out standard library.
        num_prompts: Prompts in all, the same number from each file as far as its split has them.
        prompt_tokens: Tokens of a prompt.
        text_field: As for `load_windows`.

    Raises:
        InputError: If a text cannot be read or its test split holds no prompt, or there are more files than prompts.
    """
    files: list[tuple[Path, ...]] = [(path,) for path in texts] or [()]
    if num_prompts < len(files):
        raise InputError(f"{num_prompts} prompts leave some of {len(files)} files unread; give one for each")
    found = list[PlannedSequence]()
    for index, file in enumerate(files):
        windows = load_windows(model.tokenizer, prompt_tokens, file, text_field=text_field)
        count = num_prompts // len(files) + (index < num_prompts % len(files))
        prompts, documents = _pick(windows, "test", count)
        found += [
            PlannedSequence(tuple(prompt), "test", document, file[0].name if file else _DEFAULT_SOURCE)
            for prompt, document in zip(prompts.tolist(), documents.tolist(), strict=True)
        ]
    return found


def _pick(windows: PromptWindows, split: Split, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` prompts of a split and their documents, from as many documents as there are."""
    documents = windows.documents(split)
    names, sizes = documents.unique_consecutive(return_counts=True)
    per_document = math.ceil(count / len(names))
    first, places = 0, list[Tensor]()
    for size in sizes.tolist():
        # From four times as many as there are on, every place is among them.
        inner = torch.linspace(0, size - 1, min(per_document, 4 * size) + 2, dtype=torch.float64)[1:-1]
        places.append(first + inner.round().long().unique())
        first += size
    chosen = spread(torch.cat(places), count)
    return windows.split(split)[chosen], documents[chosen]
