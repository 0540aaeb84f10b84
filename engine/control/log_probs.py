"""How likely a token was where it was chosen, and which others were likelier: what logits say of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexquant_rl.engine.errors import InputError


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probabilities at one place of a text, of the model's output before temperature and nucleus.

    Attributes:
        token_id: The token that stands there.
        log_prob_nats: Its log-probability.
        likeliest: Token and log-probability of the likeliest ones, as many as were asked for, likeliest first.
    """

    token_id: int
    log_prob_nats: float
    likeliest: tuple[tuple[int, float], ...]


def token_log_probs(logits: Tensor, token_id: int, num_likeliest: int) -> TokenLogProbs:
    """What `[vocab]` logits say of a token and of the likeliest ones."""
    log_probs = logits.double().log_softmax(-1).cpu()
    values, ids = log_probs.topk(num_likeliest)
    likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogProbs(token_id, float(log_probs[token_id]), likeliest)


def check_num_likeliest(num_likeliest: int | None, vocab_size: int) -> None:
    """Raises InputError unless a vocabulary has so many tokens; None asks for no log-probabilities."""
    if num_likeliest is not None and not 0 <= num_likeliest <= vocab_size:
        raise InputError(f"log_probs={num_likeliest} must be 0 to {vocab_size}, the tokens of the vocabulary")
