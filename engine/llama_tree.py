"""The modules of a Llama-family model without Hugging Face's code: places for weights, under the same names.

The lean decoders read weights and run no module, so serving a model of theirs needs no more than this. It saves the
import of transformers' modelling code, which takes longer than everything else that a command does. `read_shape` takes
only configurations of which every entry is known to have no further effect; transformers loads the others. So does it
where a module is to be called: `hf_modules.full_model`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
_READ = {
    *_SIZES,
    *_TOKEN_IDS,
    *("architectures", "attention_bias", "head_dim", "hidden_act", "layer_types", "mlp_bias", "model_type"),
    *("rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings"),
    "use_sliding_window",
}
_WITHOUT_EFFECT = {
    *("_model_name_or_path", "_name_or_path", "attention_dropout", "dtype", "initializer_range", "is_llama_config"),
    *("max_window_layers", "pretraining_tp", "rope_interleaved", "torch_dtype", "transformers_version", "use_cache"),
    "use_mrope",
}
_ROPE_KEYS = {
    "default": {"rope_type", "rope_theta"},
    "llama3": {
        *("rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class LlamaShape:
    """What a configuration says about a model, under transformers' names.

    Attributes:
        entries: The configuration as it is stored, for `full_model`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    query_bias: bool
    output_bias: bool
    mlp_bias: bool
    entries: dict[str, Any]

    def get_text_config(self) -> LlamaShape:
        """Itself: the model has no other part."""
        return self


def read_shape(entries: dict[str, Any]) -> LlamaShape | None:
    """The shape that the entries of a config.json describe, or None where transformers must read them."""
    kind = entries.get("model_type")
    if kind not in _ARCHITECTURES or not entries.keys() <= _READ | _WITHOUT_EFFECT:
        return None
    if entries.get("architectures") not in (None, [], [f"{_ARCHITECTURES[kind]}ForCausalLM"]):
        return None
    rope = _rope(entries)
    if rope is None:
        return None
    num_heads, head_dim = entries.get("num_attention_heads"), entries.get("head_dim")
    flags = [entries.get(name, False) for name in ("attention_bias", "mlp_bias", "tie_word_embeddings")]
    well_formed = (
        all(_is_size(entries.get(name)) for name in _SIZES)
        and all(is_token_id(entries.get(name), several=name == "eos_token_id") for name in _TOKEN_IDS)
        and (entries.get("pad_token_id") or 0) < entries["vocab_size"]
        and all(isinstance(flag, bool) for flag in flags)
        and isinstance(entries.get("rms_norm_eps"), float)
        and entries.get("hidden_act") == "silu"
        and (_is_size(head_dim) or ("head_dim" not in entries and kind != "qwen3"))  # whose default is 128
        and not _has_window(kind, entries)
    )
    if not well_formed:
        return None
    head_dim = head_dim or entries["hidden_size"] // num_heads
    if entries["hidden_size"] % num_heads or num_heads % entries["num_key_value_heads"] or head_dim % 2:
        return None
    attention_bias, mlp_bias, is_tied = flags
    has_flag = kind in ("llama", "qwen3")
    return LlamaShape(
        model_type=kind,
        **{name: entries[name] for name in (*_SIZES, "rms_norm_eps")},
        head_dim=head_dim,
        rope_parameters=rope,
        tie_word_embeddings=is_tied,
        query_bias=attention_bias if has_flag else kind == "qwen2",
        output_bias=attention_bias and has_flag,
        mlp_bias=mlp_bias and kind == "llama",
        entries=entries,
    )


def is_token_id(value: Any, *, several: bool) -> bool:
    """Whether an entry is a token, none, or (if `several`) a list of tokens."""
    if several and isinstance(value, list):
        return all(is_token_id(item, several=False) for item in value)
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _has_window(kind: str, entries: dict[str, Any]) -> bool:
    """Whether attention may end before the beginning of a text."""
    if kind == "mistral":  # whose default is a window
        return entries.get("sliding_window", 4096) is not None or "layer_types" in entries
    if kind == "llama":  # which has none of the three, so they are of some other model
        return any(name in entries for name in ("sliding_window", "use_sliding_window", "layer_types"))
    full = ["full_attention"] * entries["num_hidden_layers"]
    return entries.get("use_sliding_window", False) is not False or entries.get("layer_types") not in (None, full)


