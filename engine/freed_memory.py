"""When memory that was freed goes back to the system: after a model was quantised, not some day.

The C library keeps freed blocks of a megabyte or less for later use. After nesting, these are the unquantised matrices:
4 bytes per weight that nobody reads, of a process that may serve for weeks.
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
