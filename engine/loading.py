"""Plain models from directories, hub names and .gguf files: Hugging Face's modules, or what serving needs of one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from flexquant_rl.engine.errors import InputError, first_line
from flexquant_rl.engine.files import read_json
from flexquant_rl.engine.hf_modules import fill, stored_tensors
from flexquant_rl.engine.hub import snapshot_config, snapshot_weights
from flexquant_rl.engine.llama_tree import LlamaTree, is_token_id, read_shape
from flexquant_rl.engine.plain_model import (
    check_directory,
    check_loaded,
    check_no_state,
    check_stored,
    check_vocabulary,
    weight_files,
)
from flexquant_rl.engine.token_text import TokenText, read_text

if TYPE_CHECKING:  # its modelling code takes seconds to import, and serving needs none of it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERATION_FILE = "generation_config.json"
GGUF_SUFFIX, _GGUF_MAGIC = ".gguf", b"GGUF"


def load_causal_lm(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads an unquantised causal LM in float32 from a directory or, by name, from the hub; or a .gguf file's values.

    Raises:
        InputError: If it is missing, not a causal LM, incomplete, quantised already or unreadable.
    """
    hf_model, tokenizer = _load(path, as_tree=False)
    assert not isinstance(hf_model, LlamaTree)
    assert not isinstance(tokenizer, TokenText)
    return hf_model, tokenizer


def load_for_serving(path: str) -> tuple[PreTrainedModel | LlamaTree, PreTrainedTokenizerBase | TokenText]:
    """`load_causal_lm`, without transformers where the model can be served without it."""
    return _load(path, as_tree=True)


def is_hub_name(path: str) -> bool:
    """Whether a model's name can only be one on the hub: nothing here is called so, and it is no path by its form."""
    is_path = path.startswith((".", "/", "~")) or path.endswith(GGUF_SUFFIX) or path.count("/") > 1
    return not is_path and not Path(path).exists()


def local_model(path: str) -> Path:
    """Where a model's files are: its directory or .gguf file, or of a hub name the downloaded one, weights included.

    Raises:
        InputError: If a name is not known, or the hub cannot be asked.
    """
    if not is_hub_name(path):
        return Path(path)
    directory = snapshot_config(path)
    snapshot_weights(path, directory)
    return directory


def _load(path: str, *, as_tree: bool) -> tuple[PreTrainedModel | LlamaTree, PreTrainedTokenizerBase | TokenText]:
    if path.endswith(GGUF_SUFFIX):
        return _load_gguf(path)
    is_name = is_hub_name(path)
    directory = snapshot_config(path) if is_name else Path(path)
    entries = check_directory(path, directory)
    tree = empty_tree(directory, entries) if as_tree else None
    if tree is None:
        from transformers import AutoConfig

        check_no_state(path, _from_files(path, AutoConfig, directory))
    # Before the weights: it takes less time.
    tokenizer = _tokenizer(path, directory, entries.get("model_type") if as_tree else None)
    if is_name:
        snapshot_weights(path, directory)
    files = weight_files(path, directory)
    check_stored(path, files)
    loaded = tree if tree is not None and _fill_from(files, tree) else _hf_model(path, directory)
    check_vocabulary(path, tokenizer, loaded)
    return loaded.eval(), tokenizer


