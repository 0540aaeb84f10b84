"""What drafts and passes of verification cost: milliseconds by level and by tokens, given or measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from flexquant_rl.engine.control.cost import clock_ms
from flexquant_rl.engine.decoding.decoder import Decoder
from flexquant_rl.engine.errors import InputError


@dataclass(frozen=True)
class VerifyCosts:
    """Times of one model on one device, all from one source.

    Attributes:
        source: `modelled` (given) or `measured` (by the clock); the two never share a column.
        full_ms: A plain step at the largest width, the unit of every reward.
        draft_ms: `[L]`, a draft step at each level.
        verify_ms: `[D + 1]`, a pass at the verify width over M = 1, 2, ... tokens.
        controller_ms: What signals and policy add to a decision; fixed rounds and the bound do not pay it.
    """

    source: Literal["modelled", "measured"]
    full_ms: float
    draft_ms: tuple[float, ...]
    verify_ms: tuple[float, ...]
    controller_ms: float = 0.0

    def __post_init__(self) -> None:
        times = (self.full_ms, *self.draft_ms, *self.verify_ms)
        if not self.draft_ms or not self.verify_ms or not all(0 < ms < float("inf") for ms in times):
            raise InputError(f"costs {times} ms: give a finite time above 0 for every level and number of tokens")
        if not 0 <= self.controller_ms < float("inf"):
            raise InputError(f"controller_ms={self.controller_ms:g} must not be negative")

    def check(self, num_levels: int, depth: int) -> None:
        """Raises InputError unless there is a time for each of so many levels and each round of so many drafts."""
        if len(self.draft_ms) != num_levels or len(self.verify_ms) <= depth:
            raise InputError(
                f"costs of {len(self.draft_ms)} levels and passes over up to {len(self.verify_ms)} tokens were given, "
                f"but the traces have {num_levels} levels and rounds of up to {depth + 1} tokens"
            )


def modelled_costs(
    draft_shares: Sequence[float], verify_shares: Sequence[float], *, depth: int, controller_share: float = 0.0
) -> VerifyCosts:
    """Costs in full-width steps (`full_ms` is 1); passes beyond those given go on in a straight line.

    Args:
        draft_shares: `[L]`, a draft step over a full-width step.
        verify_shares: A pass over M = 1, 2, ... tokens over a full-width step; two or more.
        depth: D, drafts of a round at most.
        controller_share: A decision over a full-width step.

    Raises:
        InputError: If they are too few or no times.
    """
    if len(verify_shares) < 2:
        raise InputError(f"{len(verify_shares)} shares of a pass were given; give those of M = 1 and 2 at least")
    shares = [*verify_shares]
    while len(shares) <= depth:
        shares.append(2 * shares[-1] - shares[-2])
    return VerifyCosts("modelled", 1.0, tuple(draft_shares), tuple(shares), controller_share)


def measured_costs(
    decoder: Decoder,
    draft_widths: Sequence[int],
    *,
    verify_width: int,
    depth: int,
    num_rounds: int = 15,
    context: int = 64,
) -> VerifyCosts:
    """Times draft steps and passes in turn, so that what slows the machine hits all of them; medians over rounds.

    Args:
        decoder: Has one row, with room for `context + depth + 1` tokens.
        draft_widths: Width of each level.
        verify_width: Width of the passes.
        depth: D, drafts of a round at most.
        num_rounds: Times that each is timed, after one that is not.
        context: Tokens in the cache.
    """
    model = decoder.model
    full = torch.full((model.num_units,), max(model.bit_widths))
    tokens = torch.arange(context + depth + 1)[None] % model.vocab_size
    decoder.prefill(tokens[:, :context])
    held = decoder.lengths.clone()

    def time_ms(width: int, num_tokens: int) -> float:
        ids, widths = tokens[:, :num_tokens], torch.full_like(full, width)
        # A single token is decoded by a step, which takes a shorter way than a pass over several.
        run = (lambda: decoder.step(ids[:, 0], widths)) if num_tokens == 1 else (lambda: decoder.extend(ids, widths))
        ms = clock_ms(run, model.device)
        decoder.truncate(held)
        return ms

    kinds = [(max(model.bit_widths), 1), *((width, 1) for width in draft_widths)]
    kinds += [(verify_width, num_tokens) for num_tokens in range(1, depth + 2)]
    times = [[time_ms(*kind) for kind in kinds] for _ in range(num_rounds + 1)][1:]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    levels = len(draft_widths)
    return VerifyCosts("measured", medians[0], tuple(medians[1 : 1 + levels]), tuple(medians[1 + levels :]))
