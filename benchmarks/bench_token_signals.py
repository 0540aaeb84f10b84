"""Times the signals of a step for a model of 33 units, beside torch's operations for what walks the vocabulary."""

import torch
from _harness import Case, main

from flexquant_rl.kernels.token_signals import SignalConstants, SignalState, update_signals

NUM_UNITS = 33
NUM_WIDTHS = 5


def make_cases(device: torch.device) -> list[Case]:
    """What to time."""
    cases = []
    for vocab_size in (32_000, 128_256, 151_936):
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

        def fused(
            constants=constants,
            state=state,
            logits=logits,
            statistics=statistics,
            widths=widths,
            token=token,
            count=count,
        ):
            update_signals(constants, state, logits, statistics, widths, token, count)

        def plain(logits=logits, last=last, token=token):
            log_probs = logits.log_softmax(-1).clamp_min(-110.0)
            probs = log_probs.exp()
            (probs * log_probs).sum()
            (probs * (log_probs - last)).sum()
            log_probs.topk(2)
            log_probs.index_select(0, token)
            last.copy_(log_probs)

        facts = {"op": "token_signals", "units": NUM_UNITS, "vocab": vocab_size}
        # The logits twice, the last distribution read and written.
        cases.append(Case("triton", fused, 4 * logits.nbytes, facts))
        cases.append(Case("torch", plain, 4 * logits.nbytes, facts | {"what": "the vocabulary only"}))
    return cases


if __name__ == "__main__":
    main("token_signals", make_cases)
