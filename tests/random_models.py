"""Random models in which nothing is trivial."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def random_model(model_class: type[Any], config: Any, *, seed: int) -> PreTrainedModel:
    """A float32 model whose norms and biases are not all ones and zeros; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model
