"""Where the model that ships with the package is.

The folder has the same place relative to this file in a checkout and in an installed wheel, where `assets/` is the data
package `flexquant_rl.assets`.
"""

from __future__ import annotations

from pathlib import Path

from flexquant_rl.engine.errors import InputError

EMBEDDED_MODEL_NAME = "tiny-code-llama"
DEFAULT_MODEL = "default"
"""Names the embedded model wherever a command takes a model; a directory of that name is `./default`."""


def resolve_model(model: str | None) -> str:
    """The directory or hub name that a command's model stands for; `default`, or none, is the embedded one."""
    return str(embedded_model_path()) if model is None or model == DEFAULT_MODEL else model


def embedded_model_path() -> Path:
    """Returns the directory of the embedded model, in Hugging Face form.

    Raises:
        InputError: If the installation lacks the model.
    """
    path = Path(__file__).resolve().parent.parent / "assets" / EMBEDDED_MODEL_NAME
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise InputError(
            f"no embedded model in {path}: the default run needs config.json and model.safetensors there; "
            "install flexquant-rl from a complete checkout or wheel, or name a model with --model"
        )
    return path
