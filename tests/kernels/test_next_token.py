"""The choice of a token and its books."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexquant_rl.kernels.next_token import TokenBook, choose_token

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison_empty")

NUM_UNITS = 3


@pytest.fixture
def book(device: torch.device) -> TokenBook:
    return TokenBook.allocate(2500, NUM_UNITS, 4, device=device)


def logits_of(device: torch.device, size: int = 2500) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(4)).to(device)


def widths_of(device: torch.device, *widths: int) -> Tensor:
    return torch.tensor(widths, dtype=torch.int32, device=device)


def test_greedy_and_the_books(device: torch.device, book: TokenBook) -> None:
    logits = logits_of(device)
    book.position.fill_(7)
    logits[3] = logits[1500] = logits[2400] = 9.0  # of equal scores the first
    assert choose_token(logits, widths_of(device, 8, 8, 8), book, is_first=True) is book.token
    assert (int(book.token), int(book.position), int(book.count)) == (3, 7, 0)
    logits[2499] = 10.0
    choose_token(logits, widths_of(device, 3, 4, 6), book)
    assert (int(book.token), int(book.position), int(book.count)) == (2499, 8, 1)
    assert book.token_log[:2].tolist() == [3, 2499]
    assert book.width_log[:2].tolist() == [[8, 8, 8], [3, 4, 6]]
    for _ in range(5):  # a full log takes no more, and nothing beyond it is touched
        choose_token(logits, widths_of(device, 5, 5, 5), book)
    assert int(book.count) == 6
    assert book.token_log.tolist() == [3, 2499, 2499, 2499]


def test_impossible_tokens(device: torch.device, book: TokenBook) -> None:
    logits = torch.full((2500,), float("-inf"), device=device)
    logits[2100] = -5.0
    assert int(choose_token(logits, widths_of(device, 8, 8, 8), book)) == 2100
    book.temperature.fill_(2.0)
    assert int(choose_token(logits, widths_of(device, 8, 8, 8), book)) == 2100


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nothing_but_nan_is_a_token_that_exists(device: torch.device) -> None:
    """The next step reads it: beyond the vocabulary it would end the process on a GPU."""
    for size in (83, 2500):
        book = TokenBook.allocate(size, NUM_UNITS, 4, device=device)
        for temperature in (0.0, 1.0):
            book.temperature.fill_(temperature)
            token = choose_token(torch.full((size,), torch.nan, device=device), widths_of(device, 8, 8, 8), book)
            assert 0 <= int(token) < size


def test_the_largest_noise_is_finite(device: torch.device) -> None:
    """This seed's first number for token 5 has 24 ones in front, which is 1 if it is rounded to float32."""
    logits = torch.zeros(8, device=device)
    logits[5] = -1000.0
    book = TokenBook.allocate(len(logits), NUM_UNITS, 4, device=device)
    book.temperature.fill_(1.0)
    book.seed.fill_(16_148_477)
    assert int(choose_token(logits, widths_of(device, 8, 8, 8), book, is_first=True)) != 5


def draws(device: torch.device, logits: Tensor, temperature: float, seed: int, count: int) -> list[int]:
    book = TokenBook.allocate(len(logits), NUM_UNITS, count, device=device)
    book.temperature.fill_(temperature)
    book.seed.fill_(seed)
    for index in range(count):
        choose_token(logits, widths_of(device, 8, 8, 8), book, is_first=index == 0)
    return book.token_log.tolist()


def test_sampling_is_a_function_of_the_seed(device: torch.device) -> None:
    logits = logits_of(device, 300)
    one = draws(device, logits, 1.0, 5, 12)
    assert one == draws(device, logits, 1.0, 5, 12)
    assert one != draws(device, logits, 1.0, 6, 12)
    assert one != draws(device, logits, 1.0, 5 + (1 << 32), 12)
    assert len(set(one)) > 6
    assert set(draws(device, logits, 1e-6, 5, 5)) == {int(logits.argmax())}


def test_sampling_follows_the_distribution(device: torch.device) -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0], device=device)
    temperature, count = 2.5, 200
    seen = torch.bincount(torch.tensor(draws(device, logits, temperature, 1, count)), minlength=4) / count
    expected = (logits / temperature).softmax(0).cpu()
    deviation = (expected * (1 - expected) / count).sqrt()
    assert bool(((seen - expected).abs() < 4 * deviation).all())


def test_bad_arguments(device: torch.device, book: TokenBook) -> None:
    with pytest.raises(ValueError, match="logits is torch.float16"):
        choose_token(logits_of(device).half(), widths_of(device, 8, 8, 8), book)
    with pytest.raises(ValueError, match=r"bit_widths is torch.int32 \[2\]"):
        choose_token(logits_of(device), widths_of(device, 8, 8), book)
    with pytest.raises(ValueError, match="best score"):
        choose_token(logits_of(device, 4000), widths_of(device, 8, 8, 8), book)


@pytest.mark.gpu
def test_real_size_on_a_gpu(device: torch.device) -> None:
    logits = logits_of(device, 151_936)
    book = TokenBook.allocate(len(logits), NUM_UNITS, 4, device=device)
    assert int(choose_token(logits, widths_of(device, 8, 8, 8), book)) == int(logits.argmax())
