"""Rules that decide before each step whether to draft one more token, at which level, or to verify what waits.

A rule is a frozen dataclass; its fields are its parameters, and `grid` lists those worth trying. It is bound to costs
and to what was seen on training sequences, and then maps observations to actions: 0 verifies, 1 to L draft at level 0
to L - 1. Where no draft is possible any action verifies, so no rule has to look. The same function plays recordings
and serves (`served_drafts.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self, get_type_hints

import numpy as np
from numpy.typing import NDArray

from flexquant_rl.engine.control.verified_signals import Observations, Sees, VerifiedSchema
from flexquant_rl.engine.control.verify_costs import VerifyCosts

Actions = NDArray[np.int64]
DraftingPolicy = Callable[[Observations], Actions]
"""`[R, dim]` observations to `[R]` actions."""

_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class DraftingContext:
    """What a rule may know before it plays.

    Attributes:
        schema: What observations are.
        costs: What steps cost; None where nobody knows, as for drafts by name.
        acceptance: `[L]` share of drafts that agree on training sequences, of those after which all before agreed;
            None where nothing was recorded.
    """

    schema: VerifiedSchema
    costs: VerifyCosts | None = None
    acceptance: NDArray[np.float64] | None = None

    def known_costs(self) -> VerifyCosts:
        """The costs, for rules that weigh them.

        Raises:
            ValueError: If there are none.
        """
        if self.costs is None:
            raise ValueError("this rule weighs what steps cost, and no costs are known")
        return self.costs

    def known_acceptance(self) -> NDArray[np.float64]:
        """The acceptance, for rules that weigh it.

        Raises:
            ValueError: If there is none.
        """
        if self.acceptance is None:
            raise ValueError("this rule weighs how often drafts agree, and nothing was recorded")
        return self.acceptance


class DraftingRule(Protocol):
    """A family of policies of drafts.

    Attributes:
        family: Its name in tables.
        sees: What it looks at, and pays for.
    """

    family: ClassVar[str]
    sees: ClassVar[Sees]

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[DraftingRule]:
        """Settings worth trying."""

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """The policy."""


def rule_name(rule: DraftingRule) -> str:
    """`family:key=value,...`, as in tables."""
    values = (f"{field.name}={getattr(rule, field.name):g}" for field in fields(rule))  # type: ignore[arg-type]
    return ":".join(filter(None, (rule.family, ",".join(values))))


@dataclass(frozen=True)
class _DraftsNothing:
    """Always verifies, at its only setting."""

    sees: ClassVar[Sees] = "nothing"

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[Self]:
        """The only setting."""
        yield cls()

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`."""
        return lambda observations: np.zeros(len(observations), dtype=np.int64)


@dataclass(frozen=True)
class Plain(_DraftsNothing):
    """Never drafts: one pass per token."""

    family: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Lookups(_DraftsNothing):
    """Drafts nothing at few bits, and still has rounds: what is found in the text is verified (prompt lookup)."""

    family: ClassVar[str] = "lookups"


@dataclass(frozen=True)
class FixedRounds:
    """Rounds of one length at one level.

    Attributes:
        level: Which level drafts.
        length: Drafts of a round.
    """

    family: ClassVar[str] = "fixed"
    sees: ClassVar[Sees] = "nothing"

    level: int
    length: int

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[FixedRounds]:
        """Every level and length."""
        for level, length in itertools.product(range(schema.num_levels), range(1, schema.depth + 1)):
            yield cls(level, length)

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`."""
        pending = context.schema.num_pending
        return lambda observations: _drafts_if(pending(observations) < self.length, self.level)


@dataclass(frozen=True)
class ConfidenceStop:
    """Stops after a draft whose top-1 probability is low, as Hugging Face's assisted generation does (0.4 there).

    Attributes:
        level: Which level drafts.
        threshold: A draft below it is the last.
        length: Drafts of a round at most.
    """

    family: ClassVar[str] = "confidence"
    sees: ClassVar[Sees] = "confidences"

    level: int
    threshold: float = 0.4
    length: int = 8

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[ConfidenceStop]:
        """Every level, threshold and length."""
        lengths = range(1, schema.depth + 1)
        for level, threshold, length in itertools.product(range(schema.num_levels), _THRESHOLDS, lengths):
            yield cls(level, threshold, length)

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`."""
        schema = context.schema

        def decide(observations: Observations) -> Actions:
            pending = schema.num_pending(observations)
            newest = schema.confidences(observations)[np.arange(len(pending)), np.maximum(pending - 1, 0)]
            sure = (pending == 0) | (newest >= self.threshold)
            return _drafts_if(sure & (pending < self.length), self.level)

        return decide


@dataclass(frozen=True)
class ProductStop:
    """Stops when the product of the drafts' top-1 probabilities is low: the optimal stop where these are true.

    Attributes:
        level: Which level drafts.
        threshold: Drafts go on while the product is this or more.
    """

    family: ClassVar[str] = "product"
    sees: ClassVar[Sees] = "confidences"

    level: int
    threshold: float

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[ProductStop]:
        """Every level and threshold."""
        for level, threshold in itertools.product(range(schema.num_levels), _THRESHOLDS):
            yield cls(level, threshold)

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`."""
        column = context.schema.column
        return lambda observations: _drafts_if(column(observations, "confidence_product") >= self.threshold, self.level)


