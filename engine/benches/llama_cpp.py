"""llama.cpp as a peer of benchmarks: the same weights as GGUF, decoded through llama-cpp-python's C bindings.

Both packages are optional (`pip install 'flexquant-rl[bench]'`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from flexquant_rl.engine.checkpoint import is_nested_model
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import NestedCausalLM

GgufType = Literal["F32", "F16", "Q8_0", "Q4_0"]

GGUF_BITS: dict[GgufType, float] = {"Q4_0": 4.5, "Q8_0": 8.5}
"""Bits per weight of the quantised types: codes and one fp16 scale per 32."""
NOT_INSTALLED = "llama.cpp: not measured (it is not installed; pip install 'flexquant-rl[bench]' adds it)"
_BLOCK = 32
_INTERLEAVED = {"llama": True, "qwen2": False}
"""Architectures that are written: whether llama.cpp rotates neighbouring rows of a head, where Hugging Face rotates the
halves."""


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python and gguf are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


@functools.cache
def silence() -> object:
    """Keeps llama.cpp from writing to stderr; what is returned must live as long as the process: C calls it."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def check_writable(hf_model: PreTrainedModel, gguf_type: GgufType = "F16") -> None:
    """Raises InputError unless `write_gguf` can write a model at a type."""
    config: Any = hf_model.config
    kind = config.model_type
    if kind not in _INTERLEAVED:
        raise InputError(f"model_type={kind!r} cannot be written as GGUF here; use a {' or '.join(_INTERLEAVED)} model")
    rope = config.rope_parameters.get("rope_type", "default")
    if rope != "default":
        raise InputError(f"rope_type={rope!r} cannot be written as GGUF here; use a model with plain rotary embedding")
    if config.hidden_act != "silu":
        raise InputError(f"hidden_act={config.hidden_act!r} is not what llama.cpp computes for {kind}, which is silu")
    if getattr(config, "use_sliding_window", False):
        raise InputError("use_sliding_window=true: llama.cpp attends to all tokens; use a model without a window")
    if gguf_type not in GGUF_BITS:
        return
    for tensor in gguf_tensors(hf_model):
        length = tensor.parameter.shape[-1]
        if tensor.parameter.dim() == 2 and length % _BLOCK:
            raise InputError(
                f"{tensor.name} has rows of {length}, which {gguf_type} cannot hold: its blocks are of {_BLOCK}; use a "
                f"model whose rows are multiples of {_BLOCK}"
            )


def check_reference(hf_model: PreTrainedModel, model: NestedCausalLM, name: str) -> None:
    """Raises InputError unless a model has the sizes of the nested one that is said to be made from it."""
    config: Any = hf_model.config
    if (config.vocab_size, config.num_hidden_layers) != (model.vocab_size, model.num_layers):
        raise InputError(
            f"--reference {name} has {config.num_hidden_layers} layers and {config.vocab_size} tokens, the nested "
            f"checkpoint {model.num_layers} and {model.vocab_size}; name the model that it was made from"
        )


def named_peer(
    name: str,
    reference: str | None,
    model: NestedCausalLM,
    gguf_type: GgufType,
    progress: Callable[[str], None],
) -> PreTrainedModel | None:
    """The unquantised weights of a model that is named; None, and a line why, where llama.cpp is not measured.

    Args:
        name: The model that is timed, as commands name it.
        reference: The model that it was made from, where it is a nested checkpoint.
        model: The nested weights.
        gguf_type: A type that they will be written at.
        progress: Takes the line.

    Raises:
        InputError: If a model cannot be read, or is of other sizes than the nested one.
    """
    if not has_llama_cpp():
        progress(NOT_INSTALLED)
        return None
    source = resolve_model(reference or name)
    if reference is None and is_nested_model(source):
        progress("llama.cpp: not measured (name the model that the checkpoint was made from with --reference)")
        return None
    hf_model, _ = load_causal_lm(source)
    check_reference(hf_model, model, source)
    try:
        check_writable(hf_model, gguf_type)
    except InputError as error:
        progress(f"llama.cpp: not measured ({error})")
        return None
    return hf_model


