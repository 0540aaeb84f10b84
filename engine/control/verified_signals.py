"""What a policy of drafts sees before each step: the signals of the newest output and the history of the round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexquant_rl.kernels import signal_constants as constants

Observations = NDArray[np.float32]

FAST_DECAY, SLOW_DECAY = 0.7, 0.95
"""Weights of the past in the two moving averages of acceptance; the newest round has the rest."""
ACCEPTANCE_AT_START = 0.8
"""What the averages begin with, before any round has been verified."""


_OUTPUT_NAMES = (
    "token_entropy",
    "token_entropy_ema",
    "perplexity_entropy",
    "top1_probability",
    "top_margin",
    "surprisal",
    "step_kl",
    "position",
)


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

    @property
    def names(self) -> tuple[str, ...]:
        """Every element, in order."""
        return (
            *_OUTPUT_NAMES,  # of the newest output, drafted or settled, as in the lossy mode
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
        return len(self.names)

    def index(self, name: str) -> int:
        """Position of an element."""
        return self.names.index(name)

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
