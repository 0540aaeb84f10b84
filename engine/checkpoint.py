"""Nested checkpoints: a Hugging Face directory of bitplanes in which every byte that is read back is verified.

`config.json` (with `quantization_config`), `model.safetensors`, the tokenizer's files and `manifest.json`, which holds
shape, dtype and sha256 of every tensor and the sha256 of every other file. What the directory must hold follows from
config.json alone; the manifest says whether it is what was written.

A program that knows the model and not the format would fill the nested linears with random weights. So config.json also
has an entry that transformers reads as the name of the weights' file, and that says what to do instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError, first_line
from flexquant_rl.engine.files import file_sha256, new_directory, read_json, write_json, write_tensors
from flexquant_rl.engine.freed_memory import return_freed_memory
from flexquant_rl.engine.hf_modules import empty_causal_lm, fill, stored_tensors
from flexquant_rl.engine.hub import snapshot_config
from flexquant_rl.engine.linear import DenseCache, NestedLinear, dense_cache_bytes, is_dense
from flexquant_rl.engine.llama_tree import LlamaTree
from flexquant_rl.engine.loading import (
    GENERATION_FILE,
    empty_tree,
    is_hub_name,
    load_causal_lm,
    load_for_serving,
    load_tokenizer,
    local_model,
)
from flexquant_rl.engine.model import NestedCausalLM, Unit, make_units
from flexquant_rl.engine.nesting import Progress, check_units, nest, unseen
from flexquant_rl.engine.plain_model import check_no_pointers, check_vocabulary
from flexquant_rl.engine.quantisation.calibration import Calibration
from flexquant_rl.engine.quantisation.config import QuantizationConfig, Tuning
from flexquant_rl.kernels.bitplane import NUM_PLANES, WORD_BITS, NestedWeight, padded_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINT_VERSION = 1
"""Raised with every change of the format; checkpoints of another version are refused."""

QUANT_METHOD = "flexquant"
BIT_ORDER = "8c+t"  # bit 8c+t of a word is its input 4t+c (kernels/bitplane.py)
CONFIG_FILE, TENSORS_FILE, MANIFEST_FILE = "config.json", "model.safetensors", "manifest.json"
WEIGHTS_ENTRY = "transformers_weights"
"""Where transformers looks for the name of another file of weights in config.json."""
WEIGHTS_NOTE = "none, because the weights are nested bitplanes; `import flexquant_rl` before they are loaded"
"""What it finds there, and says, in a process that has not imported this package."""
_COPY_AGAIN = "copy or quantise the checkpoint again"


def save_checkpoint(model: NestedCausalLM, out: Path) -> int:
    """Writes a nested model; nothing is left behind if that fails or is interrupted.

    Tensors that are not nested are stored in half the bytes where bfloat16 or float16 holds every value exactly.

    Args:
        model: The model. Its unquantised reference weights are not stored.
        out: Directory to create.

    Returns:
        Bytes written.

    Raises:
        InputError: If `out` exists and is not an empty directory.
    """
    with new_directory(out) as directory:
        model.tokenizer.save_pretrained(directory)
        tokenizer_files = [path for path in directory.rglob("*") if path.is_file()]
        return write_model(model, directory, tokenizer_files)


def write_model(model: NestedCausalLM, directory: Path, others: Iterable[Path] = ()) -> int:
    """Writes the files of a checkpoint but for the tokenizer's, the manifest last, over those that are there.

    Args:
        model: The model.
        directory: Where they go.
        others: Files of the directory that the manifest lists too.

    Returns:
        Bytes of all these files.
    """
    tensors = {
        name: _narrowed(tensor.detach()).cpu().contiguous() for name, tensor in stored_tensors(model.hf_model).items()
    }
    write_tensors(directory / TENSORS_FILE, tensors)
    files = sorted({*others, *_write_config(model, directory)})
    manifest = {
        "format": QUANT_METHOD,
        "version": CHECKPOINT_VERSION,
        # The tensors of TENSORS_FILE have hashes of their own.
        "files": {path.relative_to(directory).as_posix(): file_sha256(path) for path in files},
        "tensors": {
            name: {"dtype": _dtype_name(tensor), "shape": list(tensor.shape), "sha256": _tensor_sha256(tensor)}
            for name, tensor in tensors.items()
        },
    }
    write_json(directory / MANIFEST_FILE, manifest)
    return sum(path.stat().st_size for path in [*files, directory / TENSORS_FILE, directory / MANIFEST_FILE])


def load_checkpoint(path: Path) -> NestedCausalLM:
    """Loads a nested checkpoint after checking all of it; unquantised weights are not part of one.

    Raises:
        InputError: If a file or tensor is missing, unexpected, damaged or of another version.
    """
    manifest = _read_manifest(path)
    _check_files(path, manifest["files"])
    entries, config, calibration, tuning = _read_config(path)
    tree = _empty_model(path, entries)
    try:
        tokenizer = load_tokenizer(path, entries.get("model_type"))
    except Exception as error:  # transformers raises a dozen types for what it cannot build
        raise _unbuildable(path, error) from error
    units = make_units(tree, config)
    cache = DenseCache(dense_cache_bytes())
    insert_empty_linears(tree, units, config, cache)
    _load_tensors(path, tree, manifest["tensors"])
    tree.eval().requires_grad_(False)
    check_vocabulary(str(path), tokenizer, tree)
    check_units(tree, units)
    return NestedCausalLM(tree, tokenizer, config, units, cache, calibration, tuning)


def _empty_model(path: Path, entries: dict[str, Any]) -> PreTrainedModel | LlamaTree:
    """The modules that config.json describes, without storage: those of transformers where they must be."""
    tree = empty_tree(path, entries)
    if tree is not None:
        return tree
    from transformers import AutoConfig, GenerationConfig

    try:
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the model's own configuration class does
        raise InputError(
            f"{path / CONFIG_FILE}: not a model that transformers knows ({first_line(error)}); update it"
        ) from error
    del hf_config.quantization_config  # of the stored tensors, not of the model that is built
    vars(hf_config).pop(WEIGHTS_ENTRY, None)
    try:
        hf_model = empty_causal_lm(hf_config)
        if (path / GENERATION_FILE).is_file():
            hf_model.generation_config = GenerationConfig.from_pretrained(path)
    except Exception as error:  # transformers raises a dozen types for what it cannot build
        raise _unbuildable(path, error) from error
    return hf_model


def _unbuildable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be built from its files ({first_line(error)}); {_COPY_AGAIN}")


def is_nested_checkpoint(path: Path) -> bool:
    """Whether a directory claims to be a nested checkpoint, in config.json or (if that is damaged) the manifest."""
    quantization = _read_json(path / CONFIG_FILE).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        return True
    return _read_json(path / MANIFEST_FILE).get("format") == QUANT_METHOD


def is_nested_model(path: str) -> bool:
    """Whether a directory or hub name, as `resolve_model` gives it, is that of a nested checkpoint."""
    return is_nested_checkpoint(Path(path)) or (is_hub_name(path) and is_nested_checkpoint(snapshot_config(path)))


def load_model(
    path: str | None = None,
    config: QuantizationConfig | None = None,
    *,
    keep_reference: bool = True,
    progress: Progress = unseen,
) -> NestedCausalLM:
    """Loads a nested checkpoint as it is, or quantises a plain Hugging Face model in memory.

    Args:
        path: Directory, .gguf file, or name on the hub; `default`, or none, is the embedded model.
        config: How a plain model is quantised; default: `rtn` and groups of 128. A nested checkpoint has been already.
        keep_reference: Keep the unquantised weights of a plain model as the reference for output KL: training,
            profiling and evaluation compare with them. Serving reads none of them: False saves 4 bytes per weight.
        progress: As for `nest`.

    Raises:
        InputError: If it is missing, damaged, not a causal LM or not supported.
    """
    path = resolve_model(path)
    if is_nested_model(path):
        return load_checkpoint(local_model(path))
    config = config or QuantizationConfig()
    loaded, tokenizer = load_causal_lm(path) if keep_reference else load_for_serving(path)
    model = nest(loaded, tokenizer, config, keep_reference=keep_reference, progress=progress)
    return_freed_memory()
    return model


def _narrowed(tensor: Tensor) -> Tensor:
    """The tensor in 16 bits if that loses nothing: models published in bfloat16 are held in float32."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            half = tensor.to(dtype)
            if torch.equal(half.float(), tensor):
                return half
    return tensor


