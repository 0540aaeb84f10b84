"""Times the choice of the next token, greedy and sampled, books included, beside torch's operations."""

from functools import partial

import torch
from _command import main

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.kernels.next_token import TokenBook, choose_token

NUM_UNITS, CAPACITY = 33, 4096
SIZES = tuple((vocab_size, temperature) for vocab_size in (32_000, 128_256, 151_936) for temperature in (0.0, 1.0))


def providers(device: torch.device, clock: Clock, vocab_size: int, temperature: float) -> list[Provider]:
    """What is timed with one vocabulary and temperature."""
    logits = torch.randn(vocab_size, device=device)
    widths = torch.full((NUM_UNITS,), 4, dtype=torch.int32, device=device)
    book = TokenBook.allocate(vocab_size, NUM_UNITS, CAPACITY, device=device)
    book.temperature.fill_(temperature)

    def plain() -> None:
        if temperature:
            (logits / temperature).softmax(-1).multinomial(1)
        else:
            logits.argmax(-1)

    facts = {"vocab": vocab_size, "temperature": temperature}
    return [
        Provider("triton", calls(clock, [partial(choose_token, logits, widths, book)]), logits.nbytes, facts),
        Provider("torch", calls(clock, [plain]), logits.nbytes, facts | {"what": "choice only"}),
    ]


if __name__ == "__main__":
    main("next_token", providers, SIZES)
