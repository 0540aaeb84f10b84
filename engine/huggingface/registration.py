"""Has transformers know nested checkpoints, at whatever moment it is imported. Imports nothing that is slow.

transformers has no entry points for quantisers: what it knows is a table in `transformers.quantizers.auto`, filled when
code that registers is run. Importing transformers for that would cost every program seconds. So `import flexquant_rl`
only asks to be told when that module has run, which happens with the first model that anybody loads.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the base class of finders alone takes as long as the rest of `import flexquant_rl`
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_TABLE = "transformers.quantizers.auto"
_QUANTIZER = "flexquant_rl.engine.huggingface.quantizer"


def register_with_transformers() -> None:
    """Registers the quantiser now if transformers has its table, else as soon as it gets it. Twice is once."""
    if _TABLE in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


class _TableFinder:
    """Finds the module of the table as the other finders do, and registers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != _TABLE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((found for found in specs if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module(_QUANTIZER)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]  # of this loader, made for this spec
        return spec
