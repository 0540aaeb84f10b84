"""Rows of what cannot be deployed, on the test text of everyone: oracles, and choices that are made in flight.

They say how far policies could go: the oracles by knowing the text, a choice in flight by seeing more of the token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexquant_rl.agents.evaluation.comparison import captured_headroom, left_of_static
from flexquant_rl.agents.evaluation.contest import Settings, test_windows, unlike_static
from flexquant_rl.agents.evaluation.evaluate import Trace, summarise
from flexquant_rl.agents.evaluation.in_flight import for_any_rows, trace_in_flight
from flexquant_rl.agents.evaluation.oracle import text_influence, token_oracle, unit_oracle
from flexquant_rl.agents.evaluation.relative_error import Setting, chooser, entry_linears, fitted, tuned
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.policies.families import ORACLE, PPO, UNIT_ORACLE
from flexquant_rl.agents.policies.relative_error import RelativeError
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.agents.progress import track
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.fq_env.prompts import spread

_TUNING_SEQUENCES = 12
_ORACLE_SHARE = 0.6
_ROUNDING = 1e-9


def oracle_budget(prepared: Prepared, time_budgets: Sequence[float]) -> float:
    """Of the time budgets that everyone is asked for, that of the oracles: in reach, and nearest to 0.6.

    Raises:
        ValueError: If no static allocation is within any budget.
    """
    fastest = float(prepared.cost.time_share(prepared.front.bit_widths).min())
    in_reach = [budget for budget in time_budgets if budget >= fastest - _ROUNDING]
    return min(in_reach, key=lambda budget: abs(budget - _ORACLE_SHARE))


def oracle_rows(
    prepared: Prepared, num_sequences: int, budget: float, num_samples: int, settings: Settings
) -> list[EvalRow]:
    """Both oracles on the same test windows as everyone, within a time budget.

    Args:
        prepared: Model, front, latencies.
        num_sequences: Sequences of test text.
        budget: Share of full-width time, no less than the fastest allocation takes.
        num_samples: Backward passes for each sequence.
        settings: Has the static allocation of the budget.
    """
    windows, _ = test_windows(prepared, num_sequences)
    influence = text_influence(
        prepared, windows, num_samples=num_samples, progress=lambda parts: track(parts, "influence of tokens and units")
    )
    by_token = token_oracle(prepared, windows, influence.tokens, budget)
    by_unit = unit_oracle(prepared, windows, influence.units, budget)
    return [
        _row(prepared, num_sequences, trace, f"{ORACLE.name}:{name}", family.name, budget, settings)
        for name, family, trace in (("token", ORACLE, by_token), ("unit", UNIT_ORACLE, by_unit))
    ]


def relative_error_rows(
    prepared: Prepared, num_sequences: int, time_budgets: Sequence[float], settings: Settings
) -> list[EvalRow]:
    """Relative error at each budget in reach, its setting found on validation text."""
    found = tuned(prepared, _tuning_windows(prepared), time_budgets)
    return _in_flight_rows(prepared, num_sequences, [*found.items()], settings)


def named_in_flight_rows(prepared: Prepared, num_sequences: int, asked: Sequence[RelativeError]) -> list[EvalRow]:
    """Policies that choose in flight, by name; their thresholds are fitted to validation text, and no budget is met.

    Raises:
        InputError: If one of them is none of this model.
    """
    windows = _tuning_windows(prepared)
    found: list[tuple[float | None, Setting]] = [
        (None, fitted(prepared, windows, one)) for one in track(asked, "fitting relative error")
    ]
    return _in_flight_rows(prepared, num_sequences, found, Settings((), ()))


def _tuning_windows(prepared: Prepared) -> Tensor:
    return spread(prepared.windows.validation, _TUNING_SEQUENCES)


def _in_flight_rows(
    prepared: Prepared, num_sequences: int, found: Sequence[tuple[float | None, Setting]], settings: Settings
) -> list[EvalRow]:
    """A row for each setting, with the budget that it is for."""
    windows, _ = test_windows(prepared, num_sequences)
    entries = entry_linears(prepared.model)
    rows = []
    for budget, setting in track(found, "relative error"):
        trace = trace_in_flight(prepared, windows, for_any_rows(chooser(setting, entries)))
        rows.append(_row(prepared, num_sequences, trace, setting.name, RelativeError.family.name, budget, settings))
    return rows


def headroom(rows: Sequence[EvalRow]) -> float | None:
    """Share of the way from static to the stronger oracle that the learned policies go, all at the oracle's budget.

    The mean over training seeds; None without an oracle, or where a family has no row at its budget.
    """
    # Each in the time that it took: the share of static's KL that is left.
    oracles = [row for row in rows if row.family in (ORACLE.name, UNIT_ORACLE.name)]
    bounds = [(left, row) for row in oracles if (left := left_of_static(row)) is not None]
    if not bounds:
        return None
    bound, oracle = min(bounds, key=lambda item: item[0])
    learned_rows = [row for row in rows if row.family == PPO.name and row.time_budget == oracle.time_budget]
    shares = [captured_headroom(1.0, left_of_static(row), bound) for row in learned_rows]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _row(
    prepared: Prepared,
    num_sequences: int,
    trace: Trace,
    policy: str,
    family: str,
    time_budget: float | None,
    settings: Settings,
) -> EvalRow:
    _, documents = test_windows(prepared, num_sequences)
    row = summarise(
        trace,
        policy=policy,
        family=family,
        reference=reference_name(prepared.model),
        time_budget=time_budget,
        documents=documents,
    )
    return unlike_static(row, trace, settings.static_at(time_budget))
