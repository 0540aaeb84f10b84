"""What passes of the GPU keep between sessions; needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from flexquant_rl.engine.decoding import graph_rows


def test_few_caches_are_kept_for_later() -> None:
    """A server that is asked for ever other numbers of rows would keep a cache of each, with its graphs."""
    weights: Any = SimpleNamespace(max_length=64, device=torch.device("cpu"))
    passes = graph_rows.GraphPasses(weights)
    made = [passes.take(count) for count in (1, 8, 5)]
    for rows in made:
        passes.give_back(rows)
    assert passes.take(8) is made[1]
    assert passes.take(5) is made[2]
    assert passes.take(1) is not made[0], "the oldest is gone"
