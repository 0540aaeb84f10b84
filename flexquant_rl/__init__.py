"""Precision controllers for LLM inference: train, judge and deploy them.

One copy of a model's weights is stored as nested bitplanes. For every generated token a small policy chooses, layer by
layer, how many bits of each weight are read. The folders of this package are `kernels`, `engine`, `fq_env` and
`agents`; each imports only from those before it. What most programs need is named here and loaded when it is first
used, so that `import flexquant_rl` alone costs nothing. It also has transformers know nested checkpoints, once that is
imported (engine/huggingface/registration.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexquant_rl.engine.huggingface.registration import register_with_transformers

if TYPE_CHECKING:
    from flexquant_rl.engine.checkpoint import load_model
    from flexquant_rl.engine.control.artefact import load_policy
    from flexquant_rl.engine.control.request import Request
    from flexquant_rl.engine.huggingface.attached import attach_policy
    from flexquant_rl.engine.huggingface.quantizer import FlexQuantConfig
    from flexquant_rl.engine.nesting import nest
    from flexquant_rl.engine.serving import Engine, generate
    from flexquant_rl.fq_env.making import make_environment

__version__ = "0.2.0"

__all__ = [
    "Engine",
    "FlexQuantConfig",
    "Request",
    "__version__",
    "attach_policy",
    "generate",
    "load_model",
    "load_policy",
    "make_environment",
    "nest",
]

_HOMES = {
    "Engine": "flexquant_rl.engine.serving",
    "FlexQuantConfig": "flexquant_rl.engine.huggingface.quantizer",
    "Request": "flexquant_rl.engine.control.request",
    "attach_policy": "flexquant_rl.engine.huggingface.attached",
    "generate": "flexquant_rl.engine.serving",
    "load_model": "flexquant_rl.engine.checkpoint",
    "load_policy": "flexquant_rl.engine.control.artefact",
    "make_environment": "flexquant_rl.fq_env.making",
    "nest": "flexquant_rl.engine.model",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from the module that defines it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__]


register_with_transformers()
