"""Times drafts, passes of verification and decisions of a model: the costs of a run, and those that a profile holds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flexquant_rl.engine.control.draft_limits import MOST_PENDING
from flexquant_rl.engine.control.draft_times import DraftTimes
from flexquant_rl.engine.control.verified_signals import VerifiedSchema
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.control.verify_timer import measured_costs, measured_looking_ms
from flexquant_rl.engine.decoding.choice import session_opener
from flexquant_rl.engine.decoding.options import DecoderName
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM

_CONTEXT_TOKENS = 64


def timed_drafts(
    model: NestedCausalLM,
    levels: Tensor,
    *,
    verify_width: int,
    depth: int,
    decoder: DecoderName = "auto",
    num_threads: int | None = None,
) -> VerifyCosts:
    """Times drafts, passes and decisions on this device, through the rounds and policies that serve.

    Args:
        model: The model.
        levels: `[L, U]` int64, the allocations that draft.
        verify_width: Width of the passes.
        depth: D, drafts of a round at most.
        decoder: As for `session_opener`.
        num_threads: Threads of a step, as for `session_opener`.

    Raises:
        InputError: As `session_opener`.
    """
    looking = measured_looking_ms(model, VerifiedSchema(len(levels), depth))
    context = min(_CONTEXT_TOKENS, model.max_context - depth - 2)
    opener = session_opener(model, max_length=context + depth + 2, decoder=decoder, num_threads=num_threads)
    session = opener(1)
    costs = measured_costs(session, levels, verify_width=verify_width, depth=depth, context=context)
    session.close()
    return replace(costs, **looking._asdict())


def profiled_drafts(model: NestedCausalLM, *, depth: int, num_threads: int | None = None) -> DraftTimes | None:
    """What a profile holds: every stored width drafts for the largest one.

    Args:
        model: The model.
        depth: Drafts of a round at most, 1 to 15; fewer where the context ends before.
        num_threads: As for `timed_drafts`.

    Returns:
        The times; None for a model of one width, which cannot draft for itself.
    """
    *draft_widths, verify_width = model.bit_widths
    depth = min(depth, model.max_context - 3)
    if not draft_widths or depth < 1:
        return None
    levels = torch.tensor(draft_widths)[:, None].expand(-1, model.num_units).contiguous()
    costs = timed_drafts(model, levels, verify_width=verify_width, depth=depth, num_threads=num_threads)
    return DraftTimes(tuple(draft_widths), verify_width, costs)


def check_depth(depth: int) -> None:
    """Raises InputError on a number of drafts that no round holds; 0 is none."""
    if not 0 <= depth <= MOST_PENDING:
        raise InputError(f"--depth {depth} must be 1 to {MOST_PENDING} drafts of a round, or 0 to time none")
