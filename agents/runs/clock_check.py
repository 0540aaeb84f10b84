"""Whether the clock can be believed: the same step timed in two ways must take the same time."""

from __future__ import annotations

import math

from flexquant_rl.agents.progress import say
from flexquant_rl.engine.control.verify_costs import VerifyCosts

# As a log ratio. One of the two ways asks a policy.
_TOLERANCE = 0.25


def warn_of_clock(costs: VerifyCosts, fix: str) -> None:
    """Says so where times of drafts disagree with themselves.

    Args:
        costs: Measured ones.
        fix: What to do about it.
    """
    if abs(math.log(costs.of_itself)) > _TOLERANCE:
        say(
            f"the clock disagrees with itself: a step took {costs.of_itself:.2f} of its own time; what is judged by "
            f"these times is unreliable: {fix}"
        )
