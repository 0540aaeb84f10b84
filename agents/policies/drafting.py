"""Rules that decide before each step whether to draft one more token, at which level, or to verify what waits.

A rule is a frozen dataclass; its fields are its parameters, and `grid` lists those worth trying. It is bound to costs
and to what was seen on training sequences, and then maps observations to actions: 0 verifies, 1 to L draft at level 0
to L - 1. Where no draft is possible any action verifies, so no rule has to look.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from flexquant_rl.engine.control.verified_signals import Observations, VerifiedSchema
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
        costs: What steps cost.
        acceptance: `[L]` share of drafts that agree on training sequences, of those after which all before agreed.
    """

    schema: VerifiedSchema
    costs: VerifyCosts
    acceptance: NDArray[np.float64]


class DraftingRule(Protocol):
    """A family of policies of drafts.

    Attributes:
        family: Its name in tables.
        looks: Whether it looks at signals, and pays for them.
    """

    family: ClassVar[str]
    looks: ClassVar[bool]

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
class Plain:
    """Never drafts: one pass per token."""

    family: ClassVar[str] = "plain"
    looks: ClassVar[bool] = False

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[Plain]:
        """The only setting."""
        yield cls()

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`."""
        return lambda observations: np.zeros(len(observations), dtype=np.int64)


@dataclass(frozen=True)
class FixedRounds:
    """Rounds of one length at one level.

    Attributes:
        level: Which level drafts.
        length: Drafts of a round.
    """

    family: ClassVar[str] = "fixed"
    looks: ClassVar[bool] = False

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
    looks: ClassVar[bool] = True

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
    looks: ClassVar[bool] = True

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
    looks: ClassVar[bool] = True

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
    looks: ClassVar[bool] = False

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
    looks: ClassVar[bool] = True

    price: float
    trust: float

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[ProfileGuided]:
        """Prices around the speeds that drafts reach, and how far confidences are believed."""
        for price, trust in itertools.product((0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.2), (0.25, 0.5, 0.75, 1.0)):
            yield cls(price, trust)

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`."""
        schema, costs = context.schema, context.costs
        draft, verify = np.array(costs.draft_ms) / costs.full_ms, np.array(costs.verify_ms) / costs.full_ms
        longer = np.append(np.diff(verify), np.inf)

        def decide(observations: Observations) -> Actions:
            likely = schema.column(observations, "confidence_product")[:, None] ** self.trust
            time = draft + longer[schema.num_pending(observations)][:, None]
            worth = likely * context.acceptance - self.price * time
            best = worth.argmax(-1)
            return np.where(worth.max(-1) > 0, best + 1, 0).astype(np.int64)

        return decide


@dataclass(frozen=True)
class Bandit:
    """UCB over levels and lengths of rounds, plain decoding among them; all rows learn together, as a server would.

    Attributes:
        exploration: Weight of the confidence bound, in full-width steps saved per token.
    """

    family: ClassVar[str] = "bandit"
    looks: ClassVar[bool] = False

    exploration: float

    @classmethod
    def grid(cls, schema: VerifiedSchema) -> Iterator[Bandit]:
        """How much it explores."""
        for exploration in (0.02, 0.1, 0.3):
            yield cls(exploration)

    def bind(self, context: DraftingContext) -> DraftingPolicy:
        """See `DraftingRule`; the policy begins to learn anew."""
        return _BanditPolicy(self.exploration, context)


class _BanditPolicy:
    """Statistics of the arms, and which arm each row plays."""

    def __init__(self, exploration: float, context: DraftingContext) -> None:
        schema, costs = context.schema, context.costs
        arms = [(0, 0), *itertools.product(range(schema.num_levels), range(1, schema.depth + 1))]
        self._levels, self._lengths = (np.array(column) for column in zip(*arms, strict=True))
        self._exploration, self._schema, self._costs = exploration, schema, costs
        self._tokens, self._steps, self._count = np.zeros((3, len(arms)))
        self._arm: Actions | None = None

    def __call__(self, observations: Observations) -> Actions:
        pending = self._schema.num_pending(observations)
        begins = pending == 0
        if self._arm is None or len(self._arm) != len(pending):
            self._arm = np.zeros(len(pending), dtype=np.int64)
        else:
            self._learn(observations, begins)
        for row in begins.nonzero()[0]:
            self._arm[row] = self._choose()
        return _drafts_if(pending < self._lengths[self._arm], self._levels[self._arm])

    def _learn(self, observations: Observations, begins: NDArray[np.bool_]) -> None:
        assert self._arm is not None
        arm = self._arm[begins]
        accepted, drafted = (
            np.rint(self._schema.column(observations, name)[begins] * self._schema.depth).astype(int)
            for name in ("last_accepted", "last_drafted")
        )
        is_plain = self._lengths[arm] == 0
        accepted, drafted = np.where(is_plain, 0, accepted), np.where(is_plain, 0, drafted)
        costs = self._costs
        time = drafted * np.array(costs.draft_ms)[self._levels[arm]] + np.array(costs.verify_ms)[drafted]
        np.add.at(self._tokens, arm, accepted + 1)
        np.add.at(self._steps, arm, time / costs.full_ms)
        np.add.at(self._count, arm, 1)

    def _choose(self) -> int:
        untried = (self._count == 0).nonzero()[0]
        if len(untried):
            self._count[untried[0]] = 1e-9  # others are tried meanwhile
            return int(untried[0])
        tokens = np.maximum(self._tokens, 1e-9)
        bound = np.sqrt(np.log(max(self._count.sum(), 2)) / np.maximum(self._count, 1e-9))
        return int((-self._steps / tokens + self._exploration * bound).argmax())


RULES: tuple[type[DraftingRule], ...] = (
    FixedRounds,
    ConfidenceStop,
    ProductStop,
    EntropyBound,
    MovingAverage,
    ProfileGuided,
    Bandit,
)
"""Every family that is tuned, in the order of tables."""


def _drafts_if(drafts: NDArray[np.bool_], level: int | NDArray[np.int64]) -> Actions:
    return np.where(drafts, np.asarray(level) + 1, 0).astype(np.int64)
