"""What counts as a plain model, on disk and in memory, and how everything else is refused in one line.

Weights that look like a model's but are not, 8-bit codes beside their scales above all, would be read without a
complaint and give garbage. So only floating-point tensors pass, each of them used, in modules of exactly known types.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_json
from flexquant_rl.engine.hub import INDEX_FILE, WEIGHTS_FILE, indexed_files
from flexquant_rl.engine.linear import CONV1D, is_dense
from flexquant_rl.engine.llama_tree import LlamaTree
from flexquant_rl.engine.token_text import TokenText

if TYPE_CHECKING:  # its modelling code takes seconds to import, and serving needs none of it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Newer ForCausalLM, older LMHeadModel (GPT-2).
_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
_PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PLAIN_STORED = ("F32", "F16", "BF16", "F64")
_LFS_HEADER = b"version https://git-lfs.github.com/spec/"
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tokenizer_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ORIGINAL = "give the original model"
# What quantisers store beside or in place of a weight, by the end of its name.
_MARKS = {
    ".SCB": "bitsandbytes (8 bits)",
    ".weight_format": "bitsandbytes (8 bits)",
    ".absmax": "bitsandbytes (4 bits)",
    ".quant_map": "bitsandbytes (4 bits)",
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".g_idx": "gptq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "fp8 or compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".input_scale": "fp8 or compressed-tensors",
    ".codebooks": "aqlm",
    "_proj_blocks": "mxfp4",
    "_proj_scales": "mxfp4",
}
# In the names of layer types that keep a state; `hybrid` has both at once.
_STATES = ("mamba", "ssm", "conv", "recurrent", "linear_attention", "lightning", "delta", "rwkv", "lstm")
# They compute what nn.Linear does, term by term.
_LIKE_LINEAR = (CONV1D, "transformers.models.falcon.modeling_falcon.FalconLinear")


def check_directory(path: str, directory: Path) -> dict[str, Any]:
    """Checks what a model's files say before any weight is read.

    Args:
        path: What the user called the model.
        directory: Where it is.

    Returns:
        Its configuration.

    Raises:
        InputError: If it is no directory of a causal language model with plain weights and a tokenizer.
    """
    if not directory.is_dir():
        raise InputError(f"{path} is not a directory; pass a Hugging Face model directory or a hub name")
    check_no_pointers(directory)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise InputError(f"{path} has no config.json; pass a Hugging Face model directory")
    try:
        config = read_json(config_path)
    except ValueError as error:
        raise InputError(f"{config_path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(config, dict):
        raise InputError(f"{config_path} holds no JSON object; restore the file")
    _check_config(path, config)
    if not any(True for pattern in _TOKENIZER_FILES for _ in directory.glob(pattern)):
        raise InputError(
            f"{path} has no tokenizer (no tokenizer.json or tokenizer.model); copy the tokenizer files of the original "
            "model into it"
        )
    return config


def check_no_pointers(directory: Path) -> None:
    """Raises InputError if git left a pointer in place of one of the files of a directory."""
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_LFS_HEADER):
            raise InputError(f"{file} is a git-lfs pointer, not the file itself; run `git lfs pull` in {directory}")


def _check_config(path: str, config: dict[str, Any]) -> None:
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            raise InputError(f"{path}: already quantised by {_method(quantization)}; {_ORIGINAL}")
    kind = config.get("model_type")
    if "auto_map" in config and not _is_known(kind):
        raise InputError(
            f"{path} needs code of its own (model_type={kind!r}, auto_map in config.json), which is never run; use a "
            "model that transformers itself knows"
        )
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise InputError(f"{path}: architectures={architectures!r} in config.json must be a list; restore the file")
    if architectures and not any(str(name).endswith(_CAUSAL_SUFFIXES) for name in architectures):
        raise InputError(
            f"{path} is a {architectures[0]}, not a causal language model; a decoder that generates text is needed"
        )


def _is_known(kind: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def _method(quantization: Any) -> str:
    if not isinstance(quantization, dict):
        return str(getattr(quantization, "quant_method", None) or type(quantization).__name__)
    method = quantization.get("quant_method")
    if method is None:
        method = next((name for name in quantization if name.startswith("load_in_")), None)
        method = "an unnamed method" if method is None else "bitsandbytes"
    return str(getattr(method, "value", method))


def weight_files(path: str, directory: Path) -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        InputError: If there is none, or one that the index names is missing.
    """
    single, index_path = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if index_path.is_file():
        try:
            names = indexed_files(directory)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index_path} is damaged ({error!r}); download it again") from error
        missing = sorted(name for name in names if not (directory / name).is_file())
        if missing or not names:
            raise InputError(
                f"{path} lacks {len(missing)} of {len(names)} weight files, e.g. {(missing or ['all'])[0]}; download "
                "the model again"
            )
        return sorted(directory / name for name in names)
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        raise InputError(
            f"{path} holds its weights as {pickles[0]}, a pickle, which is never loaded; safetensors is needed: load "
            "it with transformers where you trust it and `save_pretrained` it again"
        )
    raise InputError(f"{path} has no weights (model.safetensors); download the model again")


