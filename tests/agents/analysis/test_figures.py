"""Pictures of what is at the edge: the reference itself, nothing timed, nothing lost, one matrix alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from flexquant_rl.agents.analysis.figures import _short, plot_sensitivity, plot_strategies
from flexquant_rl.agents.analysis.rows import PartRow, StrategyRow

pytestmark = pytest.mark.filterwarnings("error")


def strategy(name: str, bit_width: int, kl: float) -> StrategyRow:
    return StrategyRow(name, 128, bit_width, kl, 0.9 * kl, 1.2 * kl, 5 * kl, 9.0, 8.0, 0.9, bit_width / 8, 1.0, 99)


def is_drawn(path: Path) -> bool:
    """Whether a picture has more than one colour."""
    return len(np.unique(imread(path)[..., :3].reshape(-1, 3), axis=0)) > 20


def test_strategies_without_times_and_without_loss(tmp_path: Path) -> None:
    rows = [strategy("stored", 4, 0.05), strategy("stored", 8, 0.0)]
    plot_strategies(rows, [], tmp_path / "a.png", title="$x$", caption="one")
    plot_strategies(rows[1:], [], tmp_path / "b.png", title="none", caption="nothing lost")
    assert is_drawn(tmp_path / "a.png")
    assert is_drawn(tmp_path / "b.png")


def test_sensitivity_of_a_single_cell(tmp_path: Path) -> None:
    def part(kind: str, name: str, kl: float) -> PartRow:
        return PartRow("rtn", kind, name, 4, kl, 1000, 1, 96)

    rows = [part("unit", "layer.0", 0.1), part("matrices", "q", 0.0), part("matrix", "layer.0.attn.c_proj", 1e-9)]
    plot_sensitivity(rows, tmp_path / "a.png", title="one", caption="cell")
    assert is_drawn(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0466, "47"), (0.00995, "10"), (0.0029, "2.9"), (0.00077, ".77"), (4.4e-5, ".044")]
)
def test_numbers_in_cells(value: float, text: str) -> None:
    assert _short(value) == text
