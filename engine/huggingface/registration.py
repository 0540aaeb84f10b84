"""Has transformers know nested checkpoints, at whatever moment it is imported. Imports nothing that is slow.

transformers has no entry points for quantisers: what it knows is a table in `transformers.quantizers.auto`, filled when
code that registers is run. So `import flexquant_rl` only asks to be told when that module has run, which happens with
the first model that anybody loads.
"""

from __future__ import annotations

import importlib

from flexquant_rl.engine.after_import import once_imported

_TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Registers the quantiser now if transformers has its table, else as soon as it gets it. Twice is once."""
    once_imported(_TABLE, _register)


def _register() -> None:
    importlib.import_module("flexquant_rl.engine.huggingface.quantizer")