def write_gguf(hf_model: PreTrainedModel, path: Path, gguf_type: GgufType) -> None:
    """Writes a Llama or Qwen2 as GGUF without a vocabulary, every matrix at one type, embeddings and head included.

    llama.cpp's own conversion keeps the head of a Q4_0 model at 6 bits. Here it has 4, as ours has at width 4, so that
    the two read about the same number of bytes.

    Args:
        hf_model: Weights of any floating-point type, tied head or not.
        path: File to write.
        gguf_type: Type of the matrices; norms and biases are float32.

    Raises:
        InputError: If the model is of another kind, or its rows are not whole blocks of a quantised type.
    """
    import gguf

    check_writable(hf_model, gguf_type)
    config: Any = hf_model.config
    kind = gguf.GGMLQuantizationType[gguf_type]
    writer = gguf.GGUFWriter(path, config.model_type)
    head_dim = _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if gguf_type == "F32" else f"MOSTLY_{gguf_type}"])
    for tensor in gguf_tensors(hf_model):
        array = tensor.stored().float().contiguous().numpy()
        stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else kind
        writer.add_tensor(tensor.name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class GgufTensor(NamedTuple):
    """A tensor of a model and its place in a file.

    Attributes:
        name: In the file.
        module: Whose it is in the model; of an embedding that is the head too: the head.
        parameter: The model's.
        num_heads: Heads whose rows the file has interleaved; 0: the rows are as they are.
    """

    name: str
    module: str
    parameter: Tensor
    num_heads: int = 0

    def stored(self) -> Tensor:
        """The values in the order of the file.

        llama.cpp rotates neighbouring rows of a head together, Hugging Face row i and row i + head_dim / 2.
        """
        if not self.num_heads:
            return self.parameter.detach()
        rows = self.parameter.detach().view(self.num_heads, 2, -1, *self.parameter.shape[1:])
        return rows.transpose(1, 2).reshape(self.parameter.shape)

    def restored(self, values: Tensor) -> Tensor:
        """Values in the order of a file in the order of the model."""
        if not self.num_heads:
            return values
        rows = values.view(self.num_heads, -1, 2, *values.shape[1:])
        return rows.transpose(1, 2).reshape(values.shape)


def gguf_tensors(hf_model: PreTrainedModel) -> Iterator[GgufTensor]:
    """All tensors of a file; a tied head has none of its own, llama.cpp takes the embedding."""
    config: Any = hf_model.config
    model: Any = hf_model.model
    head: Any = hf_model.get_output_embeddings()
    names: dict[Any, str] = {module: name for name, module in hf_model.named_modules()}
    is_tied = head.weight is model.embed_tokens.weight
    yield GgufTensor("token_embd.weight", names[head if is_tied else model.embed_tokens], model.embed_tokens.weight)
    yield GgufTensor("output_norm.weight", names[model.norm], model.norm.weight)
    if not is_tied:
        yield GgufTensor("output.weight", names[head], head.weight)
    interleaved = _INTERLEAVED[config.model_type]
    for index, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for place, module, num_heads in (
            ("attn_norm", layer.input_layernorm, 0),
            ("ffn_norm", layer.post_attention_layernorm, 0),
            ("attn_q", attention.q_proj, config.num_attention_heads * interleaved),
            ("attn_k", attention.k_proj, config.num_key_value_heads * interleaved),
            ("attn_v", attention.v_proj, 0),
            ("attn_output", attention.o_proj, 0),
            ("ffn_gate", mlp.gate_proj, 0),
            ("ffn_up", mlp.up_proj, 0),
            ("ffn_down", mlp.down_proj, 0),
        ):
            for part, parameter in module.named_parameters():
                yield GgufTensor(f"blk.{index}.{place}.{part}", names[module], parameter, num_heads)


class LlamaCppSession:
    """Decodes one sequence with llama.cpp on the CPU.

    Args:
        path: GGUF file.
        max_length: Tokens of the sequence.
        num_threads: Threads of a pass.
    """

    def __init__(self, path: Path, *, max_length: int, num_threads: int) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        silence()
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_length
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {max_length} tokens for {path}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def prefill(self, prompt_ids: Sequence[int]) -> NDArray[np.float32]:
        """Starts anew with a prompt and returns the logits after it, `[vocab]`, valid until the next call."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return self._decode(prompt_ids)

    def step(self, token_id: int) -> NDArray[np.float32]:
        """Appends a token and returns the logits after it, as `prefill` does."""
        return self._decode((token_id,))

    def extend(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens in one batch and returns the logits after each, `[M, vocab]`, valid until the next call."""
        lib = self._lib
        start = lib.llama_memory_seq_pos_max(lib.llama_get_memory(self._context), 0) + 1
        batch = lib.llama_batch_init(len(token_ids), 0, 1)
        try:
            batch.n_tokens = len(token_ids)
            for index, token_id in enumerate(token_ids):
                batch.token[index], batch.pos[index], batch.logits[index] = token_id, start + index, 1
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            self._decode_batch(batch, len(token_ids))
        finally:
            lib.llama_batch_free(batch)
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape=(len(token_ids), self._vocab))

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, length, -1)

    def close(self) -> None:
        """Frees model and context; closing twice is fine."""
        if self._context:
            self._lib.llama_free(self._context)
            self._lib.llama_model_free(self._model)
            self._context = self._model = None

    def _decode(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        tokens = (self._lib.llama_token * len(token_ids))(*token_ids)
        self._decode_batch(self._lib.llama_batch_get_one(tokens, len(token_ids)), len(token_ids))
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), shape=(self._vocab,))

    def _decode_batch(self, batch: Any, num_tokens: int) -> None:
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp failed to decode {num_tokens} tokens: status {status}")
