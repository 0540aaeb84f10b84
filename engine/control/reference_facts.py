"""What the reference says at every token of a text: how sure it is, and of what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.engine.control.output_kl import reference_width
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM


@dataclass(frozen=True)
class ReferenceFacts:
    """The reference at the T tokens of n windows, each `[n, T]`, on the CPU.

    Attributes:
        token_entropy_nats: Entropy of the next-token distribution after the token, float32.
        top1_probability: Probability of its likeliest token, float32.
        top1_ids: That token, int64.
        token_nll_nats: Negative log-likelihood of the text's next token, float32.
    """

    token_entropy_nats: Tensor
    top1_probability: Tensor
    top1_ids: Tensor
    token_nll_nats: Tensor


def reference_facts(model: NestedCausalLM, windows: Tensor, *, first: int) -> ReferenceFacts:
    """Reads text at the reference width.

    Args:
        model: The model.
        windows: `[n, first + T + 1]` int64; the last token is only predicted.
        first: Tokens that are context only.
    """
    session = DecodeSession(model, max_length=windows.shape[1] - 1)
    widths = torch.full((model.num_units,), reference_width(model))
    columns = []
    for window in windows:
        log_probs = session.score(window[None, :-1], widths, first=first)[0].log_softmax(-1)
        following = window[first + 1 :, None].to(log_probs.device)
        top1 = log_probs.max(-1)
        facts = (-(log_probs.exp() * log_probs).sum(-1), top1.values.exp(), top1.indices)
        columns.append([*facts, -log_probs.gather(-1, following)[:, 0]])
    session.close()
    return ReferenceFacts(*(torch.stack(column).cpu() for column in zip(*columns, strict=True)))
