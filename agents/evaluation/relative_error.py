"""DP-LLM's choice between two widths (arXiv 2508.06041), in flight: by the error that the lower one would make.

The paper chooses for every linear, token and step between two adjacent widths of the linear. It compares the norm of
the difference of both products, which it estimates from the input's norm or from a random projection, with a threshold
that meets a mean width on calibration text. Here a unit chooses once for all its matrices, by those that read what
enters it, and the difference itself is computed instead of an estimate. So it is judged at its best, and for no time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexquant_rl.agents.evaluation.baselines import mean_pairs
from flexquant_rl.agents.evaluation.evaluate import Trace
from flexquant_rl.agents.evaluation.in_flight import Choose, for_any_rows, trace_in_flight
from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.relative_error import RelativeError
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.model import NestedCausalLM

_SMALLEST = 1e-12
_SHARE_DIGITS = 4
"""Of a share, so that the name of a setting has all of it."""


def entry_linears(model: NestedCausalLM) -> list[list[NestedLinear]]:
    """For each unit the linears that read what enters it: its first, and those that are called on the same tensor."""
    entered: dict[int, Tensor] = {}
    found: list[list[NestedLinear]] = [[] for _ in model.units]

    def note(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, NestedLinear)
        if entered.setdefault(module.unit_idx, args[0]) is args[0]:
            found[module.unit_idx].append(module)

    handles = [linear.register_forward_pre_hook(note) for linear in model.nested_linears().values()]
    try:
        widths = torch.full((1, 1, model.num_units), max(model.bit_widths))
        model.forward(torch.zeros(1, 1, dtype=torch.int64, device=model.device), widths, keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def relative_errors(inputs: Tensor, linears: Sequence[NestedLinear], low: int, high: int) -> Tensor:
    """The norm of what a low width changes in the outputs over that of the outputs, `[..., K]` -> `[...]`."""
    changed, whole = (torch.zeros_like(inputs[..., 0]) for _ in range(2))
    for linear in linears:
        product = F.linear(inputs, linear.dense(high))
        changed += (F.linear(inputs, linear.dense(low)) - product).square().sum(-1)
        whole += product.square().sum(-1)
    return (changed / whole.clamp_min(_SMALLEST)).sqrt()


@dataclass(frozen=True)
class Setting:
    """Relative error, fitted to a text.

    Attributes:
        name: As it appears in tables, and as `fq evaluate` reads it.
        low: `[U]` widths.
        high: `[U]` widths, nowhere lower.
        thresholds: `[U]` float32; a token whose relative error is above gets the high width of the unit.
    """

    name: str
    low: Tensor
    high: Tensor
    thresholds: Tensor


class _Calibrating:
    """Chooses the high width for the share of all tokens with the largest errors, and keeps the thresholds."""

    def __init__(self, low: Tensor, high: Tensor, share_high: float, entries: Sequence[Sequence[NestedLinear]]) -> None:
        self._low, self._high, self._share, self._entries = low.tolist(), high.tolist(), share_high, entries
        self._found: list[list[float]] = [[] for _ in entries]

    @property
    def thresholds(self) -> Tensor:
        """`[U]` float32, means over the parts of the text; infinite where there is nothing to choose."""
        return torch.tensor(
            [sum(found) / len(found) if found else math.inf for found in self._found], dtype=torch.float32
        )

    def __call__(self, unit_idx: int, inputs: Tensor) -> Tensor:
        low, high = self._low[unit_idx], self._high[unit_idx]
        if low == high:
            return torch.full(inputs.shape[:2], low)
        errors = relative_errors(inputs, self._entries[unit_idx], low, high)
        threshold = float(errors.quantile(1 - self._share))
        self._found[unit_idx].append(threshold)
        return torch.where(errors > threshold, high, low)


def tuned(prepared: Prepared, windows: Tensor, time_budgets: Sequence[float]) -> dict[float, Setting]:
    """The pair of static allocations of least KL on a text at each budget, thresholds included; none out of reach.

    As in the paper the mean width is what a unit's threshold is set for. A share of the tokens, the same for all units,
    gets the high widths, so that the budget is used up.

    Args:
        prepared: Model, static front, latencies.
        windows: `[S, window_tokens]` int64 of validation text.
        time_budgets: Shares of full-width time.
    """
    entries = entry_linears(prepared.model)
    found: dict[float, Setting] = {}
    for budget in time_budgets:
        tried: list[tuple[float, int, Setting]] = []
        for low_mean, high_mean in mean_pairs(prepared.model.bit_widths):
            ends = _ends(prepared, RelativeError(0.0, low_mean, high_mean))
            fast, slow = (float(prepared.cost.time_share(widths)) for widths in ends)
            if not fast <= budget <= slow or fast == slow:
                continue
            asked = RelativeError(round((budget - fast) / (slow - fast), _SHARE_DIGITS), low_mean, high_mean)
            setting, trace = _fitted(prepared, windows, asked, entries)
            tried.append((float(trace.output_kl_nats.double().mean()), len(tried), setting))
        if tried:
            found[budget] = min(tried)[-1]
    return found


def fitted(prepared: Prepared, windows: Tensor, asked: RelativeError) -> Setting:
    """What the parameters of a name are on this model: the thresholds that give their share on a text.

    Args:
        prepared: Model, static front, latencies.
        windows: `[S, window_tokens]` int64 of validation text.
        asked: The parameters.

    Raises:
        InputError: If a width is not stored, or if the two allocations are one.
    """
    low, high = _ends(prepared, asked)
    if torch.equal(low, high):
        raise InputError(
            f"policy {policy_name(asked)!r}: on this model mean widths {asked.low:g} and {asked.high:g} are the same "
            "allocation; choose means further apart"
        )
    setting, _ = _fitted(prepared, windows, asked, entry_linears(prepared.model))
    return setting


def _ends(prepared: Prepared, asked: RelativeError) -> tuple[Tensor, Tensor]:
    """The two allocations `[U]`; the high one is nowhere lower."""
    context, name = policy_context(prepared), policy_name(asked)
    low, high = (context.allocation(mean, name) for mean in (asked.low, asked.high))
    return torch.minimum(low, high), torch.maximum(low, high)


def _fitted(
    prepared: Prepared, windows: Tensor, asked: RelativeError, entries: Sequence[Sequence[NestedLinear]]
) -> tuple[Setting, Trace]:
    """A setting, and what it does on the text that it is fitted to."""
    low, high = _ends(prepared, asked)
    calibrating = _Calibrating(low, high, asked.share_high, entries)
    trace = trace_in_flight(prepared, windows, for_any_rows(calibrating))
    return Setting(policy_name(asked), low, high, calibrating.thresholds), trace


def chooser(setting: Setting, entries: Sequence[Sequence[NestedLinear]]) -> Choose:
    """The choice of a setting."""
    low, high = setting.low.tolist(), setting.high.tolist()

    def choose(unit_idx: int, inputs: Tensor) -> Tensor:
        if low[unit_idx] == high[unit_idx]:
            return torch.full(inputs.shape[:2], low[unit_idx])
        errors = relative_errors(inputs, entries[unit_idx], low[unit_idx], high[unit_idx])
        return torch.where(errors > setting.thresholds[unit_idx], high[unit_idx], low[unit_idx])

    return choose
