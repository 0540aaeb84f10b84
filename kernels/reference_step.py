"""Plain torch definitions of what is between the products of a GPU decode step: attention, statistics, sampling.

The definition of the signals is `engine/control/signals.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexquant_rl.kernels.signal_constants import NORM_FLOOR


def attend(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """``softmax(scale * q @ k.T) @ v`` over places 0 to each token's own, in float64: `[M, H * D]`.

    Args:
        queries: `[M, H, D]`.
        keys: `[M, J, L, D]`.
        values: As `keys`.
        positions: `[M]` integers.
        scale: Factor of the scores.
    """
    group = queries.shape[1] // keys.shape[1]
    rows = []
    for query, key, value, position in zip(queries, keys, values, positions.tolist(), strict=True):
        key, value = (x[:, : position + 1].double().repeat_interleave(group, 0) for x in (key, value))
        scores = torch.einsum("hd,hld->hl", query.double(), key) * scale
        rows.append(torch.einsum("hl,hld->hd", scores.softmax(-1), value).flatten())
    return torch.stack(rows)


def layer_statistics(hidden: Tensor) -> Tensor:
    """Residual updates and crests of `[L + 1, K]`, `[2, L + 1]` float64, 0 in the last column."""
    before = hidden[:-1].double()
    norm = before.norm(dim=1).clamp_min(NORM_FLOOR)
    update = (hidden[1:].double() - before).norm(dim=1) / norm
    crest = before.abs().amax(1) * hidden.shape[1] ** 0.5 / norm
    return torch.nn.functional.pad(torch.stack([update, crest]), (0, 1))


def choose_token(logits: Tensor, temperature: float, noise: Tensor) -> int:
    """The best score after adding Gumbel noise `[V]`, which draws from ``softmax(logits / temperature)``."""
    return int((logits.double() + temperature * noise.double()).argmax())
