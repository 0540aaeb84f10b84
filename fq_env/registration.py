"""Which ids Gymnasium knows, and when it learns them: once it is loaded, which is never done for their sake.

Gymnasium has had no plug-ins since its version 1, so an id is known once this package is imported, as
`gymnasium.make("flexquant_rl.fq_env:FlexQuant/Decode-v1")` does. The package is imported for its configuration too, by
commands that answer before Gymnasium could be loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY_MODULE = "gymnasium.envs.registration"
_MEASURED = {"FlexQuant/Decode-v1": False, "FlexQuant/MeasuredDecode-v1": True}
_VERIFIED = "FlexQuant/VerifiedDecode-v0"


def register() -> None:
    """Registers the environments with Gymnasium, which is loaded for it; ids that it knows already stay as they are."""
    from gymnasium.envs import registration

    for name, measured in _MEASURED.items():
        if name not in registration.registry:
            registration.register(
                id=name,
                entry_point="flexquant_rl.fq_env.making:DecodeEnvironment",
                vector_entry_point="flexquant_rl.fq_env.making:VectorDecodeEnvironment",
                kwargs={"measured": measured},
                nondeterministic=measured,
            )
    if _VERIFIED not in registration.registry:
        registration.register(
            id=_VERIFIED,
            entry_point="flexquant_rl.fq_env.verified_making:VerifiedEnvironment",
            vector_entry_point="flexquant_rl.fq_env.verified_making:VectorVerifiedEnvironment",
        )


def register_once_loaded() -> None:
    """Registers the environments: now if Gymnasium is loaded, else when it is."""
    if _REGISTRY_MODULE in sys.modules:
        register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder:
    """Finds Gymnasium's registry as Python does, and has it filled once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register()

        setattr(spec.loader, "exec_module", execute_and_register)  # noqa: B010  # a method, to mypy
        return spec
