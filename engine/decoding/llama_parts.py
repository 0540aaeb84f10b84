"""Where the parts of a Llama-family model are, by Hugging Face's names, and what else a model may compute.

The CPU's lean decoder and the GPU's captured loop both read a model through this description.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.llama_tree import LlamaTree
from flexquant_rl.engine.model import NestedCausalLM, decoder_layers
from flexquant_rl.kernels.native_decoder import DecoderWeights, LayerWeights, LinearWeights

LEAN_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on the position alone; the others change with the length of the sequence."""


def why_other_numbers(hf_model: Any) -> str | None:
    """What a model computes that the native step does not, in a few words, or None; looks at nothing large.

    A sliding window needs no entry: it bounds the context, so that no session is longer (`max_context`). Biases, tied
    heads and the factor of yarn are read from the modules. What a configuration holds beyond these (logit scaling, soft
    caps) transformers' classes of these four types ignore too.
    """
    if isinstance(hf_model, LlamaTree):  # which holds no other model
        return None
    config = hf_model.config.get_text_config()
    kind = config.model_type
    if kind not in LEAN_MODEL_TYPES:
        return f"model_type={kind!r} is not one of {', '.join(LEAN_MODEL_TYPES)}"
    # A model of images and text may hold one of the four; a subclass may do anything.
    if type(hf_model).__module__ != f"transformers.models.{kind}.modeling_{kind}":
        return f"{type(hf_model).__name__} is not the {kind} of transformers itself"
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act={config.hidden_act!r} is not 'silu'"
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        return f"rope_type={rope_type!r} is not one of {', '.join(_ROPE_TYPES)}"
    rotated, head_dim = 2 * len(hf_model.model.rotary_emb.inv_freq), _head_dim(config)
    if rotated != head_dim:
        return f"it rotates {rotated} of {head_dim} dimensions of a head, not all"
    known = {"full_attention", "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}
    others = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if others:
        return f"layer_types holds {others[0]!r}" + (" without a window" if others[0] == "sliding_attention" else "")
    if len({layer.self_attn.scaling for layer in hf_model.model.layers}) > 1:
        return "its layers scale attention differently"
    for name, module in hf_model.model.layers.named_modules():
        if name.endswith("_proj") and type(module) not in (NestedLinear, nn.Linear):
            return f"layers.{name} is a {type(module).__name__}, not a plain linear"
    return None


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def decoder_weights(model: NestedCausalLM, max_length: int) -> DecoderWeights:
    """Finds the parts of a Llama-family model under the names that Hugging Face gives them."""
    tree: Any = model.tree
    config: Any = tree.config.get_text_config()
    head_dim = _head_dim(config)
    positions = torch.arange(max_length)[None]
    cosine, sine = tree.model.rotary_emb(torch.zeros(1, 1, dtype=torch.float32), positions)
    half = head_dim // 2
    by_layer: dict[int, dict[str, int]] = {}
    for index, unit in enumerate(model.units):
        kinds = ("attention", "mlp") if unit.kind == "layer" else (unit.kind,)
        by_layer.setdefault(unit.layer_idx, {}).update(dict.fromkeys(kinds, index))
    layers = [_layer(layer, by_layer[index]) for index, layer in enumerate(decoder_layers(model.tree))]
    head = tree.get_output_embeddings()
    return DecoderWeights(
        layers=layers,
        embedding=_plain(model.embedding_matrix()),
        final_norm=_plain(tree.model.norm.weight),
        head=_linear(head),
        head_unit=by_layer[model.num_layers]["head"] if isinstance(head, NestedLinear) else -1,
        cosine=_plain(cosine[0, :, :half]),
        sine=_plain(sine[0, :, :half]),
        num_heads=int(config.num_attention_heads),
        num_key_value_heads=int(config.num_key_value_heads),
        head_dim=head_dim,
        norm_epsilon=float(config.rms_norm_eps),
        attention_scale=float(tree.model.layers[0].self_attn.scaling),
        num_units=model.num_units,
    )


def _layer(layer: Any, unit_of: dict[str, int]) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerWeights(
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        output=_linear(attention.o_proj),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        attention_norm=_plain(layer.input_layernorm.weight),
        mlp_norm=_plain(layer.post_attention_layernorm.weight),
        query_norm=None if query_norm is None else _plain(query_norm.weight),
        key_norm=None if key_norm is None else _plain(key_norm.weight),
        attention_unit=unit_of["attention"],
        mlp_unit=unit_of["mlp"],
    )


def _linear(module: NestedLinear | nn.Linear) -> LinearWeights:
    bias = None if module.bias is None else _plain(module.bias)
    if isinstance(module, NestedLinear):
        return LinearWeights(module.weight, module.reference_weight, bias)
    # Read by columns like every unquantised matrix: one copy, of a head that is not nested.
    return LinearWeights(None, _plain(module.weight.t()).t(), bias)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()
