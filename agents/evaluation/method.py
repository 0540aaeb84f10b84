"""How a comparison was made, in the words of a report: computed from what was compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from flexquant_rl.agents.config import BASELINES
from flexquant_rl.agents.evaluation.equal_time import Rung, StaticClock, rung_error
from flexquant_rl.agents.evaluation.resampling import interval_method
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.policies.drafts import Drafts
from flexquant_rl.agents.policies.families import STATIC, TOKEN, UNTRAINED

_BUDGETS = (
    "Every family is asked for the same shares of full-width time. The setting that meets a budget is found on "
    "validation text: the knob of a policy by bisection, for `static` the allocation of least KL on that text "
    "among the knapsack solved at the very budget, its neighbours and the fixed widths. `fixed` shares the time "
    "between two widths."
)


def method_sentences(rows: Sequence[EvalRow], rungs: Sequence[Rung] = ()) -> list[str]:
    """How rows came about and are compared, for reports.

    Args:
        rows: The rows.
        rungs: The static allocations that they are compared with, where known.
    """
    documents = len({document for row in rows for document in row.sequence_documents})
    seeds = len({row.seed for row in rows if row.seed is not None})
    is_budgeted = any(row.time_budget is not None for row in rows)
    lines = [
        _BUDGETS if is_budgeted else "Every policy is run at the settings that were asked for.",
        "Test text is opened once, at these settings. "
        + ("What a policy takes there may miss the budget a little, so each" if is_budgeted else "Each")
        + " row is compared with static in the very time that it took"
        + _between(rungs)
        + " Two families that are not "
        "static are compared by what each leaves of static's KL.",
        "A policy that looks at signals is charged the controller's time, which the latency table holds where it was "
        "measured; static and fixed widths, `schedule`, `random` and `token` look at nothing that a step puts out.",
    ]
    if is_budgeted and any(row.family in BASELINES for row in rows):
        lines.insert(
            1,
            "The baselines that look at the text or the position are searched over their other parameters too (widths, "
            "spread, hysteresis): at each budget the combination of least KL on validation text stands in the table.",
        )
    if any(row.family == UNTRAINED.name for row in rows):
        lines.append(
            "`untrained` is the network of the best seed before PPO, not one of random weights: it was cloned from "
            "static allocations, one for each token by its importance, and its dial meets the budgets as that of `ppo`."
        )
    if any(row.family.partition(":")[0] == TOKEN.name for row in rows):
        lines.append(
            "`token` looks up what the token about to be read needs, learned from the same backward passes as "
            "the clones that PPO starts from, and takes the static allocation at the dial times a power of that."
        )
    if any(row.time_share_measured is not None for row in rows):
        lines.append(
            "By the clock, a time share is the sum over tokens of medians over rounds, signals and policy included, "
            "over the same sum at the largest width"
            + _clock_error(rows)
            + ". Static in equal measured time is found on the line from point "
            "to point through the clocked shares of all static allocations over their modelled ones"
            + _missed(rows)
            + ". On a CPU the signals of every policy and a learned policy's network are native code; each other rule "
            "is a few lines of Python."
        )
    if any(row.family.partition(":")[0] == Drafts.family.name for row in rows):
        lines.append(
            "Drafts lose nothing against their verify width: their KL, perplexity and agreement are those of that "
            "width on the same text. They have no say in a text that is given, so by the clock they continue the "
            "prompts of the same windows greedily, in turns with the other policies; no latency table has their time."
        )
    return [*lines, *interval_method(documents, seeds)]


def _clock_error(rows: Sequence[EvalRow]) -> str:
    """How well the clock knows a share."""
    errors = [row.time_share_measured_error for row in rows if row.time_share_measured_error is not None]
    if not errors:
        return ""
    return (
        "; policies take turns every tenth of a second. The standard error of a share over rounds, that of the largest "
        f"width aside, is {statistics.median(errors):.4f} (median; {max(errors):.4f} at most), and intervals in equal "
        "measured time have it in them"
    )


def _missed(rows: Sequence[EvalRow]) -> str:
    """How far the clocked static rows are from a straight line: bends of the table and the machine's noise."""
    pairs = [
        (row.time_share_modelled, row.time_share_measured)
        for row in rows
        if row.family == STATIC.name and row.time_share_modelled is not None and row.time_share_measured is not None
    ]
    clock = StaticClock.fit([modelled for modelled, _ in pairs], [measured for _, measured in pairs])
    return "" if clock is None else f"; the static rows miss a straight one by {clock.misfit:.3f} (root mean square)"


def _between(rungs: Sequence[Rung]) -> str:
    """How static's KL between two of its allocations is known, and how well."""
    error = rung_error(rungs)
    if error is None:
        return "."
    count = len({rung.time_share for rung in rungs})
    return (
        f": on the straight line of the logarithm of its KL between the nearest two of {count} allocations. One that "
        f"is left out is within {100 * math.expm1(error):.1f}% of the line between its neighbours, which are twice as "
        "far apart."
    )
