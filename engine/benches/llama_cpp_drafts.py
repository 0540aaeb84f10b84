"""Greedy text with a draft model, as a loop over llama.cpp's library: a small model proposes, the large one settles.

llama.cpp's own programs do this; llama-cpp-python has no draft models, so the loop is ours. It follows theirs: the
drafts of a round are read by the target in one batch with the upcoming token, and the longest agreeing prefix is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexquant_rl.engine.control.draft_counts import DraftCounts

_LIKELIEST = 10
"""Tokens whose probabilities sum to 1 where `p_min` is compared, as in llama.cpp's drafting."""


class GreedySession(Protocol):
    """A sequence and what decodes it, as `LlamaCppSession`."""

    def step(self, token_id: int) -> NDArray[np.float32]:
        """Appends a token and returns the logits after it, `[vocab]`."""

    def extend(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens in one batch and returns the logits after each, `[M, vocab]`."""

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""


@dataclass(frozen=True)
class DraftRule:
    """When a round stops drafting.

    Attributes:
        length: Drafts of a round at most (llama.cpp's `--draft-max`).
        p_min: A token less likely than this by the draft model is not drafted and ends the round (`--draft-p-min`).
    """

    length: int
    p_min: float = 0.0


def continue_greedily(
    session: GreedySession, token_id: int, count: int, eos_token_ids: Collection[int] = ()
) -> list[int]:
    """Reads a token and chooses `count` more, one step each, or fewer where one of them ends the text."""
    found: list[int] = []
    while len(found) < count and token_id not in eos_token_ids:
        token_id = int(session.step(token_id).argmax())
        found.append(token_id)
    return found


def continue_with_drafts(
    target: GreedySession,
    draft: GreedySession,
    text: Sequence[int],
    count: int,
    rule: DraftRule,
    eos_token_ids: Collection[int] = (),
) -> tuple[list[int], DraftCounts]:
    """Chooses `count` tokens more, which would be those of `continue_greedily` if batches computed what steps do.

    Args:
        target: Holds the text but its last token; afterwards the whole text but its last token.
        draft: Holds the text but its last token; afterwards a part of the whole text from its beginning.
        text: Prompt and first token.
        count: Tokens to choose.
        rule: When to stop drafting.
        eos_token_ids: Each of these ends the text.

    Returns:
        The tokens, and what the drafts came to.
    """
    whole, end, counts = list(text), len(text) + count, DraftCounts()
    held = len(whole) - 1
    while len(whole) < end and whole[-1] not in eos_token_ids:
        room = min(rule.length, end - len(whole) - 1)
        drafts, steps = _drafted(draft, whole[held:], room, rule.p_min, eos_token_ids) if room else ([], 0)
        # The last draft is not read: nothing is drafted behind it.
        held = held if not steps else len(whole) + steps - 1
        logits = target.extend([whole[-1], *drafts]) if drafts else target.step(whole[-1])[None]
        chosen = logits.argmax(-1).tolist()
        agreeing = next((place for place, token_id in enumerate(drafts) if token_id != chosen[place]), len(drafts))
        whole += chosen[: agreeing + 1]
        has_ended = agreeing > 0 and drafts[agreeing - 1] in eos_token_ids
        if has_ended:  # what follows is no part of the text
            whole.pop()
        if agreeing < len(drafts):
            target.truncate(len(whole) - 1)
        if held > len(whole) - 1:
            held = len(whole) - 1
            draft.truncate(held)
        counts.num_draft_steps += steps
        counts.add_round(len(drafts), agreeing)
        if has_ended:
            counts.drop(1)
    return whole[len(text) :], counts


def _confidence(logits: NDArray[np.float32]) -> float:
    """Probability of the likeliest token among the `_LIKELIEST` ones, whose probabilities sum to 1."""
    count = min(_LIKELIEST, len(logits))
    likeliest = np.partition(logits, -count)[-count:]
    return float(1 / np.exp(likeliest - likeliest.max()).sum())


def _drafted(
    draft: GreedySession, unread: Sequence[int], room: int, p_min: float, eos_token_ids: Collection[int]
) -> tuple[list[int], int]:
    """At most `room` drafts behind a text whose last tokens are unread, and the passes that it took."""
    drafts: list[int] = []
    steps = 0
    while len(drafts) < room and not (drafts and drafts[-1] in eos_token_ids):
        logits = draft.extend(unread)[-1] if len(unread) > 1 else draft.step(unread[0])
        steps += 1
        token_id = int(logits.argmax())
        if p_min and _confidence(logits) < p_min:
            break
        drafts.append(token_id)
        unread = [token_id]
    return drafts, steps
