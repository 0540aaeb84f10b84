"""Times the choice of the next token, greedy and sampled, books included, beside torch's operations."""

import torch
from _harness import Case, main

from flexquant_rl.kernels.next_token import TokenBook, choose_token


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for vocab_size in (32_000, 128_256, 151_936):
        logits = torch.randn(vocab_size, device=device)
        widths = torch.full((33,), 4, dtype=torch.int32, device=device)
        for temperature in (0.0, 1.0):
            book = TokenBook.allocate(vocab_size, 33, 4096, device=device)
            book.temperature.fill_(temperature)
            facts = {"op": "next_token", "vocab": vocab_size, "temperature": temperature}

            def fused(logits=logits, widths=widths, book=book):
                choose_token(logits, widths, book)

            def plain(logits=logits, temperature=temperature):
                if temperature:
                    (logits / temperature).softmax(-1).multinomial(1)
                else:
                    logits.argmax(-1)

            cases += [
                Case("triton", fused, logits.nbytes, facts),
                Case("torch", plain, logits.nbytes, facts | {"what": "choice only"}),
            ]
    return cases


if __name__ == "__main__":
    main("next_token", make_cases)
