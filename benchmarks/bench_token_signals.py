"""Times the signals of a step for a model of 33 units, beside torch's operations for what walks the vocabulary."""

from functools import partial

import torch
from _command import main

from flexquant_rl.engine.benches.clocks import Clock
from flexquant_rl.engine.benches.harness import Provider, calls
from flexquant_rl.kernels.token_signals import SignalConstants, SignalState, update_signals

NUM_UNITS, NUM_WIDTHS = 33, 5
SIZES = ((32_000,), (128_256,), (151_936,))


def providers(device: torch.device, clock: Clock, vocab_size: int) -> list[Provider]:
    """What is timed with one vocabulary."""
    constants = SignalConstants(
        torch.randn(vocab_size, 16, device=device),
        torch.randn(NUM_UNITS, 2 * NUM_WIDTHS, device=device),
        torch.linspace(0, 1, NUM_UNITS, device=device),
        torch.full((NUM_UNITS,), 1 / NUM_UNITS, device=device),
        torch.arange(NUM_UNITS, dtype=torch.int32, device=device),
    )
    state = SignalState.allocate(constants)
    logits = 3 * torch.randn(vocab_size, device=device)
    statistics = torch.rand(2, NUM_UNITS, device=device)
    widths = torch.full((NUM_UNITS,), 4, dtype=torch.int32, device=device)
    token, count = torch.zeros(2, 1, dtype=torch.int64, device=device)
    last = torch.randn(vocab_size, device=device).log_softmax(-1)

    def plain() -> None:
        log_probs = logits.log_softmax(-1).clamp_min(-110.0)
        probs = log_probs.exp()
        (probs * log_probs).sum()
        (probs * (log_probs - last)).sum()
        log_probs.topk(2)
        log_probs.index_select(0, token)
        last.copy_(log_probs)

    fused = partial(update_signals, constants, state, logits, statistics, widths, token, count)
    facts = {"units": NUM_UNITS, "vocab": vocab_size}
    num_bytes = 4 * logits.nbytes  # the logits twice, the last distribution read and written
    return [
        Provider("triton", calls(clock, [fused]), num_bytes, facts),
        Provider("torch", calls(clock, [plain]), num_bytes, facts | {"what": "the vocabulary only"}),
    ]


if __name__ == "__main__":
    main("token_signals", providers, SIZES)
