"""What a long quantisation has done so far: a directory beside its output that an interrupted one goes on from.

It holds the nested model that tuning begins with, and the state of the tuning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from flexquant_rl.engine.checkpoint import load_checkpoint, save_checkpoint
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import OutputExistsError, read_json, write_json
from flexquant_rl.engine.hf_modules import stored_tensors
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import Progress, give_reference, nest, unseen
from flexquant_rl.engine.quantisation.calibration import Calibration
from flexquant_rl.engine.quantisation.config import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_START, START_FILE = "start", "start.json"
_RECIPE = 1
"""Raised whenever the same options quantise to something else: nobody goes on from what another recipe made."""
STATE_FILE = "state.safetensors"
"""The file in the directory that tuning keeps its state in."""


def unfinished_directory(out: Path) -> Path:
    """The directory beside `out`, made if need be. Who works in it locks it before anything else."""
    directory = out.with_name(f".{out.name}.unfinished")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def removed_when_over(directory: Path) -> Iterator[None]:
    """Removes a directory after the block, but not what the same command can go on from.

    That is the nested weights and what followed, after an interruption, on a full disk, and where an output directory
    has appeared during the work.

    Raises:
        KeyboardInterrupt: After an interruption, with what to do next where something is kept.
    """
    try:
        yield
    except KeyboardInterrupt as interruption:
        if has_start(directory):
            raise KeyboardInterrupt("the same command goes on from there") from interruption
        shutil.rmtree(directory)
        raise
    except OutputExistsError as error:
        raise InputError(
            f"{error.path} has appeared meanwhile and is not empty; move it away, and the same command goes on from "
            "there"
        ) from error
    except InputError:
        shutil.rmtree(directory)
        raise
    except OSError:
        if not has_start(directory):
            shutil.rmtree(directory)
        raise
    shutil.rmtree(directory)


def nested_start(
    directory: Path,
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: QuantizationConfig,
    calibration: Tensor | None,
    *,
    progress: Progress = unseen,
) -> NestedCausalLM:
    """`nest`, with the unquantised weights kept; what it gave an interrupted run is read back from a directory.

    Args:
        directory: Where a copy of the nested weights is kept.
        hf_model: As for `nest`.
        tokenizer: As for `nest`.
        config: As for `nest`.
        calibration: As for `nest`.
        progress: As for `nest`.
    """
    key = _key(hf_model, config, calibration)
    start, key_file = directory / _START, directory / START_FILE
    if _read_key(key_file) == key:
        model = load_checkpoint(start).to(hf_model.device)
        give_reference(model, hf_model)
        return model
    for stale in (key_file, directory / STATE_FILE):  # of other options
        stale.unlink(missing_ok=True)
    if start.exists():
        shutil.rmtree(start)
    model = nest(hf_model, tokenizer, config, keep_reference=True, calibration=calibration, progress=progress)
    save_checkpoint(model, start)
    write_json(key_file, key)
    return model


def _read_key(key_file: Path) -> object:
    """What the nested weights depend on; None where there are none, or where it cannot be read."""
    try:
        return read_json(key_file)
    except (OSError, ValueError):
        return None


def has_start(directory: Path) -> bool:
    """Whether an interrupted run has left nested weights there."""
    return (directory / START_FILE).is_file()


def _key(hf_model: PreTrainedModel, config: QuantizationConfig, calibration: Tensor | None) -> str:
    """Digest of all that nesting depends on."""
    facts = [_RECIPE, asdict(config), None if calibration is None else Calibration.of(calibration).sha256]
    return weights_sha256(hf_model, json.dumps(facts))


def weights_sha256(hf_model: PreTrainedModel, facts: str = "") -> str:
    """Digest of a model's tensors, after some facts."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in stored_tensors(hf_model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
