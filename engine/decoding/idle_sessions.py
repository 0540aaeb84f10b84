"""Sessions of ended requests, kept for the next one: a chat's next prompt begins with the last one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flexquant_rl.engine.decoding.lean import LeanSession

_MAX_IDLE = 4
"""Kept at most; each holds the keys and values of a whole request."""


class IdleSessions:
    """Sessions of one row, of which a request takes the one that has read most of its prompt.

    `take` is called by one thread at a time; `give_back` by any at any time.

    Args:
        open_session: Opens one more.
    """

    def __init__(self, open_session: Callable[[], LeanSession]) -> None:
        self._open_session = open_session
        self._idle: list[LeanSession] = []
        self._is_closed = False

    def take(self, prompt_ids: Tensor) -> LeanSession:
        """A session for a prompt `[T]` int64.

        A session of which less than half could be used is left to whom it belongs, as long as there is room for more.
        """
        idle = list(self._idle)
        shared = [session.num_shared(prompt_ids) for session in idle]
        best = max(range(len(idle)), key=shared.__getitem__, default=None)
        if best is None or 2 * shared[best] <= idle[best].num_prompt_tokens:
            if len(idle) < _MAX_IDLE:
                return self._open_session()
            best = 0  # the one that was given back first
        self._idle.remove(idle[best])
        return idle[best]

    def give_back(self, session: LeanSession) -> None:
        """Keeps a session whose request has ended, or frees it where enough are kept."""
        if self._is_closed or len(self._idle) >= _MAX_IDLE:
            session.close()
        else:
            self._idle.append(session)

    def close(self) -> None:
        """Frees them all, and all that come back later."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()
