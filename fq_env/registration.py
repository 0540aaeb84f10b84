"""Which ids Gymnasium knows, and when it learns them: once it is loaded, which is never done for their sake.

Gymnasium has had no plug-ins since its version 1, so an id is known once this package is imported, as
`gymnasium.make("flexquant_rl.fq_env:FlexQuant/Decode-v1")` does. The package is imported for its configuration too, by
commands that answer before Gymnasium could be loaded.
"""

from __future__ import annotations

from flexquant_rl.engine.after_import import once_imported

_REGISTRY_MODULE = "gymnasium.envs.registration"
DECODE, VERIFIED_DECODE = "FlexQuant/Decode-v1", "FlexQuant/VerifiedDecode-v0"
_MEASURED = {DECODE: False, "FlexQuant/MeasuredDecode-v1": True}


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
    if VERIFIED_DECODE not in registration.registry:
        registration.register(
            id=VERIFIED_DECODE,
            entry_point="flexquant_rl.fq_env.verified_making:VerifiedEnvironment",
            vector_entry_point="flexquant_rl.fq_env.verified_making:VectorVerifiedEnvironment",
        )


def register_once_loaded() -> None:
    """Registers the environments: now if Gymnasium is loaded, else when it is."""
    once_imported(_REGISTRY_MODULE, register)
