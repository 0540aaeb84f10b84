"""The lean decoder: one sequence, one native call per token, for Llama, Mistral, Qwen2 and Qwen3 on the CPU.

It reads the same stored weights as the Hugging Face model that it was made from, but none of that model's code runs at
a step. In mode "float32" it gives that model's numbers to 1e-4; the default, "int8", rounds activations too.
`DecodeSession` remains the reference: any architecture, any number of rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexquant_rl.engine.decode import DecodeSession, StepOutput, check_bit_widths, check_max_length, check_room
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.model import NestedCausalLM, decoder_layers
from flexquant_rl.engine.weight_block import gather_weights
from flexquant_rl.kernels.native import MAX_TOKENS, Isa, Mode, choose_isa, load_library
from flexquant_rl.kernels.native_decoder import (
    DecoderWeights,
    LayerCache,
    LayerWeights,
    LinearWeights,
    NativeDecoder,
)

DecoderName = Literal["auto", "lean", "hf"]

LEAN_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on the position alone; the others change with the length of the sequence."""


def why_not_lean(model: NestedCausalLM) -> str | None:
    """Returns why a model cannot be decoded by `LeanDecoder`, in a few words, or None if it can.

    Raises:
        InputError: If `FQ_CPU_ISA` names a body that this machine cannot run.
    """
    reason = why_other_numbers(model.hf_model)
    if reason is not None:
        return reason
    if model.device.type != "cpu":
        return f"the model is on {model.device}, the native kernels are for the CPU"
    if load_library() is None:
        return "the native kernels could not be built"
    try:
        choose_isa(None)
    except ValueError as error:  # a body that this machine lacks was asked for by name
        raise InputError(str(error)) from error
    return None


def why_other_numbers(hf_model: Any) -> str | None:
    """What a model computes that the native step does not, in a few words, or None; looks at nothing large.

    A sliding window needs no entry: it bounds the context, so that no session is longer (`max_context`). Biases, tied
    heads and the factor of yarn are read from the modules. What a configuration holds beyond these (logit scaling, soft
    caps) transformers' classes of these four types ignore too.
    """
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


class LeanDecoder:
    """A model described to the native kernels; sessions share it.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 model on the CPU.
        max_length: Tokens that a sequence can hold; default: the model's context.
        num_threads: Threads of a step at most. 1 is the fastest below about 100 million weights.
        mode: "int8" (activations rounded to int8, one scale per 32 inputs) or "float32".
        isa: Body of the kernels; default: `FQ_CPU_ISA`, else the fastest.

    Raises:
        InputError: If the model is of another kind, `max_length` exceeds its context, or there is no native library.
    """

    def __init__(
        self,
        model: NestedCausalLM,
        *,
        max_length: int | None = None,
        num_threads: int = 1,
        mode: Mode = "int8",
        isa: Isa | None = None,
    ) -> None:
        reason = why_not_lean(model)
        if reason is not None:
            raise InputError(f"the lean decoder cannot run this model ({reason}); use decoder='hf'")
        max_length = check_max_length(max_length, model)
        gather_weights(model)
        self.model = model
        self.native = NativeDecoder(decoder_weights(model, max_length), num_threads=num_threads, mode=mode, isa=isa)

    @property
    def max_length(self) -> int:
        """Tokens that a sequence can hold."""
        return self.native.max_length


def open_session(
    model: NestedCausalLM,
    *,
    max_length: int | None = None,
    decoder: DecoderName = "auto",
    num_threads: int | None = None,
) -> DecodeSession | LeanSession:
    """Opens a session for one sequence: the lean decoder where it can run the model, else Hugging Face's modules.

    Args:
        model: The model.
        max_length: Tokens that the sequence can hold; default: the model's context.
        decoder: "lean" or "hf" insist on one of them.
        num_threads: Threads of a step, 1 to the number of processors; default: as `default_decoder` says. With
            Hugging Face's modules it is torch's number that is set, for the whole process.

    Raises:
        InputError: If `max_length` exceeds the context, "lean" was asked for and cannot run the model, or there are not
            as many processors.
    """
    if num_threads is not None:
        check_num_threads(num_threads)
    if decoder == "lean" or (decoder == "auto" and default_decoder(model)[0] == "lean"):
        return LeanSession(LeanDecoder(model, max_length=max_length, num_threads=num_threads or 1))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return DecodeSession(model, max_length=max_length)


def default_decoder(model: NestedCausalLM, num_threads: int | None = None) -> tuple[Literal["lean", "hf"], int]:
    """The decoder that `open_session` takes unless told otherwise, and the number of threads of its steps.

    Args:
        model: The model.
        num_threads: As given to `open_session`; None is 1 for the lean decoder and torch's number for the other.
    """
    if why_not_lean(model) is None:
        return "lean", num_threads or 1
    return "hf", num_threads or torch.get_num_threads()


def check_num_threads(num_threads: int) -> None:
    """Raises InputError unless there is a processor for each thread; more would wait for each other."""
    has_affinity = hasattr(os, "sched_getaffinity")
    num_processors = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if not 1 <= num_threads <= num_processors:
        raise InputError(
            f"threads={num_threads} must be within 1..{num_processors}, the processors of this machine; "
            "give e.g. --threads 1"
        )


