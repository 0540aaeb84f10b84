"""Drafts by name: what they bind to, and the names that make none."""

from __future__ import annotations

import pytest
import torch
from policy_checks import fake_context

from flexquant_rl.agents.policies.drafts import Drafts, LookupDrafts, parse_drafts
from flexquant_rl.agents.policies.families import parse_policy
from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.engine.control.drafts import DraftPolicy, RoundState
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.verified_signals import VerifiedSchema
from flexquant_rl.engine.errors import InputError


@pytest.mark.parametrize(
    ("name", "drafts"),
    [
        ("draft:3", Drafts(3)),
        ("draft:width=3,length=8", Drafts(3, length=8)),
        ("draft:3.5,confidence=0.4,verify=6", Drafts(3.5, confidence=0.4, verify=6)),
        ("lookups", LookupDrafts()),
        ("lookups:verify=6,ngrams=4", LookupDrafts(verify=6, ngrams=4)),
    ],
)
def test_names_are_read_and_written(name: str, drafts: Drafts) -> None:
    assert parse_drafts(name) == drafts
    assert parse_drafts(policy_name(drafts)) == drafts


def test_another_family_is_none() -> None:
    assert parse_drafts("fixed:4") is None
    assert parse_drafts("drafts") is None


def test_a_whole_width_is_everywhere_and_needs_no_profile() -> None:
    context = fake_context()
    bound = Drafts(3, length=2, verify=6).bind(context)
    assert isinstance(bound, DraftPolicy)
    assert not bound.uses_signals
    assert (bound.level_bit_widths == 3).all()
    assert (bound.verify_bit_widths == 6).all()
    alone = Drafts(3, length=2, verify=6).at_one_width(SignalSchema(context.schema.num_units, (3, 4, 5, 6, 8)))
    for name in ("level_bit_widths", "verify_bit_widths"):
        assert torch.equal(getattr(alone, name), getattr(bound, name))
    assert (
        (alone.name, alone.schema) == (bound.name, bound.schema) == ("draft:3,length=2,verify=6", VerifiedSchema(1, 2))
    )


def test_drafts_by_name_look_up_seven_tokens_unless_they_say_otherwise() -> None:
    schema = SignalSchema(3, (3, 8))
    assert Drafts(3).at_one_width(schema).ngram_drafts == 7
    named = parse_drafts("draft:3,ngrams=0")
    assert named is not None
    bound = named.at_one_width(schema)
    assert (bound.name, bound.ngram_drafts) == ("draft:3,ngrams=0", 0)


def test_lookups_alone_have_no_width_that_drafts() -> None:
    context = fake_context()
    lookups = LookupDrafts(verify=5, ngrams=4)
    bound, alone = lookups.bind(context), lookups.at_one_width(context.schema)
    for one in (bound, alone):
        assert (one.name, one.ngram_drafts) == ("lookups:5,ngrams=4", 4)
        assert (one.verify_bit_widths == 5).all()
        assert one(None, RoundState(room=9)).verify
    assert lookups.is_one_width
    assert (LookupDrafts().bind(context).verify_bit_widths == 8).all()
    with pytest.raises(InputError, match="'lookups:7': width 7 is not stored"):
        LookupDrafts(verify=7).bind(context)


def test_a_mean_width_is_a_knapsack_and_the_largest_width_verifies() -> None:
    context = fake_context()
    bound = Drafts(4.5).bind(context)
    assert torch.equal(bound.level_bit_widths[0], context.allocation(4.5, "any"))
    assert len(bound.level_bit_widths.unique()) > 1
    assert (bound.verify_bit_widths == 8).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("draft:9", "width=9 is no width"),
        ("draft:3,length=0", "length=0 must be 1 to 15 drafts"),
        ("draft:3,confidence=-1", "confidence=-1 is no probability"),
        ("draft:6,verify=6", "width=6 of the drafts is not below the verify width 6"),
        ("draft:3,verify=9", "verify=9 is no width"),
        ("draft:", "width is missing"),
        ("draft:3,ngrams=16", "ngrams=16 must be 0 to 15"),
        ("lookups:ngrams=0", "ngrams=0 looks nothing up, and nothing else drafts here; give 1 to 15"),
        ("lookups:ngrams=2.5", "ngrams='2.5' is not a whole number"),
        ("lookups:verify=9", "verify=9 is no width"),
        ("lookups:length=3", "unknown key 'length'; lookups has verify, ngrams"),
    ],
)
def test_names_that_make_no_drafts(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_drafts(name)


@pytest.mark.parametrize(
    ("drafts", "message"),
    [
        (Drafts(7), "'draft:7': width 7 is not stored; choose one of 3, 4, 5, 6, 8"),
        (Drafts(3, verify=7), "width 7 is not stored"),
        (Drafts(8), "width=8 of the drafts is not below the verify width 8"),
    ],
)
def test_widths_that_the_model_does_not_allow(drafts: Drafts, message: str) -> None:
    with pytest.raises(InputError, match=message):
        drafts.bind(fake_context())


def test_lossy_tables_refuse_them() -> None:
    for name in ("draft:3", "lookups"):
        with pytest.raises(InputError, match=f"'{name}' drafts"):
            parse_policy(name)
