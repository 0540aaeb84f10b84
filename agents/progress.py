"""Progress on a terminal as a bar, elsewhere as plain lines; on stderr, so that stdout keeps its last JSON line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_PLAIN_INTERVAL_S = 10.0


def say(message: str) -> None:
    """Prints one line about what happens now."""
    print(message, file=sys.stderr, flush=True)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yields the items and shows how far it is.

    Args:
        items: What to go through.
        label: What it is.
        total: Number of items, where `items` does not know.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, leave=False, dynamic_ncols=True)
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    began = last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > _PLAIN_INTERVAL_S:
            last = time.monotonic()
            say(f"{label}: {done}{f' of {total}' if total else ''}, {last - began:.0f} s")
        yield item


class StepBar:
    """Progress of a loop that somebody else runs, in steps.

    Args:
        label: What it is.
        total: Steps to do.
        initial: Steps done before.
    """

    def __init__(self, label: str, total: int, initial: int = 0) -> None:
        self._label = label
        self._total = total
        self._bar = (
            tqdm(desc=label, total=total, initial=initial, leave=False, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(self, done: int, note: str) -> None:
        """Shows `done` of the total and a short note."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        else:
            say(f"{self._label}: {done} of {self._total} env steps, {note}")

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
