"""The best widths that do not look at the token: a multiple-choice knapsack over sensitivities and latencies.

This is the baseline that a learned policy has to beat, the start that it is cloned from, and its control variate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.engine.control.allocation_kl import allocation_kl_nats
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.decoder import Decoder
from flexquant_rl.engine.errors import InputError

_MAX_STATES = 4000
_FRONT_POINTS = 32
_TIME_TICKS = 1e9


@dataclass(frozen=True)
class StaticFront:
    """Static allocations from fastest to slowest, none of which another one beats in both time and KL.

    Attributes:
        bit_widths: `[P, U]` int64.
        time_share: `[P]` float64, latency over that of the largest width everywhere, rising.
        output_kl_nats: `[P]` float64, falling: the sum of sensitivities, or measured after `measured_on`.
        mean_bit_width: `[P]` float64, parameter-weighted.
    """

    bit_widths: Tensor
    time_share: Tensor
    output_kl_nats: Tensor
    mean_bit_width: Tensor

    def allocate(self, kl_weight: Tensor) -> Tensor:
        """The allocation with the best expected reward at each dial: `[R]` -> `[R, U]`."""
        return self.bit_widths[self.best(kl_weight)]

    def best(self, kl_weight: Tensor) -> Tensor:
        """`[R]` -> `[R]` int64, the point with the largest `1 - time_share - kl_weight * output_kl_nats`."""
        return (self.time_share + kl_weight.double()[:, None] * self.output_kl_nats).argmin(-1)

    def envelope(self) -> tuple[Tensor, Tensor]:
        """The allocations that `best` ever picks, `[P', U]` from fastest to slowest, and where each takes over.

        Returns:
            Their widths, and the KL weights `[P' - 1]` float64, ascending, from which on the next one is better.
        """
        picked, prices = [0], []
        time, kl = self.time_share.tolist(), self.output_kl_nats.tolist()
        while picked[-1] < len(time) - 1:
            last = picked[-1]
            later = range(last + 1, len(time))
            slopes = {index: (time[index] - time[last]) / (kl[last] - kl[index]) for index in later}
            cheapest = min(slopes.values())
            picked.append(max(index for index in later if slopes[index] == cheapest))
            prices.append(cheapest)
        return self.bit_widths[picked], torch.tensor(prices, dtype=torch.float64)

    def marginal_rewards(self, profile: Profile, kl_weight: Tensor) -> Tensor:
        """What changing one unit alone from the best allocation to each width would gain or cost per token.

        Args:
            profile: Sensitivities, scaled to the front's KL at each allocation.
            kl_weight: `[R]` dials.

        Returns:
            `[R, U, W]` float64, shares of a full-width step; 0 at the allocation's own widths.
        """
        picked = self.best(kl_weight)
        columns = torch.searchsorted(torch.tensor(profile.bit_widths), self.bit_widths[picked])
        sensitivity, unit_ms = profile.sensitivity.double(), profile.cost.unit_ms
        units = torch.arange(len(unit_ms))
        kl = sensitivity[units, columns]
        scale = (self.output_kl_nats[picked] / kl.sum(-1).clamp_min(1e-12))[:, None, None]
        added_kl = scale * (sensitivity - kl[..., None])
        added_ms = unit_ms - unit_ms[units, columns][..., None]
        added_time = added_ms / profile.cost.latency_ms(profile.cost.full_width())
        return -added_time - kl_weight.double()[:, None, None] * added_kl

    def nearest(self, mean_bit_width: float) -> Tensor:
        """`[U]`: the allocation whose mean width is nearest."""
        return self.bit_widths[int((self.mean_bit_width - mean_bit_width).abs().argmin())]

    def dial_range(self, fastest_share: float = math.inf) -> tuple[float, float]:
        """KL weights between which the best allocation moves from the fast to the slow end of the front.

        Args:
            fastest_share: A time share that the range reaches, if an allocation does: the smallest that will be asked
                for. But for that a tenth of the front's slopes is left out at either end.

        Raises:
            InputError: If there is only one allocation, so that no weight moves anything.
        """
        if len(self.time_share) < 2:
            raise InputError(
                "only one allocation is left to choose: by the profile every other one is slower or worse; quantise "
                "with more --bit-widths, or run `fq profile` again while the machine is quiet"
            )
        slopes = self.time_share.diff() / -self.output_kl_nats.diff()
        low, high = slopes.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
        dials = 0.9 * slopes  # at a slope itself two allocations are equally good
        reaching = dials[self.time_share[self.best(dials)] <= fastest_share].tolist()
        return min(low, max(reaching, default=low)), high

    def measured_on(
        self,
        decoder: Decoder,
        windows: Tensor,
        first: int,
        *,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> StaticFront:
        """Replaces the sums of sensitivities by the output KL measured on text, and drops what is then dominated.

        Args:
            decoder: A session of the model.
            windows: `[n, T]` int64.
            first: Positions before this one are context, read at the largest width as a prompt is.
            progress: Wraps the loop over layers, the head last.
        """
        top = max(decoder.model.bit_widths)
        kl = allocation_kl_nats(decoder, windows, self.bit_widths, first=first, prompt_width=top, progress=progress)
        # Fastest first: keep a point only if it is better than everything faster.
        best = torch.cummin(torch.cat([torch.tensor([float("inf")], dtype=torch.float64), kl[:-1]]), dim=0).values
        keep = kl < best
        return StaticFront(self.bit_widths[keep], self.time_share[keep], kl[keep], self.mean_bit_width[keep])


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
        time_share=profile.cost.time_share(bit_widths),
        output_kl_nats=kl[keep],
        mean_bit_width=(bit_widths.double() * weights).sum(-1),
    )


def _undominated(time: Tensor, kl: Tensor, limit: int) -> Tensor:
    """Indices of points that nothing beats in both, by rising time, thinned evenly in time to `limit`."""
    # Units of one size make sums that are equal up to rounding: of equal times the least KL comes first, and stays.
    ticks = ((time - time.min()) / (time.max() - time.min()).clamp_min(1e-30) * _TIME_TICKS).round()
    order = torch.argsort(kl, stable=True)
    order = order[torch.argsort(ticks[order], stable=True)]
    sorted_kl = kl[order]
    best_before = torch.cummin(torch.cat([sorted_kl.new_full((1,), float("inf")), sorted_kl[:-1]]), 0).values
    order = order[sorted_kl < best_before]
    if len(order) <= limit:
        return order
    targets = torch.linspace(float(time[order[0]]), float(time[order[-1]]), limit, dtype=torch.float64)
    nearest = torch.searchsorted(time[order], targets).clamp_max(len(order) - 1)
    return order[torch.unique(nearest)]
