"""An upper bound that cannot be deployed: which units deserve which widths at which tokens, judged with hindsight.

The influence of every (token, unit) on the KL of its sequence is measured on the very text. A Lagrange multiplier then
gives each the width that is worth its time, over all sequences together. What errors of several units and tokens do to
each other is left out, and the measurement is a sample: so this is not the best that there is, but what knowing each
influence by itself gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.evaluate import Trace
from flexquant_rl.agents.evaluation.in_flight import Choose, trace_in_flight
from flexquant_rl.agents.evaluation.influence import influences
from flexquant_rl.agents.evaluation.lagrange import Lagrange, centred
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.engine.control.output_kl import LOGITS_AT_A_TIME

NUM_SAMPLES = 16
"""Backward passes for each sequence. The logarithm of an influence has a standard error of 0.36 then."""
_MEASURED_WIDTH = 4
_SMALLEST_NATS = 1e-12


def unit_oracle(
    prepared: Prepared,
    windows: Tensor,
    time_budget: float,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Trace:
    """Gives every (token, unit) of a text the width that its measured influence is worth.

    Args:
        prepared: Model, sensitivities, latencies.
        windows: `[S, window_tokens]` int64.
        time_budget: Share of full-width time that all steps together take at most.
        num_samples: Backward passes for each sequence.
        seed: Of their directions.
        progress: Wraps the loop over pieces of the text.

    Returns:
        The real run, comparable with any policy's trace on the same windows; its `reward` is zero.
    """
    model, first = prepared.model, prepared.env.prompt_tokens
    bit_width = min(model.bit_widths, key=lambda width: abs(width - _MEASURED_WIDTH))
    generator = torch.Generator().manual_seed(seed)
    text = windows[:, :-1]
    per_pass = max(1, LOGITS_AT_A_TIME // ((text.shape[1] - first) * model.vocab_size))
    measured = torch.cat(
        [
            influences(model, part, bit_width, first=first, num_samples=num_samples, generator=generator)
            for part in progress(text.split(per_pass))
        ]
    )
    lagrange = Lagrange.of(prepared)
    logs = [centred(unit) for unit in measured.clamp_min(_SMALLEST_NATS).log().unbind(-1)]
    multiplier = lagrange.meet(logs, time_budget)

    def choose_for(rows: slice) -> Choose:
        return lambda unit_idx, inputs: lagrange.widths(unit_idx, logs[unit_idx][rows], multiplier)

    return trace_in_flight(prepared, windows, choose_for)