def decoder_weights(model: NestedCausalLM, max_length: int) -> DecoderWeights:
    """Finds the parts of a Llama-family model under the names that Hugging Face gives them."""
    hf_model: Any = model.hf_model
    config: Any = hf_model.config.get_text_config()
    head_dim = _head_dim(config)
    positions = torch.arange(max_length)[None]
    cosine, sine = hf_model.model.rotary_emb(torch.zeros(1, 1), positions)
    half = head_dim // 2
    by_layer: dict[int, dict[str, int]] = {}
    for index, unit in enumerate(model.units):
        kinds = ("attention", "mlp") if unit.kind == "layer" else (unit.kind,)
        by_layer.setdefault(unit.layer_idx, {}).update(dict.fromkeys(kinds, index))
    layers = [_layer(layer, by_layer[index]) for index, layer in enumerate(decoder_layers(model.hf_model))]
    head = hf_model.get_output_embeddings()
    return DecoderWeights(
        layers=layers,
        embedding=_plain(model.embedding_matrix()),
        final_norm=_plain(hf_model.model.norm.weight),
        head=_linear(head),
        head_unit=by_layer[model.num_layers]["head"] if isinstance(head, NestedLinear) else -1,
        cosine=_plain(cosine[0, :, :half]),
        sine=_plain(sine[0, :, :half]),
        num_heads=int(config.num_attention_heads),
        num_key_value_heads=int(config.num_key_value_heads),
        head_dim=head_dim,
        norm_epsilon=float(config.rms_norm_eps),
        attention_scale=float(hf_model.model.layers[0].self_attn.scaling),
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


@dataclass
class _Row:
    """The state of one sequence."""

    cache: LayerCache
    length: int = 0


class LeanSession:
    """Decodes one sequence with a `LeanDecoder`; a drop-in for a one-row `DecodeSession`.

    Sessions of one decoder may be interleaved but not run at the same time.

    Args:
        decoder: The model.
    """

    def __init__(self, decoder: LeanDecoder) -> None:
        self._decoder = decoder
        self._row: _Row | None = _Row(decoder.native.new_cache())

    @property
    def model(self) -> NestedCausalLM:
        """The model behind the session."""
        return self._decoder.model

    @property
    def lengths(self) -> Tensor:
        """`[1]` int64 tokens held."""
        return torch.tensor([self._open().length])

    def prefill(
        self, prompt_ids: Tensor, *, rows: Tensor | None = None, bit_widths: Tensor | None = None
    ) -> StepOutput:
        """Restarts the sequence with a prompt, read 16 tokens at a time.

        Args:
            prompt_ids: `[1, T]` int64.
            rows: As for `DecodeSession`: None or row 0.
            bit_widths: `[U]` or `[1, U]` int64; default the largest stored width everywhere.

        Raises:
            InputError: If the prompt is empty or too long, or a width is not stored.
        """
        if len(prompt_ids) != 1 or (rows is not None and rows.tolist() != [0]):
            raise ValueError(
                f"{len(prompt_ids)} prompts were given, but a LeanSession holds one row; use DecodeSession"
            )
        if bit_widths is None:
            bit_widths = torch.full((self.model.num_units,), max(self.model.bit_widths))
        if prompt_ids.shape[1] == 0:
            raise InputError("the prompt is empty; at least one token is needed")
        row = self._open()
        check_room(prompt_ids.shape[1], 0, self._decoder.max_length)
        bit_widths = bit_widths.flatten()
        check_bit_widths(bit_widths, self.model.bit_widths, self.model.num_units)
        row.length = 0
        try:
            for chunk in prompt_ids[0].split(MAX_TOKENS):
                output = self._run(chunk, bit_widths)
        except BaseException:
            row.length = 0  # not half a prompt
            raise
        return output

    def step(self, bit_widths: Tensor, token_ids: Tensor) -> StepOutput:
        """Appends one token.

        Args:
            bit_widths: `[U]` or `[1, U]` int64; 0 reads the unquantised weights.
            token_ids: `[1]` int64.

        Raises:
            InputError: If the row is full or a width is not stored.
        """
        row = self._open()
        check_room(1, row.length, self._decoder.max_length)
        return self._run(token_ids, bit_widths if bit_widths.dim() == 1 else bit_widths.flatten())

    def score(self, token_ids: Tensor, bit_widths: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Teacher-forced logits of whole sequences: `DecodeSession.score`, in parallel over dense matrices."""
        scorer = DecodeSession(self.model, max_length=1)
        return scorer.score(token_ids, bit_widths, first=first)

    def fork(self) -> LeanSession:
        """An independent copy of the session, keys and values included."""
        row = self._open()
        twin = LeanSession.__new__(LeanSession)
        twin._decoder = self._decoder
        twin._row = _Row(row.cache.copy(row.length), row.length)
        return twin

    def close(self) -> None:
        """Frees the cache; any later call raises. Closing twice is fine."""
        self._row = None

    def _open(self) -> _Row:
        if self._row is None:
            raise RuntimeError("this LeanSession is closed")
        return self._row

    def _run(self, token_ids: Tensor, bit_widths: Tensor) -> StepOutput:
        row = self._open()
        try:
            result = self._decoder.native(row.cache, token_ids, row.length, bit_widths)
        except ValueError:
            # The native call refuses what is wrong without saying which: find out, at leisure.
            check_bit_widths(bit_widths, self.model.bit_widths, self.model.num_units)
            if not self.model.has_reference and bool((bit_widths == 0).any()):
                raise InputError(
                    "the unquantised weights were asked for (width 0), but this model holds nested weights only; "
                    "compare against its largest width, or load the original model"
                ) from None
            raise
        row.length += len(token_ids)
        return StepOutput(*result)
