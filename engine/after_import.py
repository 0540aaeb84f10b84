"""What is done once another library's module has been imported, without importing it for that. Nothing here is slow.

Registering with a library that has no entry points means importing it, which may take seconds that most programs would
pay for nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the base class of finders alone takes as long as the rest of `import flexquant_rl`
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def once_imported(module: str, call: Callable[[], object]) -> None:
    """Calls now if a module was imported, else when it is; the first to ask for a module that is not there counts."""
    if module in sys.modules:
        call()
    elif not any(isinstance(finder, WaitingFinder) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, WaitingFinder(module, call))


class WaitingFinder:
    """Finds one module as the other finders do, and calls once it has run.

    Args:
        module: Its name.
        call: What is called.
    """

    def __init__(self, module: str, call: Callable[[], object]) -> None:
        self.module = module
        self._call = call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != self.module:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((found for found in specs if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:  # to be looked for is not to be imported
                sys.meta_path.remove(self)
            self._call()

        spec.loader.exec_module = run_and_call  # type: ignore[method-assign]  # of this loader, made for this spec
        return spec
