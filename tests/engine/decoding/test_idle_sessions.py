"""Which session a request takes, and what becomes of it."""

from __future__ import annotations

import pytest
import torch

from flexquant_rl.engine.decoding.idle_sessions import IdleSessions
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels.native import supported_isas

pytestmark = pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")


class Sessions:
    """A pool and all that it has opened."""

    def __init__(self, model: NestedCausalLM) -> None:
        self._decoder = LeanDecoder(model, max_length=40)
        self.opened: list[LeanSession] = []
        self.pool = IdleSessions(self._open)

    def ask(self, *prompts: list[int]) -> list[LeanSession]:
        """Requests that run side by side and end together."""
        taken = []
        for prompt in prompts:
            taken.append(self.pool.take(torch.tensor(prompt)))
            taken[-1].prefill(torch.tensor([prompt]))
        for session in taken:
            self.pool.give_back(session)
        return taken

    def _open(self) -> LeanSession:
        self.opened.append(LeanSession(self._decoder))
        return self.opened[-1]


@pytest.fixture
def sessions(nested_model: NestedCausalLM) -> Sessions:
    return Sessions(nested_model)


def is_closed(session: LeanSession) -> bool:
    try:
        return session.num_prompt_tokens < 0
    except RuntimeError:
        return True


def test_a_prompt_takes_the_session_that_has_read_most_of_it(sessions: Sessions) -> None:
    (first,), (second,) = sessions.ask([7] * 9), sessions.ask([8] * 9)
    assert sessions.ask([7] * 9 + [5]) == [first]
    assert sessions.ask([8] * 6 + [5]) == [second]
    assert len(sessions.opened) == 2


def test_a_common_beginning_takes_no_chat_from_another(sessions: Sessions) -> None:
    (first,) = sessions.ask([1, 2, 3] + [7] * 9)
    (second,) = sessions.ask([1, 2, 3] + [8] * 9)
    assert second is not first
    assert sessions.ask([1, 2, 3] + [7] * 10) == [first]


def test_four_are_kept_and_the_oldest_is_written_over(sessions: Sessions) -> None:
    kept = [sessions.ask([token] * 9)[0] for token in range(10, 14)]
    assert sessions.ask([20] * 9) == kept[:1]
    assert len(sessions.opened) == 4


def test_what_runs_beside_more_than_are_kept_is_freed(sessions: Sessions) -> None:
    taken = sessions.ask(*([token] * 9 for token in range(10, 16)))
    assert [is_closed(session) for session in taken] == [False] * 4 + [True] * 2


def test_closing_frees_all(sessions: Sessions) -> None:
    (idle,) = sessions.ask([7] * 9)
    running = sessions.pool.take(torch.tensor([8] * 9))
    sessions.pool.close()
    assert is_closed(idle)
    assert not is_closed(running)
    sessions.pool.give_back(running)
    assert is_closed(running)
