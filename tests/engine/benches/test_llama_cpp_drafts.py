"""The loop of drafts over llama.cpp: the target's own text, whatever the draft model says, and what was counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from flexquant_rl.engine.benches.llama_cpp_drafts import DraftRule, continue_greedily, continue_with_drafts

VOCAB_SIZE = 23


class TextModel:
    """A model whose next token follows from all tokens that it holds; `odd` gives another one after every third."""

    def __init__(self, prompt: Sequence[int], *, odd: bool, sharpness: float = 9.0) -> None:
        self.held = list(prompt)
        self.num_passes = 0
        self.most_in_a_pass = 0
        self._odd = odd
        self._sharpness = sharpness

    def _logits(self) -> NDArray[np.float32]:
        token = (sum((place + 1) * token for place, token in enumerate(self.held)) * 7 + 3) % VOCAB_SIZE
        if self._odd and len(self.held) % 3 == 0:
            token = (token + 1) % VOCAB_SIZE
        logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
        logits[token] = self._sharpness if len(self.held) % 4 else 0.1
        return logits

    def step(self, token_id: int) -> NDArray[np.float32]:
        return self.extend([token_id])[0]

    def extend(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self.num_passes += 1
        self.most_in_a_pass = max(self.most_in_a_pass, len(token_ids))
        found = []
        for token_id in token_ids:
            self.held.append(token_id)
            found.append(self._logits())
        return np.stack(found)

    def truncate(self, length: int) -> None:
        assert 0 < length < len(self.held), "something is forgotten"
        del self.held[length:]


PROMPT = [4, 8, 15, 16]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("p_min", [0.0, 0.5])
@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_text_of_the_target(length: int, p_min: float, odd: bool, count: int) -> None:
    plain = continue_greedily(TextModel(PROMPT, odd=False), 9, count)
    target, draft = TextModel(PROMPT, odd=False), TextModel(PROMPT, odd=odd)
    found, counts = continue_with_drafts(target, draft, [*PROMPT, 9], count, DraftRule(length, p_min))
    assert found == plain
    held = [*PROMPT, 9, *plain][:-1]
    assert target.held == held
    assert draft.held == held[: len(draft.held)]
    assert counts.num_tokens == count
    assert counts.num_verify_passes == target.num_passes
    assert target.most_in_a_pass <= length + 1
    assert sum(counts.drafted) <= counts.num_draft_steps <= draft.num_passes


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_a_text_ends_where_the_model_ends_it(length: int, odd: bool) -> None:
    """With each of its tokens as the one that ends it: gained, accepted as a draft, or not accepted."""
    whole = continue_greedily(TextModel(PROMPT, odd=False), 9, 17)
    for eos in {*whole} - {9}:
        expected = whole[: whole.index(eos) + 1]
        assert continue_greedily(TextModel(PROMPT, odd=False), 9, 17, {eos}) == expected
        target, draft = TextModel(PROMPT, odd=False), TextModel(PROMPT, odd=odd)
        found, counts = continue_with_drafts(target, draft, [*PROMPT, 9], 17, DraftRule(length), {eos})
        assert found == expected
        assert counts.num_tokens == len(expected)
    assert continue_greedily(TextModel(PROMPT, odd=False), 9, 17, {9}) == []
    target, draft = TextModel(PROMPT, odd=False), TextModel(PROMPT, odd=odd)
    assert continue_with_drafts(target, draft, [*PROMPT, 9], 17, DraftRule(length), {9})[0] == []


def test_counts_of_a_draft_that_is_always_right() -> None:
    target, draft = TextModel(PROMPT, odd=False), TextModel(PROMPT, odd=False)
    _, counts = continue_with_drafts(target, draft, [*PROMPT, 9], 12, DraftRule(3))
    assert target.num_passes == counts.num_verify_passes == 3, "three drafts and one token gained, each time"
    assert counts.drafted == counts.accepted == [3, 3, 3]
    assert counts.num_draft_steps == 9
    assert draft.most_in_a_pass == 2, "the last draft of a round is read with the token that was gained"


def test_unsure_tokens_end_a_round() -> None:
    """Every fourth token is unsure, whatever it is."""
    target, draft = TextModel(PROMPT, odd=False), TextModel(PROMPT, odd=False)
    _, counts = continue_with_drafts(target, draft, [*PROMPT, 9], 40, DraftRule(8, p_min=0.5))
    assert counts.num_draft_steps > sum(counts.drafted), "what is not drafted took its pass too"
    assert len(counts.drafted) < 8
    assert counts.drafted == counts.accepted