def _write_config(model: NestedCausalLM, directory: Path) -> list[Path]:
    hf_model = model.hf_model
    hf_model.config.save_pretrained(directory)
    config = read_json(directory / CONFIG_FILE)
    config["architectures"] = [type(hf_model).__name__]
    config["quantization_config"] = quantization_entries(model.config, model.calibration, model.tuning)
    config[WEIGHTS_ENTRY] = WEIGHTS_NOTE
    write_json(directory / CONFIG_FILE, config)
    generation = getattr(hf_model, "generation_config", None)
    if generation is None:
        return [directory / CONFIG_FILE]
    # Not save_pretrained: it refuses what many published models have, such as a temperature without sampling.
    generation.to_json_file(directory / GENERATION_FILE)
    return [directory / CONFIG_FILE, directory / GENERATION_FILE]


def quantization_entries(
    config: QuantizationConfig, calibration: Calibration | None = None, tuning: Tuning | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint's config.json."""
    entries = {
        "quant_method": QUANT_METHOD,
        "version": CHECKPOINT_VERSION,
        "planes": NUM_PLANES,
        "bit_order": BIT_ORDER,
        **asdict(config),
    }
    if calibration is not None:
        entries["calibration"] = asdict(calibration)
    if tuning is not None:
        entries["tuning"] = asdict(tuning)
    return entries


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"{path} is not a directory; pass the output directory of `fq quantize`")
    check_no_pointers(path)
    file = path / MANIFEST_FILE
    manifest = _read_json(file)
    version = manifest.get("version")
    if version is not None and version != CHECKPOINT_VERSION:
        raise InputError(
            f"{file}: checkpoint version {version}, but this program reads {CHECKPOINT_VERSION}; "
            "quantise the original model again or use the program that wrote it"
        )
    files, tensors = manifest.get("files"), manifest.get("tensors")
    well_formed = (
        manifest.get("format") == QUANT_METHOD
        and version is not None
        and isinstance(files, dict)
        and CONFIG_FILE in files
        and isinstance(tensors, dict)
        and all(isinstance(entry, dict) for entry in tensors.values())
    )
    if not well_formed:
        state = "damaged" if file.is_file() else "missing"
        raise InputError(f"{file} is {state}, but it says what the other files must hold; {_COPY_AGAIN}")
    return manifest


