"""Text read with widths that are chosen in flight: a unit's, for a token, by what the unit is about to read.

What a unit reads depends on the widths of the units before it, at this token and at earlier ones, and on nothing that
comes later. So whole sequences go through the model in one pass, unit by unit, and every token gets the widths that it
would get in decoding. No decoder decides in flight yet: what is found here is a reference, not a policy that can be
deployed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.evaluate import Trace, joined, trace_of_pass
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.engine.control.output_kl import reference_width
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.linear import InFlightPlan, logits_under
from flexquant_rl.engine.model import NestedCausalLM

_PIECE_FLOATS = 7 << 20
"""Logits made at a time. Up to 32 MiB the allocator gives memory out again; beyond, every page is a new one."""

Choose = Callable[[int, Tensor], Tensor]
"""Index of a unit and what its first linear reads, `[R, T, K]` -> the widths of the tokens, `[R, T]` int64."""


@torch.inference_mode()
def read_in_flight(model: NestedCausalLM, token_ids: Tensor, choose: Choose, *, first: int) -> tuple[Tensor, Tensor]:
    """Reads rows of text; prompts are read at the largest width.

    Args:
        model: The model.
        token_ids: `[R, first + T]` int64.
        choose: Is asked once for each unit, in the order in which the model calls them.
        first: Tokens of the prompts.

    Returns:
        Logits `[R, T, vocab]` float32 at the tokens behind the prompts, and their widths `[R, T, U]` int64.
    """
    num_rows, length = token_ids.shape
    chosen: dict[int, Tensor] = {}

    def of_tokens(unit_idx: int, inputs: Tensor) -> Tensor:
        rows = inputs.view(num_rows, -1, inputs.shape[-1])
        is_head = model.units[unit_idx].kind == "head"  # which reads the kept tokens alone
        widths = choose(unit_idx, rows if is_head else rows[:, first:]).cpu()
        chosen[unit_idx] = widths
        prompt = torch.full((num_rows, 0 if is_head else first), max(model.bit_widths))
        return torch.cat([prompt, widths], dim=1).flatten()

    keep = length - first
    logits = logits_under(InFlightPlan(of_tokens), model.hf_model, token_ids.to(model.device), keep=keep)
    return logits, torch.stack([chosen[unit_idx] for unit_idx in range(model.num_units)], dim=-1)


def for_any_rows(choose: Choose) -> Callable[[slice], Choose]:
    """A choice that does not depend on which rows of a text are read."""
    return lambda rows: choose


def trace_in_flight(prepared: Prepared, windows: Tensor, choose_for: Callable[[slice], Choose]) -> Trace:
    """What choices in flight do on text. Choosing takes no time.

    Args:
        prepared: Model and latencies.
        windows: `[S, window_tokens]` int64.
        choose_for: What chooses for the rows of a part of the windows.
    """
    model, first = prepared.model, prepared.env.prompt_tokens
    session = DecodeSession(model, max_length=windows.shape[1] - 1)
    base = torch.full((model.num_units,), reference_width(model))
    per_pass = max(1, _PIECE_FLOATS // ((windows.shape[1] - 1 - first) * model.vocab_size))
    traces = []
    for begin in range(0, len(windows), per_pass):
        rows = slice(begin, min(begin + per_pass, len(windows)))
        read = windows[rows, :-1]
        logits, bit_widths = read_in_flight(model, read, choose_for(rows), first=first)
        reference = session.score(read, base, first=first).log_softmax(-1)
        following = windows[rows, first + 1 :]
        traces.append(trace_of_pass(model, prepared.cost, bit_widths, reference, logits.log_softmax(-1), following))
    session.close()
    return joined(traces)
