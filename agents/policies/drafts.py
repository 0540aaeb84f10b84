"""Drafts by name: at one allocation, so many a round or until one is unsure, or lookups alone. Nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from flexquant_rl.agents.policies.names import policy_name, read_parameters
from flexquant_rl.agents.policies.unbound import Family, PolicyContext, check_stored, check_width
from flexquant_rl.engine.control.draft_limits import MOST_PENDING, NGRAM_DRAFTS, check_ngram_drafts
from flexquant_rl.engine.control.drafting_rules import DraftingRule, Lookups
from flexquant_rl.engine.control.drafts import check_drafts
from flexquant_rl.engine.control.served_drafts import ServedDrafts, drafts_at, lookups_at, rule_at
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.traces import is_whole
from flexquant_rl.engine.errors import InputError


@dataclass(frozen=True)
class Drafts:
    """The parameters of `drafts_at`; their names are `draft:3` or `draft:3.5,length=6,confidence=0.4,verify=6`.

    Their output is that of the verify width.

    Attributes:
        width: Mean width of the drafts: a whole number is that stored width for all units, another one a knapsack.
        length: Drafts of a round at most.
        confidence: Drafting ends with a draft less sure than this. 0 never ends it; Hugging Face's default is 0.4.
        verify: The width that the output equals; 0 is the largest stored one.
        ngrams: Drafts of a round at most that are found in the text so far; such rounds are verified at once, and the
            width drafts where nothing is found. 0 looks none up.
    """

    family: ClassVar[Family] = Family("draft", "drafts, verified", "#6A3D9A", "P")

    width: float
    length: int = 4
    confidence: float = 0.0
    verify: int = 0
    ngrams: int = NGRAM_DRAFTS

    def __post_init__(self) -> None:
        check_width("width", self.width)
        check_drafts(self.length, self.confidence)
        check_ngram_drafts(self.ngrams, "ngrams")
        if self.verify:
            check_width("verify", self.verify)
            self._check_below(self.verify)

    @property
    def is_one_width(self) -> bool:
        """Whether all units draft at the same width, so that no profile is needed."""
        return is_whole(self.width)

    @property
    def rule(self) -> DraftingRule:
        """What decides, at the only level."""
        return rule_at(self.length, self.confidence)

    def bind(self, context: PolicyContext) -> ServedDrafts:
        """The policy for one model.

        Raises:
            InputError: If a width is not stored, or drafts are not narrower than the verify width.
        """
        name = policy_name(self)
        return self._policy(context.schema, name, context.allocation(self.width, name))

    def at_one_width(self, schema: SignalSchema) -> ServedDrafts:
        """`bind` for a whole width, of a model without a profile."""
        name = policy_name(self)
        check_stored(int(self.width), schema.bit_widths, name)
        return self._policy(schema, name, torch.full((schema.num_units,), int(self.width)))

    def _policy(self, schema: SignalSchema, name: str, draft: torch.Tensor) -> ServedDrafts:
        verify = self.verify or max(schema.bit_widths)
        check_stored(verify, schema.bit_widths, name)
        self._check_below(verify)
        widths = torch.full((schema.num_units,), verify)
        return drafts_at(
            name,
            draft,
            widths,
            length=self.length,
            min_confidence=self.confidence,
            ngram_drafts=self.ngrams,
        )

    def _check_below(self, verify: int) -> None:
        if self.width >= verify:
            raise InputError(
                f"width={self.width:g} of the drafts is not below the verify width {verify}, so drafts save nothing; "
                "draft at fewer bits"
            )


@dataclass(frozen=True)
class LookupDrafts(Drafts):
    """Drafts of length 0: what is found in the text so far is verified, and no width drafts.

    Its names are `lookups` or `lookups:verify=6,ngrams=4`; `verify` and `ngrams` are those of `Drafts`.
    """

    family: ClassVar[Family] = replace(Drafts.family, name="lookups")

    width: float = field(default=0.0, init=False)
    length: int = field(default=0, init=False)
    confidence: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        check_ngram_drafts(self.ngrams, "ngrams")
        if not self.ngrams:
            raise InputError(f"ngrams=0 looks nothing up, and nothing else drafts here; give 1 to {MOST_PENDING}")
        if self.verify:
            check_width("verify", self.verify)

    @property
    def is_one_width(self) -> bool:
        """No unit drafts, so no profile is needed."""
        return True

    @property
    def rule(self) -> DraftingRule:
        """What decides."""
        return Lookups()

    def bind(self, context: PolicyContext) -> ServedDrafts:
        """See `Drafts.bind`."""
        return self.at_one_width(context.schema)

    def at_one_width(self, schema: SignalSchema) -> ServedDrafts:
        """See `Drafts.at_one_width`."""
        name, verify = policy_name(self), self.verify or max(schema.bit_widths)
        check_stored(verify, schema.bit_widths, name)
        return lookups_at(name, torch.full((schema.num_units,), verify), ngram_drafts=self.ngrams)


def parse_drafts(name: str) -> Drafts | None:
    """Reads the name of such a policy; None if it is another one's.

    Raises:
        InputError: If its parameters are wrong.
    """
    prefix, _, parameters = name.partition(":")
    kind = {one.family.name: one for one in (Drafts, LookupDrafts)}.get(prefix)
    return None if kind is None else read_parameters(kind, parameters, name)
