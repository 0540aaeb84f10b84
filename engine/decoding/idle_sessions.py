"""Rows of ended requests, kept for the next one: a chat's next prompt begins with the last one."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor

from flexquant_rl.engine.decoding.lean import LeanSession

_MAX_KEPT = 4
_MAX_BYTES = 1 << 30
"""Keys and values that are reserved in all kept rows; the last row is kept however large it is."""


class IdleSessions:
    """Sessions of one row whose requests have ended, the oldest first.

    `take` is called by one thread at a time. `give_back` may be called by any thread at any time, as when an abandoned
    iterator is collected, and so it has no lock: nothing here closes a session that `take` may be looking at.
    """

    def __init__(self) -> None:
        self._idle: list[LeanSession] = []
        self._is_closed = False

    def take(self, prompt_ids: Tensor) -> LeanSession | None:
        """A session that has read the beginning of a prompt `[T]` int64; None where there is none.

        It is an idle one if all that it has read belongs to the prompt, else a copy of the part that does: the other
        part may be another chat's.
        """
        best: LeanSession | None = None
        num_shared = 0
        for session in list(self._idle):
            shared = session.num_shared(prompt_ids)
            is_nearer = best is not None and session.num_prompt_tokens < best.num_prompt_tokens
            if shared > num_shared or (shared == num_shared > 0 and is_nearer):
                best, num_shared = session, shared
        if best is None:
            return None
        # The prompt's last token is read in any case.
        if best.num_prompt_tokens > num_shared + 1:
            return best.beginning(num_shared)
        with suppress(ValueError):  # dropped meanwhile, so nobody else's
            self._idle.remove(best)
        return best

    def give_back(self, session: LeanSession) -> None:
        """Keeps a session whose request has ended; the oldest are dropped."""
        if session.num_prompt_tokens:
            self._idle.append(session)
        most = max(1, min(_MAX_KEPT, _MAX_BYTES // session.num_bytes))
        del self._idle[:-most]
        if self._is_closed:
            self._idle.clear()

    def close(self) -> None:
        """Drops them all, and all that come back later."""
        self._is_closed = True
        self._idle.clear()
