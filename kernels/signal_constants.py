"""The numbers in the definition of the signals: the one table that every implementation of them reads.

Signals are defined in `SignalTracker` of the engine, and computed a second time in Triton (token_signals.py and
layer_statistics.py) and a third time in C++ (cpp/control.cpp). The Python files take the numbers from here.
"""

from __future__ import annotations

SIGNAL_SCHEMA_VERSION = 2
"""Raised with every change of a signal's meaning; policies of another version are refused."""

EMA_DECAY = 0.9
"""Weight of the past in the moving average of the token entropy; the new entropy has the rest."""

RECENT_TOKENS = 16
"""Steps whose mean width is averaged."""

TOKENS_SINCE_PROBE_LIMIT = 256
"""Tokens after which a probe counts as infinitely long ago."""

LOG_PROBABILITY_FLOOR = -110.0
"""Smallest log-probability, nats. Float32 probabilities below it are 0, and a finite one keeps 0 * -inf out of sums."""

KL_FLOOR_NATS = 1e-6
"""Smallest divergence and sensitivity that a logarithm is taken of."""

STATISTIC_FLOOR = 1e-6
"""Smallest residual update and crest that a logarithm is taken of."""

NORM_FLOOR = 1e-12
"""Smallest norm of a residual stream that a statistic is divided by."""

SIGNAL_LIMIT = 10.0
"""Largest magnitude of a signal; others are clipped."""

NATS_SCALE = 4
"""Divides what is measured in nats: entropy, its moving average, its perplexity, surprisal."""

DECADES_SCALE = 2
"""Divides decimal logarithms of divergences and sensitivities."""

WIDTH_SCALE = 8
"""Divides bit-widths."""

POSITION_SCALE = 4
"""Divides the logarithm of one more than the position."""

NUM_TOKEN_SIGNALS = 12
"""Signals of the token, before the projection of its embedding."""

NUM_STEP_SIGNALS = 4
"""Signals of a unit beside its constants: residual update, crest, last width, depth."""
