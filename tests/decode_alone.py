"""The slow way that episodes are compared with: one sequence, decoded alone, one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM


@dataclass
class Slow:
    """What one sequence gives when it is decoded alone; lists over steps."""

    kl: list[float]
    nll: list[float]
    agrees: list[bool]
    tokens: list[int]


def decode_alone(
    model: NestedCausalLM, window: Tensor, widths: Tensor, choose: Callable[[Tensor], int] | None = None
) -> Slow:
    """Two single-row sessions, stepped side by side.

    Args:
        model: With its unquantised weights.
        window: Prompt and text, `[T]`; the last token follows the last step.
        widths: `[steps, U]`.
        choose: Continues freely, from the logits `[V]`; default: the text.
    """
    steps = len(widths)
    prompt = len(window) - steps - 1
    quantised, reference = (DecodeSession(model, max_length=prompt + steps) for _ in range(2))
    unquantised = torch.zeros(model.num_units, dtype=torch.int64)
    output = quantised.prefill(window[None, :prompt])
    reference.prefill(window[None, :prompt], bit_widths=unquantised)
    token = int(window[prompt]) if choose is None else choose(output.logits[0])
    slow = Slow([], [], [], [])
    for step in range(steps):
        slow.tokens.append(token)
        q = quantised.step(torch.tensor([token]), widths[step]).logits[0].double()
        p = reference.step(torch.tensor([token]), unquantised).logits[0].double()
        token = int(window[prompt + step + 1]) if choose is None else choose(q)
        log_q, log_p = q - q.logsumexp(0), p - p.logsumexp(0)
        slow.kl.append(sum(float(log_p[i].exp() * (log_p[i] - log_q[i])) for i in range(len(log_p))))
        slow.nll.append(-float(log_q[token]))
        slow.agrees.append(int(q.argmax()) == int(p.argmax()))
    return slow
