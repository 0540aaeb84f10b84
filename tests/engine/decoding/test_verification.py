"""What is kept of drafts, and what is found in the text so far, against plain definitions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexquant_rl.engine.decoding.decoder import first_of_largest, greedy_tokens
from flexquant_rl.engine.decoding.next_token import Sampler
from flexquant_rl.engine.decoding.ngram import NgramIndex
from flexquant_rl.engine.decoding.verification import settled_tokens


@given(chosen=st.lists(st.integers(0, 2), min_size=1, max_size=6), drafts=st.lists(st.integers(0, 2), max_size=5))
def test_greedy_keeps_the_longest_prefix_that_agrees(chosen: list[int], drafts: list[int]) -> None:
    chosen = (chosen * 6)[: len(drafts) + 1]
    logits = torch.nn.functional.one_hot(torch.tensor(chosen), 3).float()
    kept = settled_tokens(logits, drafts, [None] * len(drafts), Sampler(1), 0)
    agree = 0
    while agree < len(drafts) and drafts[agree] == chosen[agree]:
        agree += 1
    assert kept == [*drafts[:agree], chosen[agree]]


@given(values=st.lists(st.integers(-2, 2), min_size=1, max_size=9))
def test_the_first_of_equal_maxima_is_taken_on_every_device(values: list[int]) -> None:
    logits = torch.tensor([values, values[::-1]], dtype=torch.float32)
    assert torch.equal(first_of_largest(logits), greedy_tokens(logits))


def test_equal_distributions_accept_and_disjoint_ones_reject() -> None:
    sampler = Sampler(1)
    sampler.start(0, temperature=1.0, seed=3)
    logits = torch.tensor([[0.0, 0.0, -1e9], [-1e9, -1e9, 0.0]])
    for _ in range(20):
        same = torch.tensor([0.5, 0.5, 0.0])
        assert settled_tokens(logits, [1], [same], sampler, 0) == [1, 2]
        other = torch.tensor([0.0, 0.0, 1.0])
        (replaced,) = settled_tokens(logits, [2], [other], sampler, 0)
        assert replaced in (0, 1)
        (replaced,) = settled_tokens(logits, [2], [None], sampler, 0)
        assert replaced in (0, 1)


@given(text=st.lists(st.integers(0, 3), max_size=40), start=st.integers(0, 40), most=st.integers(1, 5))
def test_the_latest_place_of_the_longest_run_is_continued(text: list[int], start: int, most: int) -> None:
    index = NgramIndex(text[:start])
    for token_id in text[start:]:
        index.add(token_id)
    want: list[int] = []
    for size in (4, 3, 2):
        ends = [end for end in range(size, len(text)) if text[end - size : end] == text[len(text) - size :]]
        if ends and not want:
            want = text[ends[-1] : ends[-1] + most]
    assert index.continuation(most) == want