@dataclass(frozen=True)
class EntropyBound:
    """Stops where the newest output's entropy bounds the chance of acceptance too low, after AdaEDL (2410.18351).

    It looks at the settled output before the first draft too, so it may not draft at all.

    Attributes:
        level: Which level drafts.
        threshold: Drafts go on while `1 - sqrt(factor * entropy)` is this or more.
        factor: Per nat.
    """

    family: ClassVar[str] = "entropy-bound"
    sees: ClassVar[Sees] = "signals"

    level: int
    threshold: float
    factor: float = 0.2

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[EntropyBound]:
        """Every level and threshold; the factor only rescales the entropies that they stand for."""
        for level, threshold in itertools.product(range(schema.num_levels), _THRESHOLDS):
            yield cls(level, threshold)

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`."""
        schema = context.schema
        return lambda observations: _drafts_if(
            1 - np.sqrt(self.factor * schema.token_entropy_nats(observations)) >= self.threshold, self.level
        )


@dataclass(frozen=True)
class MovingAverage:
    """Longer rounds while acceptance is high and shorter ones while it is low, after SGLang's adaptive speculation.

    Between the two thresholds the length stays as it was in the last round (hysteresis).

    Attributes:
        level: Which level drafts.
        low: Moving average of acceptance below which the length is halved, down to 1.
        high: Above it the length is doubled.
    """

    family: ClassVar[str] = "moving-average"
    sees: ClassVar[Sees] = "nothing"

    level: int
    low: float
    high: float

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[MovingAverage]:
        """Every level and pair of thresholds."""
        for level, low, high in itertools.product(range(schema.num_levels), _THRESHOLDS[4:], _THRESHOLDS[4:]):
            if low <= high:
                yield cls(level, low, high)

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`."""
        schema = context.schema

        def decide(observations: Observations) -> Actions:
            last = np.rint(schema.column(observations, "last_drafted") * schema.depth)
            last = np.where(last == 0, 2, last)  # the first round
            average = schema.column(observations, "acceptance_fast")
            length = np.where(average > self.high, 2 * last, np.where(average < self.low, last // 2, last))
            return _drafts_if(schema.num_pending(observations) < np.maximum(length, 1), self.level)

        return decide


@dataclass(frozen=True)
class ProfileGuided:
    """Drafts while one more draft is worth its time by the cost table, at the level where it is worth most.

    One more draft gains a token if all that wait are right (by the product of their top-1 probabilities) and it is too
    (by its level's mean acceptance in training). It costs its own step and a longer pass, priced in tokens.

    Attributes:
        price: Tokens that a full-width step of time is worth: the speed aimed at.
        trust: Power that the product is raised to; 0 believes every draft, 1 takes the probabilities as they are.
    """

    family: ClassVar[str] = "profile-guided"
    sees: ClassVar[Sees] = "confidences"

    price: float
    trust: float

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[ProfileGuided]:
        """Prices around the speeds that drafts reach, and how far confidences are believed."""
        for price, trust in itertools.product((0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.2), (0.25, 0.5, 0.75, 1.0)):
            yield cls(price, trust)

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`."""
        schema, costs, acceptance = context.schema, context.known_costs(), context.known_acceptance()
        draft, verify = np.array(costs.draft_ms) / costs.full_ms, np.array(costs.verify_ms) / costs.full_ms
        longer = np.append(np.diff(verify), np.inf)

        def decide(observations: Observations) -> Actions:
            likely = schema.column(observations, "confidence_product")[:, None] ** self.trust
            time = draft + longer[schema.num_pending(observations)][:, None]
            worth = likely * acceptance - self.price * time
            best = worth.argmax(-1)
            return np.where(worth.max(-1) > 0, best + 1, 0).astype(np.int64)

        return decide


@dataclass(frozen=True)
class Bandit:
    """UCB over levels and lengths of rounds, plain decoding among them; all rows learn together, as a server would.

    What it has learned goes on across the requests of an engine: when sampled, a seed may give another text then.

    Attributes:
        exploration: Weight of the confidence bound, in full-width steps saved per token.
    """

    family: ClassVar[str] = "bandit"
    sees: ClassVar[Sees] = "nothing"

    exploration: float

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[Bandit]:
        """How much it explores."""
        for exploration in (0.02, 0.1, 0.3):
            yield cls(exploration)

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`; the policy begins to learn anew."""
        return BanditPolicy(context.schema, _Arms(self.exploration, context))


class _Arms:
    """What a bandit has learned of each level and length of rounds; the first arm never drafts."""

    def __init__(self, exploration: float, context: DraftingContext) -> None:
        arms = [(0, 0), *itertools.product(range(context.schema.num_levels), range(1, context.schema.depth + 1))]
        self.levels, self.lengths = (np.array(column) for column in zip(*arms, strict=True))
        self._exploration, self._costs = exploration, context.known_costs()
        self._tokens, self._steps, self._count = np.zeros((3, len(arms)))

    def learn(self, arm: NDArray[np.int64], drafted: NDArray[np.int64], accepted: NDArray[np.int64]) -> None:
        """Tells how rounds of these arms went."""
        is_plain = self.lengths[arm] == 0
        accepted, drafted = np.where(is_plain, 0, accepted), np.where(is_plain, 0, drafted)
        costs = self._costs
        time = drafted * np.array(costs.draft_ms)[self.levels[arm]] + np.array(costs.verify_ms)[drafted]
        np.add.at(self._tokens, arm, accepted + 1)
        np.add.at(self._steps, arm, time / costs.full_ms)
        np.add.at(self._count, arm, 1)

    def choose(self) -> int:
        """The arm to play next."""
        untried = (self._count == 0).nonzero()[0]
        if len(untried):
            self._count[untried[0]] = 1e-9  # others are tried meanwhile
            return int(untried[0])
        tokens = np.maximum(self._tokens, 1e-9)
        bound = np.sqrt(np.log(max(self._count.sum(), 2)) / np.maximum(self._count, 1e-9))
        return int((-self._steps / tokens + self._exploration * bound).argmax())


_NO_ARM = -1


class BanditPolicy:
    """Which arm each row plays. Rows share what is learned.

    Args:
        schema: What observations are.
        arms: What is learned.
    """

    def __init__(self, schema: VerifiedSchema, arms: _Arms) -> None:
        self._schema, self._arms = schema, arms
        self._arm: Actions | None = None

    def restarted(self) -> BanditPolicy:
        """The same bandit for rows that begin a text: it has learned the same, and they play no arm yet."""
        return BanditPolicy(self._schema, self._arms)

    def __call__(self, observations: Observations) -> Actions:
        """The actions of the rows."""
        pending = self._schema.num_pending(observations)
        if self._arm is None or len(self._arm) != len(pending):
            self._arm = np.full(len(pending), _NO_ARM)
        has_played = (pending == 0) & (self._arm != _NO_ARM)
        accepted, drafted = (
            np.rint(self._schema.column(observations, name)[has_played] * self._schema.depth).astype(np.int64)
            for name in ("last_accepted", "last_drafted")
        )
        self._arms.learn(self._arm[has_played], drafted, accepted)
        self._arm[pending == 0] = _NO_ARM
        # Where nothing can be drafted, as behind the end of a text, there is no round to learn from.
        for row in ((pending == 0) & self._schema.can_draft(observations)).nonzero()[0]:
            self._arm[row] = self._arms.choose()
        drafts = (self._arm != _NO_ARM) & (pending < self._arms.lengths[self._arm])
        return _drafts_if(drafts, self._arms.levels[self._arm])


RULES: tuple[type[DraftingRule], ...] = (
    FixedRounds,
    ConfidenceStop,
    ProductStop,
    EntropyBound,
    MovingAverage,
    ProfileGuided,
    Bandit,
)
"""Every family that drafts at few bits, in the order of tables."""
EVERY_RULE: tuple[type[DraftingRule], ...] = (Plain, Lookups, *RULES)
"""What does not, before them."""


def rule_to_dict(rule: DraftingRule) -> dict[str, Any]:
    """JSON form of a rule: its family and its parameters."""
    parameters = {field.name: getattr(rule, field.name) for field in fields(rule)}  # type: ignore[arg-type]
    return {"family": rule.family, "parameters": parameters}


def rule_from_dict(data: Mapping[str, Any], schema: VerifiedSchema) -> DraftingRule:
    """Reads the JSON form.

    Raises:
        KeyError, TypeError, ValueError: If it is no rule of these observations.
    """
    kinds = {kind.family: kind for kind in EVERY_RULE}
    kind, parameters = kinds[data["family"]], dict(data["parameters"])
    hints = get_type_hints(kind)
    for name, value in parameters.items():
        wanted: tuple[type, ...] = (int,) if hints[name] is int else (int, float)
        if type(value) not in wanted or not math.isfinite(value):
            raise ValueError(f"{name} of rule {kind.family} is not {' or '.join(one.__name__ for one in wanted)}")
    bounds = {"level": range(schema.num_levels), "length": range(1, schema.depth + 1)}
    for name, allowed in bounds.items():
        if name in parameters and parameters[name] not in allowed:
            raise ValueError(f"{name} of rule {kind.family} is not in {allowed.start} to {allowed.stop - 1}")
    return kind(**parameters)


def _drafts_if(drafts: NDArray[np.bool_], level: int | NDArray[np.int64]) -> Actions:
    return np.where(drafts, np.asarray(level) + 1, 0).astype(np.int64)
