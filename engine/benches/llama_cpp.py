"""llama.cpp as a peer of the decode benchmark: the same weights as GGUF, decoded through llama-cpp-python's C bindings.

Both packages are optional (`pip install 'flexquant-rl[bench]'`).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaForCausalLM

GgufType = Literal["Q4_0", "Q8_0"]

GGUF_BITS: dict[GgufType, float] = {"Q4_0": 4.5, "Q8_0": 8.5}
"""Bits per weight: codes and one fp16 scale per 32."""


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python and gguf are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def write_gguf(hf_model: LlamaForCausalLM, path: Path, gguf_type: GgufType) -> None:
    """Writes a Llama as GGUF without a vocabulary, every matrix at one type, embeddings and head included.

    llama.cpp's own conversion keeps the head of a Q4_0 model at 6 bits. Here it has 4, as ours has at width 4, so that
    the two read about the same number of bytes.

    Args:
        hf_model: Plain rotary embedding, no biases; rows of a multiple of 32.
        path: File to write.
        gguf_type: Type of the matrices; norms are float32.
    """
    import gguf

    config: Any = hf_model.config
    kind = gguf.GGMLQuantizationType[gguf_type]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{gguf_type}"])
    for name, tensor in _gguf_tensors(hf_model):
        array = tensor.detach().float().contiguous().numpy()
        stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else kind
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(hf_model: LlamaForCausalLM) -> list[tuple[str, Tensor]]:
    config: Any = hf_model.config
    model: Any = hf_model.model
    tensors = [
        ("token_embd.weight", model.embed_tokens.weight),
        ("output_norm.weight", model.norm.weight),
        ("output.weight", hf_model.lm_head.weight),
    ]
    for index, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        tensors += [
            (f"blk.{index}.attn_norm.weight", layer.input_layernorm.weight),
            (f"blk.{index}.attn_q.weight", _interleave_halves(attention.q_proj.weight, config.num_attention_heads)),
            (f"blk.{index}.attn_k.weight", _interleave_halves(attention.k_proj.weight, config.num_key_value_heads)),
            (f"blk.{index}.attn_v.weight", attention.v_proj.weight),
            (f"blk.{index}.attn_output.weight", attention.o_proj.weight),
            (f"blk.{index}.ffn_norm.weight", layer.post_attention_layernorm.weight),
            (f"blk.{index}.ffn_gate.weight", mlp.gate_proj.weight),
            (f"blk.{index}.ffn_up.weight", mlp.up_proj.weight),
            (f"blk.{index}.ffn_down.weight", mlp.down_proj.weight),
        ]
    return tensors


def _interleave_halves(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp rotates neighbouring rows of a head together, Hugging Face row i and row i + head_dim / 2."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


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
        self._silence = llama_cpp.llama_log_callback(lambda level, text, user_data: None)  # kept: C calls it
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
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
        """Appends tokens in one batch and returns the logits after the last; those of all are computed."""
        lib = self._lib
        start = lib.llama_memory_seq_pos_max(lib.llama_get_memory(self._context), 0) + 1
        batch = lib.llama_batch_init(len(token_ids), 0, 1)
        try:
            batch.n_tokens = len(token_ids)
            for index, token_id in enumerate(token_ids):
                batch.token[index], batch.pos[index], batch.logits[index] = token_id, start + index, 1
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            return self._decode_batch(batch, len(token_ids))
        finally:
            lib.llama_batch_free(batch)

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
        return self._decode_batch(self._lib.llama_batch_get_one(tokens, len(token_ids)), len(token_ids))

    def _decode_batch(self, batch: Any, num_tokens: int) -> NDArray[np.float32]:
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp failed to decode {num_tokens} tokens: status {status}")
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), shape=(self._vocab,))
