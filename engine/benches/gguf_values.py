"""What llama.cpp's own quantiser makes of a model: its files, and the values that they stand for."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flexquant_rl.engine.benches.gguf_types import QuantiserType
from flexquant_rl.engine.benches.llama_cpp import gguf_tensors, silence


def quantise_gguf(source: Path, path: Path, quantiser_type: QuantiserType, *, num_threads: int = 1) -> None:
    """Quantises a file as llama.cpp does by itself: each tensor gets the type that its own rules give.

    A k-quant needs rows of a multiple of 256; other rows get a type with blocks of 32, mostly of more bits.

    Args:
        source: A file of `write_gguf` at F16 or F32.
        path: File to write.
        quantiser_type: What it is asked for.
        num_threads: Threads.

    Raises:
        RuntimeError: If llama.cpp fails.
    """
    import llama_cpp

    silence()
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = num_threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantiser_type}")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama.cpp failed to quantise {source.name} to {quantiser_type}: status {status}")


def read_values(path: Path, hf_model: PreTrainedModel) -> dict[str, int]:
    """Puts the values that a file stands for into a model.

    Args:
        path: A file that comes of `write_gguf` of the same model.
        hf_model: Its parameters are overwritten.

    Returns:
        Bytes of the weights of each module in the file, scales included.
    """
    import gguf

    stored: dict[str, Any] = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    num_bytes: dict[str, int] = {}
    with torch.no_grad():
        for tensor in gguf_tensors(hf_model):
            found = stored[tensor.name]
            values = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type), dtype=torch.float32)
            tensor.parameter.copy_(tensor.restored(values.reshape(tensor.parameter.shape)))
            if tensor.name.endswith(".weight"):
                num_bytes[tensor.module] = int(found.n_bytes)
    return num_bytes
