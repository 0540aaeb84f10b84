"""The best widths that do not look at the token: a multiple-choice knapsack over sensitivities and latencies.

This is the baseline that a learned policy has to beat, the start that it is cloned from, and its control variate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.engine.decode import Decoder
from flexquant_rl.engine.profile import Profile, kl_nats, reference_width

_MAX_STATES = 4000
_FRONT_POINTS = 32


@dataclass(frozen=True)
class StaticFront:
    """Static allocations from fastest to slowest, none of which another one beats in both time and KL.

    Attributes:
        bit_widths: `[P, U]` int64.
        speedup: `[P]` float64 over the largest width everywhere, falling.
        output_kl_nats: `[P]` float64, falling: the sum of sensitivities, or measured after `measured_on`.
        mean_bit_width: `[P]` float64, parameter-weighted.
    """

    bit_widths: Tensor
    speedup: Tensor
    output_kl_nats: Tensor
    mean_bit_width: Tensor

    def allocate(self, kl_weight: Tensor) -> Tensor:
        """The allocation with the best expected reward at each dial: `[R]` -> `[R, U]`."""
        reward = self.speedup - kl_weight.double()[:, None] * self.output_kl_nats
        return self.bit_widths[reward.argmax(-1)]

    def nearest(self, mean_bit_width: float) -> Tensor:
        """`[U]`: the allocation whose mean width is nearest."""
        return self.bit_widths[int((self.mean_bit_width - mean_bit_width).abs().argmin())]

    def dial_range(self) -> tuple[float, float]:
        """KL weights between which the best allocation moves from the fast to the slow end of the front."""
        slopes = (self.speedup[:-1] - self.speedup[1:]) / (self.output_kl_nats[:-1] - self.output_kl_nats[1:])
        low, high = slopes.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
        return low, high

    def measured_on(self, decoder: Decoder, windows: Tensor, first: int) -> StaticFront:
        """Replaces the sums of sensitivities by the output KL really measured on text, and drops what is then dominated.

        Args:
            decoder: A session of the model.
            windows: `[n, T]` int64.
            first: Positions before this one are context, read at the largest width as a prompt is.
        """
        base = torch.full((decoder.model.num_units,), reference_width(decoder.model))
        reference = decoder.score(windows, base, first=first).log_softmax(-1)
        kl = torch.stack(
            [
                kl_nats(reference, decoder.score(windows, self._with_prompt(index, windows, first), first=first).log_softmax(-1))
                .mean()
                .double()
                .cpu()
                for index in range(len(self.speedup))
            ]
        )
        # Fastest first: keep a point only if it is better than everything faster.
        best = torch.cummin(torch.cat([torch.tensor([float("inf")], dtype=torch.float64), kl[:-1]]), dim=0).values
        keep = kl < best
        return StaticFront(self.bit_widths[keep], self.speedup[keep], kl[keep], self.mean_bit_width[keep])

    def _with_prompt(self, index: int, windows: Tensor, first: int) -> Tensor:
        widths = self.bit_widths[index].expand(*windows.shape, -1).clone()
        widths[:, :first] = self.bit_widths.max()
        return widths


def static_front(profile: Profile, unit_weights: Tensor, *, num_points: int = _FRONT_POINTS) -> StaticFront:
    """Solves the knapsack for every latency budget at once by dynamic programming over units.

    Args:
        profile: Sensitivities `[U, W]` and latencies.
        unit_weights: `[U]` weights per unit, for the mean width.
        num_points: The front is thinned to this many points, evenly spaced in time.
    """
    time = torch.zeros(1, dtype=torch.float64)
    kl = torch.zeros(1, dtype=torch.float64)
    choices = torch.zeros(1, 0, dtype=torch.int64)
    widths = torch.tensor(profile.bit_widths)
    for unit_ms, unit_kl in zip(profile.cost.unit_ms, profile.sensitivity.double(), strict=True):
        time = (time[:, None] + unit_ms).flatten()
        kl = (kl[:, None] + unit_kl).flatten()
        column = torch.arange(len(widths)).repeat(len(choices))
        choices = torch.cat([choices.repeat_interleave(len(widths), 0), column[:, None]], dim=1)
        keep = _undominated(time, kl, _MAX_STATES)
        time, kl, choices = time[keep], kl[keep], choices[keep]
    keep = _undominated(time, kl, num_points)
    bit_widths = widths[choices[keep]]
    weights = unit_weights.double() / unit_weights.sum()
    return StaticFront(
        bit_widths=bit_widths,
        speedup=profile.cost.speedup(bit_widths),
        output_kl_nats=kl[keep],
        mean_bit_width=(bit_widths.double() * weights).sum(-1),
    )


def _undominated(time: Tensor, kl: Tensor, limit: int) -> Tensor:
    """Indices of points that nothing beats in both, by rising time, thinned evenly in time to `limit`."""
    order = torch.argsort(time, stable=True)
    sorted_kl = kl[order]
    best_before = torch.cummin(torch.cat([sorted_kl.new_full((1,), float("inf")), sorted_kl[:-1]]), 0).values
    order = order[sorted_kl < best_before]
    if len(order) <= limit:
        return order
    targets = torch.linspace(float(time[order[0]]), float(time[order[-1]]), limit, dtype=torch.float64)
    nearest = torch.searchsorted(time[order], targets).clamp_max(len(order) - 1)
    return order[torch.unique(nearest)]
