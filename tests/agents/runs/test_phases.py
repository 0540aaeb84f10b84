"""What the phases of a run take from its configuration."""

from __future__ import annotations

from flexquant_rl.agents.runs.phases import every_other


def test_long_texts_are_compared_at_every_other_budget_in_order_of_size() -> None:
    assert every_other((0.8, 0.5, 0.6, 0.7)) == [0.6, 0.8]
    assert every_other((0.7,)) == [0.7]
