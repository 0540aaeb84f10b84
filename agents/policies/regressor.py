"""The bandit's answer: predict what a token's low widths would cost, and pay for the high ones where that is worth it.

Supervised learning needs no rewards: on training text the output KL of every token is recorded at both allocations, and
ridge regression predicts its logarithm from the signals that a learned policy sees. What a token does to later ones
through keys and values is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.unbound import Family, PolicyContext, RulePolicy, check_width
from flexquant_rl.engine.control.decision import Decision, joined_rows
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.errors import InputError

_RIDGE = 30.0
"""In samples: features of unit variance, so coefficients shrink by the share of it in all samples."""
_SMALLEST_KL_NATS = 1e-6
# What follows from the policy's own choices says nothing of a token, and is another thing in the recorded text.
_LEFT_OUT = ("dial", "mean_width_16", "probe_kl", "tokens_since_probe")
_UNIT_FEATURES = ("residual_update", "crest")


@dataclass(frozen=True)
class Regressor:
    """Two static allocations; a token gets the slower one where the KL that it is predicted to save is worth its time.

    Attributes:
        multiplier: Lagrange multiplier: nats of output KL that a full-width step of time has to save.
        low: Mean width of the fast allocation, bits: a stored width for all units, or the nearest point of the front.
        high: Mean width of the slow allocation, bits.
    """

    family: ClassVar[Family] = Family("regressor", "regressor (supervised)", "#44AA99", "X")

    multiplier: float
    low: float = 4
    high: float = 5

    def __post_init__(self) -> None:
        if not 0 <= self.multiplier < math.inf:
            raise InputError(
                f"multiplier={self.multiplier:g} must be finite and not negative, in nats for a full-width step, e.g. "
                "0.3; 0 pays for any saving"
            )
        check_width("low", self.low)
        check_width("high", self.high)
        if self.low >= self.high:
            raise InputError(f"low={self.low:g} must be below high={self.high:g}; lower it")

    def bind(self, context: PolicyContext) -> RulePolicy:
        """See `UnboundPolicy`; fits itself to the context's recorded training text, the same way every time."""
        name, (low, high), added_time = policy_name(self), self._allocations(context), self.added_time(context)
        if added_time <= 0:
            raise InputError(
                f"policy {name!r}: on this model mean width {self.high:g} is no slower than {self.low:g}; choose means "
                "further apart"
            )
        if context.recording is None:
            raise InputError(f"policy {name!r} has to be fitted to text, and there is none here; use fq evaluate")
        recording = context.recording()
        kl = torch.stack([recording.token_kl_nats(widths).flatten() for widths in (low, high)], dim=-1)
        features = _features(context.schema)
        predict = fit_log_kl(recording.signals.flatten(0, 1)[:, features], kl)
        asked, low_row, high_row = self.multiplier * added_time, low[None], high[None]

        def decide(signals: Tensor) -> Decision:
            expected = predict(signals.cpu().index_select(1, features)).exp().tolist()
            rows = [high_row if at_low - at_high > asked else low_row for at_low, at_high in expected]
            return Decision(joined_rows(rows).to(signals.device))

        return RulePolicy(name, decide)

    def added_time(self, context: PolicyContext) -> float:
        """Time share that the high allocation takes more; 5 bits everywhere may be slower than a mix of 4 and 6."""
        low, high = context.profile.cost.time_share(torch.stack(self._allocations(context))).tolist()
        return float(high - low)

    def _allocations(self, context: PolicyContext) -> tuple[Tensor, Tensor]:
        name = policy_name(self)
        return context.allocation(self.low, name), context.allocation(self.high, name)


@dataclass(frozen=True)
class LogLinear:
    """A linear map of features.

    Attributes:
        coefficients: `[F, K]` float64.
        constant: `[K]` float64.
    """

    coefficients: Tensor
    constant: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """`[n, F]` -> `[n, K]` float64."""
        return torch.addmm(self.constant, features.double(), self.coefficients)


def fit_log_kl(features: Tensor, kl_nats: Tensor) -> LogLinear:
    """Ridge regression of the logarithm of KL, solved exactly.

    Args:
        features: `[n, F]`; a feature that never changes gets no weight.
        kl_nats: `[n, K]`, not negative.
    """
    inputs, targets = features.double(), kl_nats.double().clamp_min(_SMALLEST_KL_NATS).log()
    mean, std = inputs.mean(0), inputs.std(0, correction=0)
    std = torch.where(std < 1e-6, 1.0, std)
    inputs = (inputs - mean) / std
    gram = inputs.T @ inputs + _RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
    constant = targets.mean(0)
    coefficients = torch.linalg.solve(gram, inputs.T @ (targets - constant)) / std[:, None]
    return LogLinear(coefficients, constant - mean @ coefficients)


def _features(schema: SignalSchema) -> Tensor:
    """`[F]` int64: which of the signals say something of the token, and the statistics of every unit."""
    of_token = [index for index, name in enumerate(schema.global_names) if name not in _LEFT_OUT]
    of_units = [
        schema.num_global + unit_idx * schema.num_per_unit + schema.index_in_unit(name)
        for unit_idx in range(schema.num_units)
        for name in _UNIT_FEATURES
    ]
    return torch.tensor(of_token + of_units)
