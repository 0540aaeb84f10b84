"""Plain torch definitions of what is between the products of a GPU decode step: attention, statistics, sampling.

The definition of the signals is `engine/control/signals.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexquant_rl.kernels.signal_constants import NORM_FLOOR


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, scale: float, rows: Tensor | None = None
) -> Tensor:
    """``softmax(scale * q @ k.T) @ v`` over places 0 to each token's own, in float64: `[M, H * D]`.

    Args:
        queries: `[M, H, D]`.
        keys: `[R, J, L, D]`.
        values: As `keys`.
        positions: `[M]` integers; at -1 the result is 0.
        scale: Factor of the scores.
        rows: `[M]` integers, the cache row of each token; None: its own number.
    """
    group = queries.shape[1] // keys.shape[1]
    of_token = range(len(queries)) if rows is None else rows.tolist()
    mixed = []
    for query, row, position in zip(queries, of_token, positions.tolist(), strict=True):
        key, value = (x[row, :, : position + 1].double().repeat_interleave(group, 0) for x in (keys, values))
        scores = torch.einsum("hd,hld->hl", query.double(), key) * scale
        mixed.append(torch.einsum("hl,hld->hd", scores.softmax(-1), value).flatten())
    return torch.stack(mixed)


def layer_statistics(hidden: Tensor) -> Tensor:
    """Residual updates and crests of `[L + 1, M, K]`, `[M, 2, L + 1]` float64, 0 in the last column."""
    before = hidden[:-1].double()
    norm = before.norm(dim=2).clamp_min(NORM_FLOOR)
    update = (hidden[1:].double() - before).norm(dim=2) / norm
    crest = before.abs().amax(2) * hidden.shape[2] ** 0.5 / norm
    return torch.nn.functional.pad(torch.stack([update.T, crest.T], 1), (0, 1))


def choose_token(logits: Tensor, temperature: float, noise: Tensor) -> int:
    """The best score after adding Gumbel noise `[V]`, which draws from ``softmax(logits / temperature)``."""
    return int((logits.double() + temperature * noise.double()).argmax())
