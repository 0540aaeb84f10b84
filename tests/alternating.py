"""A policy of three units that keeps what it has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from flexquant_rl.engine.control.decision import Decision


class Alternating:
    """Widths that follow the signals: another allocation whenever the entropy crosses its average."""

    name = "alternating"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, signals: Tensor) -> Decision:
        self.seen.append(signals.clone())
        low = (signals[:, 0] < signals[:, 1])[:, None] | (len(self.seen) % 3 == 0)
        return Decision(torch.where(low, torch.tensor([3, 4, 4]), torch.tensor([6, 5, 8])))
