"""What many width allocations give on one text, with each matrix decoded once and no work done twice.

All allocations walk through the model together, layer by layer. Those that begin alike share their states until they
part. Distributions over the vocabulary exist for a few tokens at a time, and are reduced at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.engine.control.output_kl import LOGITS_AT_A_TIME, ReferenceDistribution, reference_width
from flexquant_rl.engine.decoding.decoder import Decoder, check_bit_widths
from flexquant_rl.engine.layer_walk import LayerWalk, can_walk
from flexquant_rl.engine.model import NestedCausalLM

_STATE_BYTES = 1 << 30
"""Hidden states held at once, those before and after a layer together."""
_CALL_TOKENS = 2048
_KEPT_MATRIX_BYTES = 1 << 30
"""Decoded matrices of all widths that may stay; of a larger model those of a layer go when it has been walked."""
_AFFORDABLE_FLOP = 7.5e12
"""Arithmetic that a mean over text is worth: a minute and a quarter on two cores without AVX-512."""
_LEAST_WINDOWS = 3

Widths = tuple[tuple[int, int], ...]
"""For each unit the width that the prompt is read at, and the width of what follows."""

Visit = Callable[[int, slice, slice, ReferenceDistribution, Tensor], None]
"""Is shown the logits `[r, t, vocab]` of an allocation, by its index, at some rows and tokens of the text."""


@dataclass(frozen=True)
class TextFacts:
    """What one allocation gives at the T tokens that follow the prompts of n windows, each `[n, T]`, on the CPU.

    Attributes:
        output_kl_nats: KL(reference || quantised) after the token, float32.
        token_nll_nats: Negative log-likelihood of the text's next token, float32.
        top1_agreement: Whether quantised and reference agree on the most likely token.
        top1_ids: The token that is most likely by the allocation, int64.
    """

    output_kl_nats: Tensor
    token_nll_nats: Tensor
    top1_agreement: Tensor
    top1_ids: Tensor


def affordable_windows(
    model: NestedCausalLM,
    allocations: Tensor,
    length: int,
    most: int,
    *,
    least: int = _LEAST_WINDOWS,
    affordable_flop: float = _AFFORDABLE_FLOP,
) -> int:
    """How many windows of text `allocation_kl_nats` can read at a bearable price: fewer the larger the model.

    Args:
        model: The model.
        allocations: `[P, U]` int64 widths.
        length: Tokens of a window.
        most: More are not worth their time, however cheap they are.
        least: Fewer say nothing, however dear they are.
        affordable_flop: Arithmetic that all windows together are worth.

    Returns:
        From `least`, or `most` where that is less, to `most`.
    """
    num_products = float(len(allocations) * model.embedding_matrix().numel())  # the head's, of every allocation
    for end, unit in enumerate(model.units, start=1):
        if unit.kind != "head":  # allocations that are alike up to here are one
            num_products += len(allocations[:, :end].unique(dim=0)) * unit.num_weights
    affordable = int(affordable_flop / (2 * num_products * length))
    return min(max(affordable, least), most)


def allocation_kl_nats(
    decoder: Decoder,
    windows: Tensor,
    allocations: Tensor,
    *,
    first: int,
    prompt_width: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Tensor:
    """Mean output KL of each allocation against the reference, which reads everything at the reference width.

    Args:
        decoder: Knows the model and scores text; its rows are not touched.
        windows: `[n, T]` int64.
        allocations: `[P, U]` int64 widths, for all tokens alike.
        first: Positions before this one are context, and not in the means.
        prompt_width: Width of the tokens before `first`; None: as the allocation has it.
        progress: Wraps the loop over layers, the head last.

    Returns:
        `[P]` float64, nats per token.

    Raises:
        InputError: If a width is not stored.
    """
    total = torch.zeros(len(allocations), dtype=torch.float64)

    def add(index: int, rows: slice, places: slice, reference: ReferenceDistribution, logits: Tensor) -> None:
        total[index] += reference.kl_nats(logits).double().sum().cpu()

    _visit_all(decoder, windows, allocations, first, prompt_width, progress, add)
    return total / (len(windows) * (windows.shape[1] - first))


def allocation_facts(
    decoder: Decoder,
    windows: Tensor,
    allocations: Tensor,
    *,
    first: int,
    prompt_width: int | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[TextFacts]:
    """What each allocation gives at every token, against the reference as in `allocation_kl_nats`.

    Args:
        decoder: As there, and so are `allocations`, `first` and `progress`.
        windows: `[n, first + T + 1]` int64; the last token is only predicted.
        allocations: `[P, U]` int64 widths.
        first: Tokens of the prompts.
        prompt_width: Width that the prompts are read at; None: as the allocation has it.
        progress: Wraps the loop over layers, the head last.

    Raises:
        InputError: If a width is not stored.
    """
    read, following = windows[:, :-1], windows[:, first + 1 :]
    kl, nll = (torch.full((len(allocations), *following.shape), torch.nan, dtype=torch.float32) for _ in range(2))
    agrees, top1 = torch.zeros(kl.shape, dtype=torch.bool), torch.zeros(kl.shape, dtype=torch.int64)

    def note(index: int, rows: slice, places: slice, reference: ReferenceDistribution, logits: Tensor) -> None:
        at = (index, rows, slice(places.start - first, places.stop - first))
        kl[at] = reference.kl_nats(logits).cpu()
        likeliest = logits.argmax(-1)
        agrees[at], top1[at] = (reference.top1 == likeliest).cpu(), likeliest.cpu()
        chosen = logits.gather(-1, following[at[1:]].to(logits.device)[..., None])[..., 0]
        nll[at] = (logits.logsumexp(-1) - chosen).cpu()

    _visit_all(decoder, read, allocations, first, prompt_width, progress, note)
    return [TextFacts(*columns) for columns in zip(kl, nll, agrees, top1, strict=True)]


def _visit_all(
    decoder: Decoder,
    windows: Tensor,
    allocations: Tensor,
    first: int,
    prompt_width: int | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    visit: Visit,
) -> None:
    """Shows the logits of every allocation at every token from `first` on, once."""
    model = decoder.model
    check_bit_widths(allocations, model.bit_widths, model.num_units)
    if len(allocations) == 0:
        return
    if isinstance(model, NestedCausalLM) and can_walk(model, windows, reference_width(model)):
        _walked(model, windows.to(model.device), allocations, first, prompt_width, progress, visit)
    else:
        _one_by_one(decoder, windows, allocations, first, prompt_width, progress, visit)


def _one_by_one(
    decoder: Decoder,
    windows: Tensor,
    allocations: Tensor,
    first: int,
    prompt_width: int | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    visit: Visit,
) -> None:
    """Each allocation in passes of its own: for any decoder."""
    base = torch.full((decoder.model.num_units,), reference_width(decoder.model))
    num_rows = max(1, LOGITS_AT_A_TIME // (windows.shape[1] * decoder.model.vocab_size))
    places = slice(first, windows.shape[1])
    for begin in progress(range(0, len(windows), num_rows)):
        rows = slice(begin, min(begin + num_rows, len(windows)))
        reference = ReferenceDistribution(decoder.score(windows[rows], base, first=first))
        for index, bit_widths in enumerate(allocations):
            per_token = bit_widths.expand(*windows[rows].shape, -1).clone()
            if prompt_width is not None:
                per_token[:, :first] = prompt_width
            visit(index, rows, places, reference, decoder.score(windows[rows], per_token, first=first))


def _walked(
    model: NestedCausalLM,
    windows: Tensor,
    allocations: Tensor,
    first: int,
    prompt_width: int | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    visit: Visit,
) -> None:
    """All allocations together, layer by layer."""
    width = model.embedding_matrix().shape[1]
    held = 2 * (len(allocations) + 1) * windows.shape[1] * width * 4
    batches = windows.split(max(1, _STATE_BYTES // held))
    reference: Widths = ((reference_width(model),) * 2,) * model.num_units
    wanted: list[Widths] = [
        tuple((b if prompt_width is None else prompt_width, b) for b in row) for row in allocations.tolist()
    ]
    walk, forget = LayerWalk(model), _forgetting(model)
    begin = 0
    stages = iter(progress(range(len(batches) * (model.num_layers + 1))))
    for batch in batches:
        states: dict[Widths, Tensor] = {(): walk.enter(batch)}
        for layer_idx in range(model.num_layers):
            next(stages)
            states = _through_layer(walk, layer_idx, batch, states, {reference, *wanted}, first)
            forget()
        next(stages)
        _through_head(walk, batch, begin, states, reference, wanted, first, visit, forget)
        begin += len(batch)
    next(stages, None)  # lets the progress end


def _through_layer(
    walk: LayerWalk, layer_idx: int, tokens: Tensor, states: dict[Widths, Tensor], wanted: set[Widths], first: int
) -> dict[Widths, Tensor]:
    """The states after a layer by the widths up to it, from those before it; the widths of this layer outermost."""
    model = walk.model
    start, end = (sum(unit.layer_idx < bound for unit in model.units) for bound in (layer_idx, layer_idx + 1))
    after: dict[Widths, Tensor] = {}
    groups: dict[Widths, list[Widths]] = {}
    for prefix in sorted({widths[:end] for widths in wanted}):
        groups.setdefault(prefix[start:], []).append(prefix)
    per_call = max(1, _CALL_TOKENS // tokens.numel())
    for prefixes in groups.values():
        for part in (prefixes[i : i + per_call] for i in range(0, len(prefixes), per_call)):
            entry = torch.cat([states[prefix[:start]] for prefix in part])
            read = _per_token(part[0], model.num_units, tokens.shape[1], first)
            out = walk.layer(layer_idx, tokens.repeat(len(part), 1), entry, read)
            after.update(zip(part, out.split(len(tokens)), strict=True))
    return after


def _through_head(
    walk: LayerWalk,
    tokens: Tensor,
    begin: int,
    states: dict[Widths, Tensor],
    reference: Widths,
    wanted: list[Widths],
    first: int,
    visit: Visit,
    forget: Callable[[], None],
) -> None:
    """Shows the logits of a batch that begins at a row: few windows at a time, the widths of the head outermost."""
    model, length = walk.model, tokens.shape[1]
    num_body = sum(unit.kind != "head" for unit in model.units)

    def logits(widths: Widths, rows: slice, places: slice) -> Tensor:
        # Only the states of these tokens are needed: what is left of the model looks at no other token.
        read = _per_token(widths, model.num_units, length, first)[places]
        part = states[widths[:num_body]][rows, places]
        return walk.logits(tokens[rows, places], part, read, part.shape[1])

    by_head: dict[Widths, list[int]] = {}
    for index, widths in enumerate(wanted):
        by_head.setdefault(widths[num_body:], []).append(index)
    for members in by_head.values():
        for rows, places in _pieces(len(tokens), first, length, model.vocab_size):
            base = ReferenceDistribution(logits(reference, rows, places))
            of_text = slice(begin + rows.start, begin + rows.stop)
            for index in members:
                visit(index, of_text, places, base, logits(wanted[index], rows, places))
        forget()


def _forgetting(model: NestedCausalLM) -> Callable[[], None]:
    """What ends the work on some matrices: it drops them where all that a walk decodes would not fit."""
    num_weights = sum(unit.num_weights for unit in model.units)
    if 4 * num_weights * len(model.bit_widths) <= _KEPT_MATRIX_BYTES:
        return lambda: None
    return model.dense_cache.clear


def _pieces(num_rows: int, first: int, length: int, vocab_size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens to take at a time: several whole rows, or parts of one row."""
    num_tokens = max(1, LOGITS_AT_A_TIME // vocab_size)
    row_step = max(1, num_tokens // (length - first))
    token_step = min(num_tokens, length - first)
    for row in range(0, num_rows, row_step):
        for begin in range(first, length, token_step):
            yield slice(row, min(row + row_step, num_rows)), slice(begin, min(begin + token_step, length))


def _per_token(widths: Widths, num_units: int, length: int, first: int) -> Tensor:
    """`[T, U]` widths of every token; units beyond the given ones are not called, and get 0."""
    read = torch.zeros(length, num_units, dtype=torch.int64)
    pairs = torch.tensor(widths)
    read[:first, : len(widths)] = pairs[:, 0]
    read[first:, : len(widths)] = pairs[:, 1]
    return read