def _rope(entries: dict[str, Any]) -> dict[str, Any] | None:
    """The rotation as transformers writes it since 5.0, from either way to write it; None if it is another."""
    found = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    if not isinstance(found, dict) or (entries.get("rope_scaling") and entries.get("rope_parameters")):
        return None
    rope = {"rope_theta": entries.get("rope_theta", 10_000.0), "rope_type": "default", **found}
    if not isinstance(rope["rope_type"], str) or rope.keys() != _ROPE_KEYS.get(rope["rope_type"]):
        return None
    numbers = [value for name, value in rope.items() if name != "rope_type"]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in numbers):
        return None
    if rope["rope_type"] == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        return None
    return rope


class LlamaTree(nn.Module):
    """The tree of modules of a causal LM without storage, to be filled; a call of it is `hf_modules.full_model`'s.

    Args:
        shape: What to build.
        generation: The entries of its generation_config.json; None without one.
    """

    def __init__(self, shape: LlamaShape, generation: dict[str, Any] | None) -> None:
        super().__init__()
        self.config = shape
        self.generation = generation
        self.model = _Body(shape)
        self.lm_head = _linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.embed_tokens.weight.device
        return device

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The tokens that end a text: those of the generation configuration, if there is one."""
        ends: int | list[int] | None = (self.config.entries if self.generation is None else self.generation).get(
            "eos_token_id"
        )
        return ends

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head


class _Body(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        # Not nn.Embedding(...): its initialisation imports torch's compiler where there is no storage.
        place = torch.empty(shape.vocab_size, shape.hidden_size, dtype=torch.float32, device="meta")
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(place)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = _Norm(shape.hidden_size)
        self.rotary_emb = _Rotary(shape)


class _Layer(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _Mlp(shape)
        self.input_layernorm = _Norm(shape.hidden_size)
        self.post_attention_layernorm = _Norm(shape.hidden_size)


class _Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.scaling = shape.head_dim**-0.5
        query_size, key_size = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = _linear(shape.hidden_size, query_size, bias=shape.query_bias)
        self.k_proj = _linear(shape.hidden_size, key_size, bias=shape.query_bias)
        self.v_proj = _linear(shape.hidden_size, key_size, bias=shape.query_bias)
        self.o_proj = _linear(query_size, shape.hidden_size, bias=shape.output_bias)
        if shape.model_type == "qwen3":
            self.q_norm, self.k_norm = _Norm(shape.head_dim), _Norm(shape.head_dim)


class _Mlp(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = _linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = _linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = _linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)


def _linear(num_inputs: int, num_outputs: int, *, bias: bool) -> nn.Linear:
    return nn.Linear(num_inputs, num_outputs, bias=bias, dtype=torch.float32, device="meta")


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32, device="meta"), requires_grad=False)


class _Rotary(nn.Module):
    """Cosines and sines of positions; operation for operation what transformers computes, so that no bit differs."""

    inv_freq: Tensor

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        rope, dim = shape.rope_parameters, shape.head_dim
        inv_freq = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        if rope["rope_type"] == "llama3":
            inv_freq = _llama3(inv_freq, rope)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions`: `[R, T]` -> two of `[R, T, head_dim]` in the dtype of `x`."""
        angles = positions[..., None].float() * self.inv_freq.to(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _llama3(inv_freq: Tensor, rope: dict[str, Any]) -> Tensor:
    """Slows the frequencies whose waves are long against the context of the first training."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    slowed = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    between = ~(wavelength < context / high) * ~(wavelength > context / low)
    return torch.where(between, (1 - smooth) * slowed / factor + smooth * slowed, slowed)
