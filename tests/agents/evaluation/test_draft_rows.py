"""What is said of policies of drafts, from rows whose speeds are given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexquant_rl.agents.evaluation.draft_rows import DraftRow, Kind, captured_headroom, findings, with_clock

KINDS: dict[str, Kind] = {
    "plain": "plain",
    "fixed": "rule",
    "confidence": "rule",
    "ppo": "learned",
    "hindsight": "reference",
    "clairvoyant": "bound",
}


def rows_of(**speeds: float) -> list[DraftRow]:
    """Two documents of 60 tokens each, decoded at the speeds of the policies."""
    return [
        DraftRow(
            policy=name,
            family=name,
            kind=KINDS[name],
            seed=0 if name == "ppo" else None,
            speedup_modelled=speed,
            speedup_low=speed,
            speedup_high=speed,
            speedup_measured=None,
            speedup_validation=speed,
            tokens_per_pass=2.0,
            drafts_per_token=1.0,
            accepted_share=0.5,
            verify_width=8,
            output_kl_nats=0.0,
            num_sequences=2,
            num_tokens=120,
            cost_source="modelled",
            sequence_time_steps=(60 / speed, 60 / speed),
            sequence_tokens=(60, 60),
            sequence_documents=(0, 1),
        )
        for name, speed in speeds.items()
    ]


@pytest.mark.parametrize(
    ("plain", "fixed", "ppo", "bound", "share"),
    [
        (1.0, 1.2, 1.3, 1.6, 0.25),
        (1.0, 0.5, 0.9, 1.4, -0.25),  # far from the fixed rounds, and slower than no drafts at all
        (1.0, 0.5, 1.1, 1.4, 0.25),
        (1.0, 0.5, 0.9, 1.0, None),
        (1.0, 1.2, 1.2, 1.2, None),
    ],
)
def test_headroom_begins_at_the_faster_of_fixed_rounds_and_plain_decoding(
    plain: float, fixed: float, ppo: float, bound: float, share: float | None
) -> None:
    rows = rows_of(plain=plain, fixed=fixed, ppo=ppo, clairvoyant=bound)
    assert captured_headroom(rows) == (None if share is None else pytest.approx(share))


def test_the_clock_stands_beside_the_cost_table_on_the_same_sequences() -> None:
    ppo, bound = rows_of(ppo=1.5, clairvoyant=2.0)
    ppo = replace(ppo, sequence_time_steps=(60.0, 20.0))
    timed, known = with_clock([ppo, bound], [0.4, None], [1])
    assert (timed.speedup_modelled, timed.speedup_modelled_clocked, timed.speedup_measured) == (1.5, 3.0, 2.5)
    assert known == bound
    both, _ = with_clock([ppo, bound], [0.4, None], [1, 0])
    assert both.speedup_modelled_clocked == 1.5


@pytest.mark.parametrize(
    ("fixed", "rule", "ppo", "beaten"),
    [(0.7, 0.8, 0.9, [True, True, True]), (0.7, 0.8, 1.1, [False, False, True]), (1.2, 0.8, 0.9, [False, True, False])],
)
def test_that_plain_decoding_is_faster_is_said_where_two_slower_ones_are_compared(
    fixed: float, rule: float, ppo: float, beaten: list[bool]
) -> None:
    """The learned policy over the fixed rounds, over the rule, and the rule over the fixed rounds."""
    rows = rows_of(plain=1.0, fixed=fixed, confidence=rule, ppo=ppo, hindsight=1.5, clairvoyant=2.0)
    rows[1:3] = [replace(rows[1], speedup_validation=0.1), replace(rows[2], speedup_validation=0.2)]
    said = findings(rows, "plain", pays=False)[:3]
    assert f"{100 * abs(ppo / fixed - 1):.1f}% {'faster' if ppo > fixed else 'slower'}" in said[0]
    assert ["plain decoding is faster than both" in sentence for sentence in said] == beaten
