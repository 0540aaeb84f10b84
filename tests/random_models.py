"""Random models in which nothing is trivial."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


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


_SMALL: dict[str, Any] = {
    **{"vocab_size": 128, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64},
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **{"num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "dropout": 0.0, "encoder_layers": 2},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""Sizes under all the names that configurations have for them."""


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of any architecture of transformers at two layers of width 32 and 128 tokens."""
    config_class = CONFIG_MAPPING[model_type]
    standard = config_class()
    sizes = {
        name: value
        for name, value in _SMALL.items()
        if hasattr(standard, name)
        and not isinstance(getattr(config_class, name, None), property)
        and not isinstance(getattr(standard, name), list | tuple)
    }
    return config_class(**(sizes | changes))


def tiny_causal_lm(config: PreTrainedConfig, *, scale: float = 0.2) -> PreTrainedModel:
    """A float32 causal LM whose weights are large enough for attention and logits to matter; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)
    return model
