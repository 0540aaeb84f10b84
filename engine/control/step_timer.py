"""Times whole decode steps on a machine whose speed changes by more than a width does."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor

from flexquant_rl.engine.control.cost import clock_ms
from flexquant_rl.engine.decoding.lean import LeanSession
from flexquant_rl.engine.decoding.session import DecodeSession

MAX_PAIRS = 25
"""Most steps that a session must have room for."""
_MIN_PAIRS = 5
_VECTOR_MS = 25.0
"""Time that a width vector is worth: short steps are repeated more often."""
_NUM_BASELINES = 9


class StepTimer:
    """Times steps of a session, each beside one at the largest width a moment later.

    A time is the usual time of the largest width, times the ratio of the two medians: what slows the machine down for a
    while slows down both.

    Args:
        session: Holds a prompt, with room for `MAX_PAIRS` more tokens; it is forked, not stepped.
        token_ids: `[1]` int64, what every step reads.
    """

    def __init__(self, session: DecodeSession | LeanSession, token_ids: Tensor) -> None:
        """Finds out how long a step usually takes."""
        model = session.model
        self._session = session
        self._token_ids = token_ids
        self._device = model.device
        self._largest = torch.full((model.num_units,), max(model.bit_widths))
        self._num_pairs = _MIN_PAIRS
        usual = [self._medians_ms(self._largest) for _ in range(_NUM_BASELINES)]
        self._usual_ms = statistics.median(ms for pair in usual for ms in pair)
        self._num_pairs = min(max(int(_VECTOR_MS / (2 * self._usual_ms)), _MIN_PAIRS), MAX_PAIRS)

    def __call__(self, bit_widths: Tensor) -> float:
        """Milliseconds of a step at `[U]` widths."""
        own_ms, largest_ms = self._medians_ms(bit_widths)
        return self._usual_ms * own_ms / largest_ms

    def _medians_ms(self, bit_widths: Tensor) -> tuple[float, float]:
        """Medians of steps at the given and at the largest widths, taking turns."""
        steps = [partial(self._session.fork().step, self._token_ids, widths) for widths in (bit_widths, self._largest)]
        times = [[clock_ms(step, self._device) for step in steps] for _ in range(self._num_pairs)]
        own, largest = zip(*times, strict=True)
        return statistics.median(own), statistics.median(largest)
