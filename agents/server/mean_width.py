"""The mean width of a step, for one step at a time: in Python, where a tensor operation would cost ten times more."""

from __future__ import annotations

from operator import mul

from torch import Tensor

from flexquant_rl.engine.model import NestedCausalLM


class MeanWidth:
    """`NestedCausalLM.mean_bit_width` of one vector; several a token are asked for.

    Args:
        model: Its units' weights count.
    """

    def __init__(self, model: NestedCausalLM) -> None:
        weights = model.unit_weights.double().tolist()
        self._shares = [weight / sum(weights) for weight in weights]

    def __call__(self, bit_widths: Tensor) -> float:
        """The mean of `[U]` widths over weights."""
        return float(sum(map(mul, self._shares, bit_widths.tolist())))
