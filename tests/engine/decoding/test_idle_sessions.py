"""Which session a request takes, and what becomes of it."""

from __future__ import annotations

import pytest
import torch

from flexquant_rl.engine.decoding import idle_sessions
from flexquant_rl.engine.decoding.idle_sessions import IdleSessions
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels.native import supported_isas

pytestmark = pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")


class Sessions:
    """A pool and requests that use it, on rows of 40 tokens."""

    def __init__(self, model: NestedCausalLM) -> None:
        self._decoder = LeanDecoder(model, max_length=40)
        self.pool = IdleSessions()

    def take(self, prompt: list[int]) -> LeanSession:
        """A session that has read a prompt."""
        session = self.pool.take(torch.tensor(prompt)) or LeanSession(self._decoder)
        session.prefill(torch.tensor([prompt]))
        return session

    def ask(self, *prompts: list[int]) -> list[LeanSession]:
        """Requests that run side by side and end together."""
        taken = [self.take(prompt) for prompt in prompts]
        for session in taken:
            self.pool.give_back(session)
        return taken

    def num_shared(self, prompt: list[int]) -> int:
        """How much of a prompt has been read before."""
        session = self.pool.take(torch.tensor(prompt))
        shared = 0 if session is None else session.num_shared(torch.tensor(prompt))
        if session is not None:
            self.pool.give_back(session)
        return shared


@pytest.fixture
def sessions(nested_model: NestedCausalLM) -> Sessions:
    return Sessions(nested_model)


def test_a_longer_prompt_takes_the_session_itself(sessions: Sessions) -> None:
    (first,), (second,) = sessions.ask([7] * 9), sessions.ask([8] * 9)
    assert sessions.ask([7] * 9 + [5]) == [first]
    assert sessions.ask([8] * 9 + [5]) == [second]
    assert sessions.ask([8] * 9 + [5]) == [second], "once more the same"


def test_a_common_beginning_takes_no_chat_from_another(sessions: Sessions) -> None:
    (first,) = sessions.ask([1] * 20 + [7] * 9)
    (second,) = sessions.ask([1] * 20 + [8] * 3)
    assert second is not first
    assert sessions.num_shared([1] * 20 + [7] * 10) == 29
    assert sessions.num_shared([1] * 20 + [8] * 10) == 23
    assert sessions.num_shared([1] * 20 + [9] * 10) == 20


def test_of_two_that_share_as_much_the_one_that_loses_less_is_taken(sessions: Sessions) -> None:
    sessions.ask([1] * 9 + [7] * 9)
    (bare,) = sessions.ask([1] * 9 + [8])
    assert sessions.pool.take(torch.tensor([1] * 9 + [9] * 4)) is bare


def test_the_last_four_are_kept(sessions: Sessions) -> None:
    for token in range(10, 16):
        sessions.ask([token] * 9)
    assert [sessions.num_shared([token] * 9) for token in range(10, 16)] == [0, 0, 8, 8, 8, 8]


def test_of_more_that_run_side_by_side_the_last_four_are_kept(sessions: Sessions) -> None:
    sessions.ask(*([token] * 9 for token in range(10, 16)))
    assert [sessions.num_shared([token] * 9) for token in range(10, 16)] == [0, 0, 8, 8, 8, 8]


def test_large_rows_are_fewer_and_one_at_least(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes = sessions.ask([7] * 9)[0].num_bytes
    for limit, kept in ((2.5 * num_bytes, [0, 8, 8]), (num_bytes / 2, [0, 0, 8])):
        monkeypatch.setattr(idle_sessions, "_MAX_BYTES", int(limit))
        for token in range(10, 13):
            sessions.ask([token] * 9)
        assert [sessions.num_shared([token] * 9) for token in range(10, 13)] == kept


def test_what_has_read_nothing_is_not_kept(sessions: Sessions) -> None:
    empty = sessions.take([7] * 9)
    empty.truncate(torch.tensor([0]))
    sessions.pool.give_back(empty)
    assert sessions.num_shared([7] * 9) == 0


def test_closing_drops_all_and_what_comes_back_later(sessions: Sessions) -> None:
    sessions.ask([7] * 9)
    running = sessions.take([8] * 9)
    sessions.pool.close()
    sessions.pool.give_back(running)
    assert sessions.pool.take(torch.tensor([7] * 9)) is None
    assert sessions.pool.take(torch.tensor([8] * 9)) is None