def _load_gguf(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a .gguf file; transformers turns its blocks into the values that they stand for."""
    file = Path(path)
    check_gguf(file)
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import quantization_config

    options: dict[str, Any] = {"gguf_file": file.name}
    check_no_state(path, _from_files(path, AutoConfig, file.parent, **options))
    tokenizer: PreTrainedTokenizerBase = _from_files(f"{path}: its tokenizer", AutoTokenizer, file.parent, **options)
    if hasattr(quantization_config, "GgufConfig"):  # older releases keep no blocks
        options["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    hf_model = _hf_model(path, file.parent, use_safetensors=None, **options)
    embedding: Any = hf_model.get_input_embeddings()
    tokenizer = _of_the_file(tokenizer, int(embedding.weight.shape[0]))
    check_vocabulary(path, tokenizer, hf_model)
    return hf_model.eval(), tokenizer


def _of_the_file(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a .gguf file without what transformers adds to its vocabulary, <|endoftext|> above all.

    Args:
        tokenizer: As transformers made it.
        num_rows: Rows of the embedding; tokens beyond it are not the file's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or max(tokenizer.get_vocab().values(), default=0) < num_rows:
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    stored = json.loads(backend.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < num_rows]
    reduced = Tokenizer.from_str(json.dumps(stored))
    vocabulary = reduced.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if str(token) in vocabulary}
    plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=reduced, chat_template=tokenizer.chat_template, **special
    )
    return plain


def check_gguf(file: Path) -> None:
    """Raises InputError unless a .gguf file is there, begins as one does, and can be read here."""
    if not file.is_file():
        raise InputError(f"{file} is not a file; give the path of a .gguf file")
    with file.open("rb") as stream:
        if stream.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise InputError(f"{file} does not begin as a .gguf file does; download it again (git-lfs: `git lfs pull`)")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f'{file}: .gguf files need {" and ".join(missing)}; install the extra: pip install "flexquant-rl[gguf]"'
        )


def empty_tree(directory: Path, entries: dict[str, Any]) -> LlamaTree | None:
    """The modules that a directory with this config.json describes, without storage; None if transformers must say."""
    shape = read_shape(entries)
    generation = None
    if (directory / GENERATION_FILE).is_file():
        try:
            generation = read_json(directory / GENERATION_FILE)
        except (OSError, ValueError):
            return None
        if not isinstance(generation, dict) or not is_token_id(generation.get("eos_token_id"), several=True):
            return None
    return None if shape is None else LlamaTree(shape, generation)


def _fill_from(files: Sequence[Path], tree: LlamaTree) -> bool:
    """Reads the weights of a tree; False, and nothing read, unless the files hold its tensors and no others."""
    shapes = {name: list(place.shape) for name, place in stored_tensors(tree).items()}
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            found |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
        if {name: part.get_shape() for name, part in found.items()} != shapes:
            return False
        # Copies: what safetensors returns is mapped from the file and would change with it.
        tensors: dict[str, Tensor] = {name: part[:].to(torch.float32, copy=True) for name, part in found.items()}
    fill(tree, tensors)
    return True


def _hf_model(path: str, directory: Path, **options: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    hf_model: PreTrainedModel
    hf_model, info = _from_files(
        path,
        AutoModelForCausalLM,
        directory,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the information, and refused by name
        **({"use_safetensors": True} | options),
    )
    check_loaded(path, hf_model, info)
    return hf_model


def load_tokenizer(directory: Path, model_type: Any) -> PreTrainedTokenizerBase | TokenText:
    """The tokenizer in the directory of a model; whatever transformers raises where there is none.

    Args:
        directory: The directory.
        model_type: The model's, or None for a tokenizer of transformers in any case.
    """
    text = read_text(directory, model_type)
    if text is not None:
        return text
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        directory, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


def _tokenizer(path: str, directory: Path, model_type: Any) -> PreTrainedTokenizerBase | TokenText:
    try:
        return load_tokenizer(directory, model_type)
    except Exception as error:  # as _from_files
        raise _unloadable(f"{path}: its tokenizer", "", error) from error


def _from_files(path: str, kind: Any, directory: Path, **options: Any) -> Any:
    """`kind.from_pretrained`, whatever it raises as an InputError."""
    try:
        return kind.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # transformers and safetensors raise a dozen types for a bad directory
        raise _unloadable(path, " as a causal LM", error) from error


def _unloadable(what: str, where: str, error: Exception) -> InputError:
    if "trust_remote_code" in str(error):
        return InputError(
            f"{what} needs code of its own, which is never run; use a model that transformers itself knows"
        )
    reason = first_line(error)
    if "above report" in reason:  # which nobody sees
        reason = "its tensors are not those of this architecture"
    return InputError(f"{what} cannot be loaded{where} ({reason}); check the directory or name")
