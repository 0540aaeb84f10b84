"""Prompts on the GPU: Hugging Face's modules read them, and the captured passes go on from their keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexquant_rl.engine.decoding.kv_cache import RowCache, RowCacheLayer
from flexquant_rl.engine.model import NestedCausalLM


@dataclass(frozen=True, eq=False)
class Prompt:
    """What R prompts of T tokens leave behind.

    Attributes:
        keys_and_values: For each layer `[R, J, T, D]` each.
        logits: `[R, V]` float32, of the last token.
        residual_update: `[R, L]` float32, of each layer at the last token.
        crest: As `residual_update`.
    """

    keys_and_values: list[tuple[Tensor, Tensor]]
    logits: Tensor
    residual_update: Tensor
    crest: Tensor


def read_prompt(model: NestedCausalLM, prompt_ids: Tensor, bit_widths: Tensor) -> Prompt:
    """Reads prompts in one pass of Hugging Face's modules.

    Args:
        model: The model.
        prompt_ids: `[R, T]` int64.
        bit_widths: `[U]` int64.
    """
    num_rows, num_tokens = prompt_ids.shape
    cache = RowCache(model.num_layers, num_rows, num_tokens, model.device)
    positions, mask = cache.begin(num_tokens, None, restart=True)
    widths = bit_widths.expand(num_rows, num_tokens, -1)
    result = model.forward(prompt_ids.to(model.device), widths, keep=1, cache=cache, positions=positions, mask=mask)
    cache.commit()
    assert result.residual_update is not None and result.crest is not None
    pairs = []
    for layer in cache.layers:
        assert isinstance(layer, RowCacheLayer) and layer.keys is not None and layer.values is not None
        pairs.append((layer.keys, layer.values))
    return Prompt(pairs, result.logits[:, -1], result.residual_update[:, -1], result.crest[:, -1])