def _check_files(path: Path, hashes: dict[str, Any]) -> None:
    for name in [*hashes, TENSORS_FILE]:
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing, but manifest.json lists it; {_COPY_AGAIN}")
    for name, expected in hashes.items():
        found = file_sha256(path / name)
        if found != expected:
            raise InputError(
                f"{path / name}: sha256 {found[:12]}, but manifest.json says {str(expected)[:12]}; "
                f"the file was edited or damaged: {_COPY_AGAIN}"
            )


def _read_config(
    path: Path,
) -> tuple[dict[str, Any], QuantizationConfig, Calibration | None, Tuning | None]:
    """Reads config.json, whose hash is right, into the entries of the unquantised model and our configuration."""
    file = path / CONFIG_FILE
    entries = _read_json(file)
    stored = entries.pop("quantization_config", None)
    entries.pop(WEIGHTS_ENTRY, None)
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise InputError(f"{file} has no quantization_config of method {QUANT_METHOD!r}; pass a nested checkpoint")
    return entries, *parse_quantization(stored, str(file))


def parse_quantization(
    stored: Mapping[str, Any], where: str
) -> tuple[QuantizationConfig, Calibration | None, Tuning | None]:
    """What `quantization_entries` wrote.

    Args:
        stored: The entries.
        where: What errors call their place.

    Raises:
        InputError: If they are of another version, or not whole.
    """
    for key, expected in (("version", CHECKPOINT_VERSION), ("planes", NUM_PLANES), ("bit_order", BIT_ORDER)):
        if stored.get(key) != expected:
            raise InputError(
                f"{where}: {key} {stored.get(key)!r}, but this program reads {expected!r}; "
                "quantise the original model again or use the program that wrote it"
            )
    try:
        config = QuantizationConfig(
            method=stored["method"],
            group_size=stored["group_size"],
            bit_widths=tuple(stored["bit_widths"]),
            unit=stored["unit"],
            quantize_head=bool(stored["quantize_head"]),
            width_weights=tuple(stored.get("width_weights", ())),
            rotate=bool(stored.get("rotate", False)),
        )
        config.validate()
        calibration = Calibration(**_tuples(dict(stored["calibration"]))) if "calibration" in stored else None
        tuning = Tuning(**stored["tuning"]) if "tuning" in stored else None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: bad quantization_config ({first_line(error)}); {_COPY_AGAIN}") from error
    return config, calibration, tuning