def check_stored(path: str, files: Iterable[Path]) -> None:
    """Raises InputError if stored tensors are marked as codes of a quantiser, by dtype or by name; reads headers."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                stored = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: cannot be loaded as a causal LM, {file.name} is damaged or cut short ({error}); "
                "download the model again"
            ) from error
        marked = _quantiser(stored)
        if marked is not None:
            raise InputError(f"{path}: already quantised by {marked[0]} ({marked[1]} is stored); {_ORIGINAL}")
        for name, dtype in stored.items():
            # Masks and counters are stored as integers and booleans; a weight is not.
            if dtype.startswith(("F8_", "F6_", "F4")) or (
                dtype not in _PLAIN_STORED and name.endswith(("weight", "bias"))
            ):
                raise InputError(f"{path}: already quantised ({name} is stored as {dtype}); {_ORIGINAL}")


def _quantiser(names: Iterable[str]) -> tuple[str, str] | None:
    """Which quantiser left these names, and the name that says so."""
    found = list(names)
    for ending, quantiser in _MARKS.items():
        for name in found:
            if name.endswith(ending):
                return quantiser, name
    return None


def check_loaded(path: str, hf_model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raises InputError unless every tensor of the files is used as it is and none is missing.

    Args:
        path: What the user called the model.
        hf_model: The model.
        info: transformers' loading information. What it declares ignorable is not in it.
    """
    shapes = {str(key[0]): f" {list(key[1])}, not {list(key[2])}" for key in info.get("mismatched_keys", ())}
    missing = sorted({*map(str, info["missing_keys"]), *shapes})
    if missing:
        raise InputError(
            f"{path}: {len(missing)} tensors are missing or misshapen, e.g. {missing[0]}{shapes.get(missing[0], '')}; "
            "the checkpoint is incomplete: download the model again"
        )
    unexpected = sorted(map(str, info["unexpected_keys"]))
    if unexpected:
        raise InputError(
            f"{path}: {len(unexpected)} stored tensors have no place in this {type(hf_model).__name__} of "
            f"{hf_model.config.get_text_config().num_hidden_layers} layers, e.g. {unexpected[0]}; weights and "
            f"config.json must be of one model: {_ORIGINAL}"
        )


def check_no_state(path: str, config: Any) -> None:
    """Raises InputError if a model of this configuration keeps more than keys and values.

    Args:
        path: What the user called the model.
        config: transformers' configuration.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    others = sorted(str(kind) for kind in kinds if kind == "hybrid" or any(part in str(kind) for part in _STATES))
    model_class: Any = next((MODEL_FOR_CAUSAL_LM_MAPPING.get(type(part), None) for part in (config, text)), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if others or (not kinds and getattr(model_class, "_is_stateful", False)):
        what = f"layers of type {', '.join(others)}" if others else "recurrent layers"
        raise InputError(
            f"{path}: model_type={text.model_type!r} is a state-space, recurrent or hybrid model ({what}), whose state "
            "cannot be taken back as keys and values can; use a decoder whose layers are all attention"
        )


def check_weights(hf_model: PreTrainedModel | LlamaTree) -> None:
    """Raises InputError unless all weights of a model in memory are plain: known linears, floating-point tensors."""
    quantization = getattr(hf_model.config, "quantization_config", None)
    if quantization:
        raise InputError(f"{type(hf_model).__name__}: already quantised by {_method(quantization)}; {_ORIGINAL}")
    for name, module in hf_model.named_modules():
        kind = type(module)
        if is_dense(module) and kind is not nn.Linear and f"{kind.__module__}.{kind.__name__}" not in _LIKE_LINEAR:
            library = kind.__module__.partition(".")[0]
            if library == "transformers":
                raise InputError(
                    f"{name} is a {kind.__name__}, which computes more than nn.Linear does and cannot be nested; use a "
                    "model whose layers are made of plain linears"
                )
            raise InputError(
                f"{name} is a {kind.__name__}, not a plain nn.Linear: already quantised by {library}; {_ORIGINAL}"
            )
    for name, parameter in hf_model.named_parameters():
        holder = type(parameter) if type(parameter) is not nn.Parameter else type(parameter.detach())
        if holder is not Tensor or parameter.dtype not in _PLAIN_DTYPES:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise InputError(f"{name} is a {holder.__name__} of {dtype}: already quantised; {_ORIGINAL}")


def check_vocabulary(
    path: str, tokenizer: PreTrainedTokenizerBase | TokenText, hf_model: PreTrainedModel | LlamaTree
) -> None:
    """Raises InputError if a tokenizer has an id that the model has no embedding for.

    A placeholder for images or sound that a text model shares with its larger sibling (Gemma 3) is no token of a text.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if not vocabulary:
        raise InputError(
            f"{path}: the tokenizer knows no token; copy the tokenizer files of the original model into it"
        )
    placeholders = {str(getattr(tokenizer, f"{kind}_token", None)) for kind in ("image", "audio", "video")}
    largest = max((id_ for token, id_ in vocabulary.items() if token not in placeholders), default=0)
    embedding: Any = hf_model.get_input_embeddings()
    num_rows = int(embedding.weight.shape[0])
    if largest >= num_rows:
        raise InputError(
            f"{path}: the tokenizer's ids go up to {largest}, but the model's embedding ends at {num_rows - 1}; give "
            "model and tokenizer that belong together"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises InputError naming the tensor if it holds NaN or infinite values."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{name} holds {count} NaN or infinite values; weights must be finite: repair the checkpoint")
