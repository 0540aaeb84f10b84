"""Extending by many tokens, cutting rows back, rows of different lengths: properties that every decoder has.

The lean decoder must keep them bit for bit; Hugging Face's modules up to the order of their sums.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_session import FakeModel, FakeSession
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexquant_rl.engine.decoding.decoder import Decoder, ExtendOutput, StepOutput
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels.native import supported_isas

pytestmark = pytest.mark.usefixtures("poison_empty")

MAX_LENGTH = 64
# The native kernels take 16 tokens a call, so more than that crosses a border.
SEEDS = st.integers(0, 2**31)
PROPERTY = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=False)

Open = Callable[[int], Decoder]


@pytest.fixture(params=["hf", "lean-int8", "lean-float32", "fake"])
def opened(request: pytest.FixtureRequest, nested_model: NestedCausalLM) -> tuple[Open, float]:
    """Opens a decoder with so many rows, and how far its results may be apart."""
    if request.param == "hf":
        return lambda rows: DecodeSession(nested_model, num_rows=rows, max_length=MAX_LENGTH), 1e-5
    if request.param == "fake":
        return lambda rows: FakeSession(FakeModel(carry=0.5), num_rows=rows, max_length=MAX_LENGTH), 0.0
    if not supported_isas():
        pytest.skip("no C++ compiler here, so no native kernels")
    mode = request.param.removeprefix("lean-")
    decoder = LeanDecoder(nested_model, max_length=MAX_LENGTH, mode=mode)
    return lambda rows: LeanSession(decoder, num_rows=rows), 0.0


class Draws:
    """Random tokens, widths and lengths for one decoder."""

    def __init__(self, decoder: Decoder, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._vocab_size = min(decoder.model.vocab_size, 28)
        self._widths = torch.tensor(decoder.model.bit_widths)
        self._num_units = decoder.model.num_units

    def tokens(self, *shape: int) -> Tensor:
        return torch.randint(4, self._vocab_size, shape, generator=self._generator)

    def widths(self, *shape: int) -> Tensor:
        picks = torch.randint(len(self._widths), (*shape, self._num_units), generator=self._generator)
        return self._widths[picks]

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self._generator))


def assert_same(actual: StepOutput | ExtendOutput, expected: StepOutput | ExtendOutput, tolerance: float) -> None:
    for name in ("logits", "residual_update", "crest"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


def singly(decoder: Decoder, tokens: Tensor, widths: Tensor, rows: Tensor | None = None) -> ExtendOutput:
    outputs = [decoder.step(tokens[:, index], widths, rows=rows) for index in range(tokens.shape[1])]
    columns = (torch.stack([getattr(o, name) for o in outputs], 1) for name in ("logits", "residual_update", "crest"))
    return ExtendOutput(*columns)


@PROPERTY
@given(seed=SEEDS)
def test_many_at_once_equal_one_by_one(opened: tuple[Open, float], seed: int) -> None:
    open_decoder, tolerance = opened
    together, alone = open_decoder(2), open_decoder(2)
    draws = Draws(together, seed)
    prompt = draws.tokens(2, draws.number(1, 20))
    for decoder in (together, alone):
        decoder.prefill(prompt)
    for _ in range(2):
        tokens, widths = draws.tokens(2, draws.number(1, 20)), draws.widths(2)
        assert_same(together.extend(tokens, widths), singly(alone, tokens, widths), tolerance)
    assert together.lengths.tolist() == alone.lengths.tolist()


@PROPERTY
@given(seed=SEEDS)
def test_what_is_cut_off_had_never_been_there(opened: tuple[Open, float], seed: int) -> None:
    open_decoder, tolerance = opened
    cut, fresh = open_decoder(2), open_decoder(2)
    draws = Draws(cut, seed)
    prompt = draws.tokens(2, draws.number(1, 18))
    for decoder in (cut, fresh):
        decoder.prefill(prompt)
    kept, widths = draws.tokens(2, draws.number(1, 18)), draws.widths(2)
    for decoder in (cut, fresh):
        decoder.extend(kept, widths)
    stays = cut.lengths.clone()
    cut.extend(draws.tokens(2, draws.number(1, 18)), draws.widths(2))
    cut.truncate(stays)
    assert cut.lengths.tolist() == stays.tolist()
    again, widths = draws.tokens(2, draws.number(1, 8)), draws.widths(2)
    assert_same(cut.extend(again, widths), fresh.extend(again, widths), tolerance)


@PROPERTY
@given(seed=SEEDS)
def test_rows_of_different_lengths_do_not_see_each_other(opened: tuple[Open, float], seed: int) -> None:
    open_decoder, tolerance = opened
    batch, alone = open_decoder(3), [open_decoder(1) for _ in range(3)]
    draws = Draws(batch, seed)
    for row, decoder in enumerate(alone):
        prompt = draws.tokens(1, draws.number(1, 20))
        assert_same(batch.prefill(prompt, rows=torch.tensor([row])), decoder.prefill(prompt), tolerance)
    for _ in range(3):
        rows = torch.randperm(3, generator=draws._generator)[: draws.number(1, 3)]
        tokens, widths = draws.tokens(len(rows), draws.number(1, 4)), draws.widths(len(rows))
        output = batch.extend(tokens, widths, rows=rows)
        for place, row in enumerate(rows.tolist()):
            own = slice(place, place + 1)
            expected = alone[row].extend(tokens[own], widths[own])
            part = ExtendOutput(output.logits[own], output.residual_update[own], output.crest[own])
            assert_same(part, expected, tolerance)
        cut = torch.tensor([max(1, int(length) - draws.number(0, 2)) for length in batch.lengths])
        batch.truncate(cut)
        for row, decoder in enumerate(alone):
            decoder.truncate(cut[row : row + 1])
    assert batch.lengths.tolist() == [int(decoder.lengths) for decoder in alone]


def test_one_width_vector_serves_all_rows(opened: tuple[Open, float]) -> None:
    open_decoder, tolerance = opened
    one, many = open_decoder(2), open_decoder(2)
    draws = Draws(one, 0)
    prompt, tokens, widths = draws.tokens(2, 3), draws.tokens(2, 2), draws.widths()
    for decoder in (one, many):
        decoder.prefill(prompt)
    assert_same(one.extend(tokens, widths), many.extend(tokens, widths.expand(2, -1)), tolerance)


def test_a_refused_extension_leaves_rows_as_they_were(opened: tuple[Open, float]) -> None:
    open_decoder, tolerance = opened
    decoder, undisturbed = open_decoder(2), open_decoder(2)
    draws = Draws(decoder, 1)
    prompt = draws.tokens(2, 5)
    for each in (decoder, undisturbed):
        each.prefill(prompt)
    with pytest.raises(InputError, match="do not fit into a row of 64"):
        decoder.extend(draws.tokens(2, MAX_LENGTH - 4), draws.widths(2))
    with pytest.raises(InputError, match="bit-width 7 is not stored"):
        decoder.extend(draws.tokens(2, 3), torch.full((2, decoder.model.num_units), 7))
    assert decoder.lengths.tolist() == [5, 5]
    tokens, widths = draws.tokens(2, 2), draws.widths(2)
    assert_same(decoder.extend(tokens, widths), undisturbed.extend(tokens, widths), tolerance)


def test_rows_can_be_filled_to_the_last_token(opened: tuple[Open, float]) -> None:
    open_decoder, _ = opened
    decoder = open_decoder(1)
    draws = Draws(decoder, 2)
    decoder.prefill(draws.tokens(1, 30))
    decoder.extend(draws.tokens(1, MAX_LENGTH - 30), draws.widths(1))
    assert decoder.lengths.tolist() == [decoder.max_length] == [MAX_LENGTH]
    with pytest.raises(InputError, match="65 tokens"):
        decoder.step(draws.tokens(1), draws.widths(1))


NOT_HELD = r"rows of \[5\] tokens cannot be cut"
NO_LENGTHS = r"lengths: .* was given; give a tensor \[R\] of int64"


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        *(([6], NOT_HELD), ([-1], NOT_HELD), ([3, 3], NOT_HELD)),
        *(([2.5], NO_LENGTHS), ([True], NO_LENGTHS), (3, NO_LENGTHS)),
    ],
)
def test_rows_are_cut_to_whole_numbers_of_what_they_hold(
    opened: tuple[Open, float], lengths: list[float] | int, message: str
) -> None:
    open_decoder, _ = opened
    decoder = open_decoder(1)
    decoder.prefill(Draws(decoder, 3).tokens(1, 5))
    with pytest.raises(InputError, match=message):
        decoder.truncate(torch.tensor(lengths))
    assert decoder.lengths.tolist() == [5]


@pytest.mark.parametrize(
    ("rows", "tokens", "message"),
    [
        ([0, 0], [[5], [6]], r"rows=\[0, 0\]: name one or more of the rows 0 to 1, each of them once"),
        ([], [], r"rows=\[\]: name one or more|rows: torch.float32"),
        ([-1], [[5]], r"rows=\[-1\]: name one"),
        ([2], [[5]], r"rows=\[2\]: name one"),
        ([1.0], [[5]], "rows: torch.float32"),
        (None, [[5]], "1 sequences were given for 2 rows; give one for each"),
        (None, [[], []], "at least one token is needed"),
        (None, [5, 6], r"token ids: torch.int64 \[2\] was given; give a tensor \[R, M\] of int64"),
        (None, [[5.0], [6.0]], r"token ids: torch.float32 \[2, 1\]"),
        (None, [[5], [100_000]], "token 100000 is outside the vocabulary of"),
        (None, [[-1], [5]], "token -1 is outside the vocabulary of"),
    ],
)
def test_wrong_tokens_and_rows(opened: tuple[Open, float], rows: list[int], tokens: list[object], message: str) -> None:
    """All decoders say the same, before anything is read."""
    open_decoder, _ = opened
    decoder = open_decoder(2)
    decoder.prefill(Draws(decoder, 3).tokens(2, 5))
    chosen = None if rows is None else torch.tensor(rows, dtype=None if rows else torch.int64)
    given = torch.tensor(tokens) if any(tokens) and tokens[0] else torch.zeros(len(tokens), 0, dtype=torch.int64)
    with pytest.raises(InputError, match=message) as error:
        decoder.extend(given, Draws(decoder, 0).widths(), rows=chosen)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=message):
        decoder.prefill(given, rows=chosen)
    assert decoder.lengths.tolist() == [5, 5]


def test_one_row_and_widths_of_two(opened: tuple[Open, float]) -> None:
    open_decoder, _ = opened
    decoder = open_decoder(1)
    draws = Draws(decoder, 3)
    decoder.prefill(draws.tokens(1, 5))
    for widths in (draws.widths(2), draws.widths().float(), torch.tensor(4)):
        with pytest.raises(InputError, match="bit-widths are .*; give int64, one for each unit"):
            decoder.step(draws.tokens(1), widths)
    for tokens, message in (([100_000], "outside the vocabulary"), ([5.0], "token ids: "), ([[5]], "token ids: ")):
        with pytest.raises(InputError, match=message):
            decoder.step(torch.tensor(tokens), draws.widths())
    assert decoder.lengths.tolist() == [5]
