"""Perplexity of a nested model at every width: the quality of the format itself."""

from __future__ import annotations

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.linear import REFERENCE_WIDTH
from flexquant_rl.engine.model import NestedCausalLM


def perplexity(session: DecodeSession, windows: Tensor, bit_widths: Tensor) -> float:
    """`exp` of the mean negative log-likelihood in nats of all but the first token of each window `[n, T]`."""
    log_probs = session.score(windows[:, :-1], bit_widths).log_softmax(-1).cpu()
    return float(log_probs.gather(-1, windows[:, 1:, None]).double().mean().neg().exp())


def perplexity_by_width(model: NestedCausalLM, windows: Tensor) -> dict[str, float]:
    """Perplexity with every unit at the same width; `reference` is the unquantised model where it is kept.

    Args:
        model: The model.
        windows: `[n, T]` int64.
    """
    session = DecodeSession(model, max_length=windows.shape[1])
    widths = {str(b): b for b in model.bit_widths}
    if model.has_reference:
        widths["reference"] = REFERENCE_WIDTH
    return {name: perplexity(session, windows, torch.full((model.num_units,), b)) for name, b in widths.items()}