def _tuples(stored: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where a dataclass has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def insert_empty_linears(
    model: PreTrainedModel | LlamaTree, units: tuple[Unit, ...], config: QuantizationConfig, cache: DenseCache
) -> None:
    """Replaces the linears of a model without storage by nested ones without storage."""
    for unit_idx, unit in enumerate(units):
        for name in unit.linears:
            linear = model.get_submodule(name)
            assert is_dense(linear)
            shape = linear.weight.shape
            num_outputs, num_inputs = shape if isinstance(linear, nn.Linear) else (shape[1], shape[0])
            num_padded = padded_inputs(num_inputs)
            pairs = (len(config.bit_widths), num_outputs, num_padded // config.group_size)
            weight = NestedWeight(
                torch.empty(NUM_PLANES, num_outputs, num_padded // WORD_BITS, dtype=torch.int32, device="meta"),
                torch.empty(pairs, dtype=torch.float16, device="meta"),
                torch.empty(pairs, dtype=torch.float16, device="meta"),
                config.bit_widths,
                config.group_size,
                num_inputs,
            )
            bias = None if linear.bias is None else linear.bias.detach()
            model.set_submodule(name, NestedLinear(weight, bias, unit_idx=unit_idx, cache=cache))


def _load_tensors(path: Path, model: PreTrainedModel | LlamaTree, listed: dict[str, dict[str, Any]]) -> None:
    """Fills a model without storage, checking every tensor against the model, the manifest and its hash."""
    wanted = stored_tensors(model)
    _check_names(listed, wanted, f"{path / MANIFEST_FILE}")
    loaded = {name: tensor.to(wanted[name].dtype) for name, tensor in _checked_tensors(path, wanted, listed)}
    fill(model, loaded)


def check_tensors(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Checks the stored tensors of a checkpoint that somebody else will load.

    Args:
        path: The directory. Where it has no manifest, as in a part of a download, hashes are not checked.
        wanted: The tensors' places in a model, by name.

    Raises:
        InputError: If one is missing, unexpected, damaged or misshapen.
    """
    listed = None
    if (path / MANIFEST_FILE).is_file():
        listed = _read_manifest(path)["tensors"]
        _check_names(listed, wanted, f"{path / MANIFEST_FILE}")
    for _ in _checked_tensors(path, wanted, listed):
        continue


def _checked_tensors(
    path: Path, wanted: Mapping[str, Tensor], listed: Mapping[str, dict[str, Any]] | None
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors, each checked against its place in the model and, where there is one, the manifest."""
    file = path / TENSORS_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            _check_names(tensors.keys(), wanted, f"{file}")
            for name, place in wanted.items():
                # A copy: what safetensors returns is mapped from the file and would change with it after the check.
                tensor = tensors.get_tensor(name).clone()
                _check_tensor(f"{file}: {name}", tensor, place, None if listed is None else listed[name])
                yield name, tensor
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: damaged or cut short ({first_line(error)}); {_COPY_AGAIN}") from error


def _check_names(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    for names, what in ((missing, "lacks"), (extra, "has unexpected")):
        if names:
            raise InputError(f"{where} {what} {len(names)} tensors, e.g. {names[0]}; {_COPY_AGAIN}")


def _check_tensor(where: str, tensor: Tensor, place: Tensor, entry: dict[str, Any] | None) -> None:
    """Raises InputError unless a stored tensor fits its place in the model and, if any, its entry in the manifest."""
    if tensor.shape != place.shape:
        raise InputError(
            f"{where} has shape {list(tensor.shape)}, but config.json needs {list(place.shape)}; {_COPY_AGAIN}"
        )
    same_dtype = tensor.dtype == place.dtype
    narrowed = place.dtype == torch.float32 and tensor.dtype in (torch.bfloat16, torch.float16)
    if not (same_dtype or narrowed):
        raise InputError(
            f"{where} is {_dtype_name(tensor)}, but must be {_dtype_name(place)} as config.json has it; {_COPY_AGAIN}"
        )
    if entry is None:
        return
    found = {"dtype": _dtype_name(tensor), "shape": list(tensor.shape), "sha256": _tensor_sha256(tensor)}
    for key, value in found.items():
        if entry.get(key) != value:
            raise InputError(
                f"{where} has {key} {str(value)[:12]}, but manifest.json says {str(entry.get(key))[:12]}; "
                f"the file was edited or damaged: {_COPY_AGAIN}"
            )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensor_sha256(tensor: Tensor) -> str:
    """Digest of the bytes as they are stored: contiguous, little-endian."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is none that can be read."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
