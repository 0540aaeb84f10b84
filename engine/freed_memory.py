"""When memory that was freed goes back to the system: after a model or a calibrated matrix was quantised, not some day.

The C library keeps freed blocks of some megabytes for later use. After nesting, these are the unquantised matrices: 4
bytes per weight that nobody reads, of a process that may serve for weeks. Where small things that stay are made between
large ones that go, the holes cannot be used again: 64 backward passes took three times the memory of one.
"""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Gives freed memory back to the system where the C library can (glibc); elsewhere nothing happens."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return
    trim(0)
