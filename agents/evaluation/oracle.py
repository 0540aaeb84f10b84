"""Upper bounds that cannot be deployed: which widths tokens, and units at tokens, deserve, judged with hindsight.

The influence of every token and of every (token, unit) on the KL of its sequence is measured on the very text. One
price of time then gives each the widths that its influence is worth, over all sequences together, and the text is
really read with them. What errors of several tokens do to each other is left out, and the measurement is a sample. So
powers of the influence below 1, which trust it less, are tried too and the best one is taken. This is not the best that
there is, but what knowing each influence by itself gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.evaluate import Trace
from flexquant_rl.agents.evaluation.in_flight import trace_in_flight
from flexquant_rl.agents.evaluation.influence import Influence, influences
from flexquant_rl.agents.evaluation.lagrange import Lagrange, centred, least_within
from flexquant_rl.agents.preparation import Prepared

_MEASURED_WIDTH = 4
_POWERS = (1.0, 0.75, 0.5)
_SMALLEST_NATS = 1e-12
# Of time, in nats for a full-width step: the dial's inverse.
_LOG_PRICES = (-24.0, 12.0)


def text_influence(
    prepared: Prepared,
    windows: Tensor,
    *,
    num_samples: int,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Influence:
    """What the errors of 4 bits do at every token and unit of a text.

    Args:
        prepared: The model.
        windows: `[S, window_tokens]` int64.
        num_samples: Backward passes for each sequence.
        seed: Of their directions.
        progress: Wraps the loop over pieces of the text.
    """
    model = prepared.model
    nearest = min(model.bit_widths, key=lambda width: abs(width - _MEASURED_WIDTH))
    return influences(
        model,
        windows[:, :-1],
        torch.full((model.num_units,), nearest),
        first=prepared.env.prompt_tokens,
        num_samples=num_samples,
        generator=torch.Generator().manual_seed(seed),
        progress=progress,
    )


def token_oracle(prepared: Prepared, windows: Tensor, influence: Tensor, time_budget: float) -> Trace:
    """Gives every token of a text one of the static allocations, by its measured influence.

    Args:
        prepared: Model, static front, latencies.
        windows: `[S, window_tokens]` int64.
        influence: `[S, T]` of the tokens, nats.
        time_budget: Share of full-width time that all steps together take at most; no less than the fastest allocation.

    Returns:
        The real run, comparable with any policy's trace on the same windows; its `reward` is zero.
    """
    logs = influence.clamp_min(_SMALLEST_NATS).log()

    def read(power: float) -> Trace:
        widths = _within(prepared, centred(power * logs).double().exp(), time_budget)
        return trace_in_flight(prepared, windows, lambda rows: lambda unit_idx, inputs: widths[rows][..., unit_idx])

    return _best(map(read, _POWERS))


def _best(traces: Iterable[Trace]) -> Trace:
    return min(traces, key=lambda trace: float(trace.output_kl_nats.double().mean()))


def _within(prepared: Prepared, multiples: Tensor, time_budget: float) -> Tensor:
    """Widths `[S, T, U]` at the largest dial whose allocations at its multiples `[S, T]` are within a budget."""

    def time_share(log_price: float) -> float:
        return float(prepared.cost.time_share(_allocated(prepared, multiples, -log_price)).mean())

    return _allocated(prepared, multiples, -least_within(time_share, time_budget, *_LOG_PRICES))


def _allocated(prepared: Prepared, multiples: Tensor, log_dial: float) -> Tensor:
    """Widths `[S, T, U]` at a dial times the multiples `[S, T]`."""
    return prepared.front.allocate(math.exp(log_dial) * multiples.flatten()).view(*multiples.shape, -1)


def unit_oracle(prepared: Prepared, windows: Tensor, influence: Tensor, time_budget: float) -> Trace:
    """Gives every (token, unit) of a text the width that its measured influence is worth.

    Args:
        prepared: Model, sensitivities, latencies.
        windows: `[S, window_tokens]` int64.
        influence: `[S, T, U]`, nats.
        time_budget: Share of full-width time that all steps together take at most.

    Returns:
        The real run, comparable with any policy's trace on the same windows; its `reward` is zero.
    """
    lagrange = Lagrange.of(prepared)
    logs = influence.clamp_min(_SMALLEST_NATS).log()

    def read(power: float) -> Trace:
        powered = [centred(power * unit) for unit in logs.unbind(-1)]
        multiplier = lagrange.meet(powered, time_budget)
        return trace_in_flight(
            prepared,
            windows,
            lambda rows: lambda unit_idx, inputs: lagrange.widths(unit_idx, powered[unit_idx][rows], multiplier),
        )

    return _best(map(read, _POWERS))
