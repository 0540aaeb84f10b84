"""How many tokens a model can attend to, by its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexquant_rl.engine.probe import rotations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flexquant_rl.engine.llama_tree import LlamaTree


def max_context(hf_model: PreTrainedModel | LlamaTree) -> int:
    """Tokens that a model can attend to; a sliding window, or the switch of longrope's factors, counts as the limit."""
    config = hf_model.config.get_text_config()
    limit = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 1 << 20)
    window = getattr(config, "sliding_window", None)
    return min(limit, int(window or limit), rotary_limit(config) or limit)


def rotary_limit(config: Any) -> int | None:
    """Where longrope takes other frequencies for all positions: keys that are held were rotated by the first ones."""
    limits = [
        rotation.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for rotation in rotations(config)
        if rotation["rope_type"] == "longrope"
    ]
    return min((int(limit) for limit in limits if limit), default=None)
