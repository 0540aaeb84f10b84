"""Whose turn a captured graph is: it holds one sequence, and its reader may pause for as long as they like."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

CLOSED = "this Engine is closed"
_LOOK_SECONDS = 0.05
"""Time between two looks of those who wait: whether they have been cancelled meanwhile."""


class GraphTurn:
    """A lock that is held from the first token of a sequence to its last, and that nobody waits for in vain.

    Args:
        closed: Ends all waiting once it is set.
    """

    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed
        self._lock = threading.Lock()
        self._reader: int | None = None  # the thread that has taken the last token of the sequence under way

    @contextmanager
    def taken(self, cancel: threading.Event) -> Iterator[bool]:
        """Waits for the turn and holds it.

        Args:
            cancel: Ends the waiting once it is set.

        Yields:
            Whether the turn was taken; False if it was cancelled first.

        Raises:
            RuntimeError: If the turns are closed, or the turn is this thread's already, which would wait for itself.
        """
        while not self._lock.acquire(timeout=_LOOK_SECONDS):
            if self._closed.is_set():
                raise RuntimeError(CLOSED)
            if cancel.is_set():
                yield False
                return
            if self._reader == threading.get_ident():
                raise RuntimeError(
                    "this thread reads another request of the captured graph, which serves one at a time; finish or "
                    "close that iterator first, or use decoder='hf'"
                )
        try:
            if self._closed.is_set():
                raise RuntimeError(CLOSED)
            self.resumed()
            yield True
        finally:
            self._reader = None
            self._lock.release()

    def resumed(self) -> None:
        """Notes that this thread goes on reading."""
        self._reader = threading.get_ident()
