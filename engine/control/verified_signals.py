"""What a policy of drafts sees before each step: the signals of the newest output and the history of the round."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flexquant_rl.kernels import signal_constants as constants

VERIFIED_SCHEMA_VERSION = 1
"""Raised with every change of what an element means; exported policies of another version are refused."""

Observations = NDArray[np.float32]

Sees = Literal["nothing", "confidences", "signals"]
"""What a policy looks at beside the history of the rounds, and pays for: nothing, how sure the drafts are, or all."""

FAST_DECAY, SLOW_DECAY = 0.7, 0.95
"""Weights of the past in the two moving averages of acceptance; the newest round has the rest."""
ACCEPTANCE_AT_START = 0.8
"""What the averages begin with, before any round has been verified."""
_MAX_COUNT = 1 << 12  # of anything in a file: more would fill the memory with names

OUTPUT_NAMES = (
    "token_entropy",
    "token_entropy_ema",
    "perplexity_entropy",
    "top1_probability",
    "top_margin",
    "surprisal",
    "step_kl",
    "position",
)
"""Elements that describe the newest output; signals of the same names are the same."""


@dataclass(frozen=True)
class VerifiedSchema:
    """Names and order of the observation `[R, dim]` of a policy of drafts.

    Attributes:
        num_levels: L, the allocations that draft.
        depth: D, drafts of a round at most.
        num_embedding_dims: Size of the projection of the embedding of the token to be read next.
    """

    num_levels: int
    depth: int
    num_embedding_dims: int = 32

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every element, in order."""
        return (
            *OUTPUT_NAMES,  # of the newest output, drafted or settled, as in the lossy mode
            # The round: nothing of it is settled yet.
            "can_draft",  # 1 or 0; where it is 0 every action verifies
            "pending",  # drafts that wait / depth
            "confidence_product",  # of the pending drafts' top-1 probabilities; 1 with none
            "lowest_confidence",  # 1 with none
            *(f"confidence_{index}" for index in range(self.depth)),  # 0 where nothing is drafted yet
            *(f"drafted_by_{level}" for level in range(self.num_levels)),  # the newest draft; all 0 with none
            # Rounds before.
            "acceptance_fast",  # moving averages of accepted / drafted
            "acceptance_slow",
            "last_drafted",  # drafts of the last round that had any / depth
            "last_accepted",  # those that were kept / depth
            *(f"embedding_{index}" for index in range(self.num_embedding_dims)),
        )

    @property
    def dim(self) -> int:
        """Length of an observation."""
        return len(self._places)

    def index(self, name: str) -> int:
        """Position of an element."""
        return self._places[name]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the version."""
        sizes = {name: getattr(self, name) for name in ("num_levels", "depth", "num_embedding_dims")}
        return {"version": VERIFIED_SCHEMA_VERSION, **sizes}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> VerifiedSchema:
        """Reads the JSON form; the caller checks `version`.

        Raises:
            KeyError, TypeError, ValueError: If it is not what `to_dict` writes.
        """
        sizes = [data[name] for name in ("num_levels", "depth", "num_embedding_dims")]
        if not all(type(size) is int and 0 < size <= _MAX_COUNT for size in sizes):
            raise ValueError(f"the sizes of the observation are not whole numbers from 1 to {_MAX_COUNT}")
        return VerifiedSchema(*sizes)

    def column(self, observations: Observations, name: str) -> Observations:
        """An element of all rows, `[R]`."""
        return observations[:, self.index(name)]

    def can_draft(self, observations: Observations) -> NDArray[np.bool_]:
        """`[R]`: whether another draft is possible."""
        return self.column(observations, "can_draft") > 0.5

    def num_pending(self, observations: Observations) -> NDArray[np.int64]:
        """`[R]` drafts that wait."""
        return np.rint(self.column(observations, "pending") * self.depth).astype(np.int64)

    def token_entropy_nats(self, observations: Observations) -> Observations:
        """`[R]` entropy of the newest output."""
        entropy: Observations = self.column(observations, "token_entropy") * constants.NATS_SCALE
        return entropy

    def confidences(self, observations: Observations) -> Observations:
        """`[R, D]` top-1 probabilities of the pending drafts, in order; 0 beyond."""
        first = self.index("confidence_0")
        return observations[:, first : first + self.depth]

    def assemble(
        self,
        outputs: Observations,
        *,
        can_draft: NDArray[np.bool_],
        num_pending: NDArray[np.int64],
        confidences: Observations,
        level: NDArray[np.int64],
        acceptance: Observations,
        last_round: NDArray[np.int64],
        embedding: Observations,
    ) -> Observations:
        """Puts an observation together, for recordings and serving alike.

        Args:
            outputs: `[R, 8]`, `OUTPUT_NAMES` of the newest output, scaled.
            can_draft: `[R]` whether another draft is possible.
            num_pending: `[R]` drafts that wait.
            confidences: `[R, D]` their top-1 probabilities; what stands beyond them is not looked at.
            level: `[R]` the level of the newest of them; -1 with none.
            acceptance: `[R, 2]` fast and slow moving average.
            last_round: `[R, 2]` drafts of the last round that had any, and those that were kept.
            embedding: `[R, E]` of the token that is read next.

        Returns:
            `[R, dim]`, within ±`SIGNAL_LIMIT`.
        """
        # One row is put together before each step that is served: few operations, and no Python that walks over names.
        vector: Observations = np.zeros((len(outputs), self.dim), dtype=np.float32)
        first, by, history = self._parts
        drafted = self._places_of_drafts < num_pending[:, None]
        waiting = np.where(drafted, confidences, 1)
        vector[:, : len(OUTPUT_NAMES)] = outputs
        vector[:, first - 4] = can_draft
        vector[:, first - 3] = num_pending / self.depth
        vector[:, first - 2] = np.multiply.reduce(waiting, axis=-1)
        vector[:, first - 1] = np.minimum.reduce(waiting, axis=-1)
        np.multiply(confidences, drafted, out=vector[:, first:by], casting="same_kind")
        vector[:, by:history] = level[:, None] == self._levels
        vector[:, history : history + 2] = acceptance
        vector[:, history + 2 : history + 4] = last_round / self.depth
        vector[:, history + 4 :] = embedding
        np.minimum(vector, constants.SIGNAL_LIMIT, out=vector)
        return np.maximum(vector, -constants.SIGNAL_LIMIT, out=vector)

    @cached_property
    def _parts(self) -> tuple[int, int, int]:
        """Where confidences, levels and history begin."""
        first = self.index("confidence_0")
        return first, first + self.depth, first + self.depth + self.num_levels

    @cached_property
    def _places_of_drafts(self) -> NDArray[np.int64]:
        return np.arange(self.depth)

    @cached_property
    def _levels(self) -> NDArray[np.int64]:
        return np.arange(self.num_levels)


_DECAYS = np.array([FAST_DECAY, SLOW_DECAY], dtype=np.float32)


def next_acceptance(averages: Observations, share: NDArray[np.float64] | float) -> Observations:
    """The moving averages of acceptance `[..., 2]` after a round of which a share `[..., 1]` of the drafts was kept."""
    moved: Observations = _DECAYS * averages + (1 - _DECAYS) * np.asarray(share, dtype=np.float32)
    return moved


@dataclass(frozen=True, eq=False)
class RoundHistory:
    """What a policy remembers of the rounds of a text: nobody else keeps state.

    Attributes:
        acceptance: `[2]` fast and slow moving average of accepted over drafted.
        last_round: Drafts of the last round that had any, and those that were kept.
    """

    acceptance: Observations = field(default_factory=lambda: np.full(2, ACCEPTANCE_AT_START, dtype=np.float32))
    last_round: tuple[int, int] = (0, 0)

    def after(self, num_drafted: int, num_accepted: int) -> RoundHistory:
        """The history after one more round."""
        if not num_drafted:
            return self
        return RoundHistory(next_acceptance(self.acceptance, num_accepted / num_drafted), (num_drafted, num_accepted))


def next_entropy_average(average: Observations, entropy: Observations) -> Observations:
    """The moving average of the entropies of outputs after one more, nats, as `SignalTracker` has it."""
    return constants.EMA_DECAY * average + (1 - constants.EMA_DECAY) * entropy


def scaled_outputs(newest: Observations, entropy_average: Observations, position: NDArray[np.int64]) -> Observations:
    """The elements of an observation that the newest output gives, scaled as `SignalTracker` scales them.

    Args:
        newest: `[R, 5]`, `OUTPUT_SIGNALS`.
        entropy_average: `[R]` moving average of the entropies up to it, nats.
        position: `[R]` tokens since the prompt, pending ones too.

    Returns:
        `[R, 8]`.
    """
    entropy, top1, margin, surprisal, step_kl = newest.T
    columns = [
        entropy / constants.NATS_SCALE,
        entropy_average / constants.NATS_SCALE,
        np.log1p(np.exp(entropy_average)) / constants.NATS_SCALE,
        top1,
        margin,
        surprisal / constants.NATS_SCALE,
        np.log10(np.maximum(step_kl, constants.KL_FLOOR_NATS)) / constants.DECADES_SCALE,
        np.log1p(position) / constants.POSITION_SCALE,
    ]
    return np.stack(columns, axis=1, dtype=np.float32, casting="same_kind")
