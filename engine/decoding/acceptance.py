"""Which drafts stay: what comes out is distributed as if the verifying widths had made each token alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.decoder import greedy_tokens
from flexquant_rl.engine.decoding.next_token import token_probs


@dataclass(frozen=True)
class Acceptance:
    """What a verification gives.

    Attributes:
        num_accepted: Drafts that stay, from the first on.
        next_token_id: The token behind them: the corrected one in place of the first draft that fell, or one more.
    """

    num_accepted: int
    next_token_id: int


class DraftSampler:
    """Drafts tokens of one sequence and accepts them by speculative sampling; at temperature 0 both are greedy.

    A draft x from distribution q is kept with probability min(1, p(x) / q(x)), where p is the verifying distribution.
    In place of the first that falls comes a token from max(p - q, 0), normalised. Both distributions are cut to their
    nuclei in the same way, so the result has p's.

    Args:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Only the likeliest tokens whose probabilities reach this sum are sampled.
        seed: Seed of the sequence's own generator.

    References:
        Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def draft(self, logits: Tensor) -> tuple[int, Tensor | None]:
        """A token of `[vocab]` logits and the probabilities `[vocab]` that it was drawn from; None if greedy."""
        if self._temperature == 0:
            return int(greedy_tokens(logits[None])), None
        probs = token_probs(logits, self._temperature, self._top_p)
        return self._drawn(probs), probs

    def accept(self, draft_ids: Sequence[int], draft_probs: Sequence[Tensor | None], logits: Tensor) -> Acceptance:
        """Settles drafts.

        Args:
            draft_ids: k tokens.
            draft_probs: What each was drawn from, `[vocab]`; None for a token that was certain, as a copied one is.
            logits: `[k + 1, vocab]` of the verifying pass, before each draft and behind the last.
        """
        if self._temperature == 0:
            wanted = greedy_tokens(logits).tolist()
            kept = 0
            while kept < len(draft_ids) and draft_ids[kept] == wanted[kept]:
                kept += 1
            return Acceptance(kept, wanted[kept])
        for index, (token_id, drawn_from) in enumerate(zip(draft_ids, draft_probs, strict=True)):
            probs = token_probs(logits[index], self._temperature, self._top_p)
            drafted = 1.0 if drawn_from is None else float(drawn_from[token_id])
            if float(torch.rand((), generator=self._generator)) * drafted < float(probs[token_id]):
                continue
            left = probs.clone()
            if drawn_from is None:
                left[token_id] = 0.0
            else:
                left = (left - drawn_from).clamp_min_(0.0)
            # Nothing is left where p = q up to rounding: then the draft was as good as any.
            return Acceptance(index, self._drawn(left if float(left.sum()) > 0 else probs))
        return Acceptance(len(draft_ids), self._drawn(token_probs(logits[-1], self._temperature, self._top_p)))

    def _drawn(self, probs: Tensor) -> int:
        return int(torch.multinomial(probs, 1, generator=self._generator))
