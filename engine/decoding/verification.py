"""Which drafts are kept: those that the verify widths would have chosen, in greedy and in sampled decoding.

Sampled decoding keeps or replaces drafts by rejection sampling, so that what comes out is distributed as if there had
been no drafts (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexquant_rl.engine.decoding.decoder import greedy_tokens
from flexquant_rl.engine.decoding.next_token import Sampler


def settled_tokens(
    logits: Tensor, draft_ids: Sequence[int], draft_probs: Sequence[Tensor | None], sampler: Sampler, row: int
) -> list[int]:
    """The accepted drafts, and the token gained after them.

    Args:
        logits: `[k + 1, vocab]` float32 of the verify pass, at the token before each draft and at the last draft.
        draft_ids: The k drafts.
        draft_probs: What each was sampled from, `[vocab]` float32; None if there was no choice.
        sampler: How the row is sampled.
        row: Index of the row.

    Returns:
        1 to k + 1 tokens.
    """
    if sampler.is_greedy(row):
        chosen: list[int] = greedy_tokens(logits).tolist()
        accepted = 0
        while accepted < len(draft_ids) and draft_ids[accepted] == chosen[accepted]:
            accepted += 1
        return chosen[: accepted + 1]
    kept: list[int] = []
    for place, (draft_id, draft) in enumerate(zip(draft_ids, draft_probs, strict=True)):
        target = sampler.distribution(logits[place], row)
        offered = 1.0 if draft is None else float(draft[draft_id])
        if sampler.uniform(row) * offered < float(target[draft_id]):
            kept.append(draft_id)
            continue
        return [*kept, sampler.draw(_residual(target, draft_id, draft), row)]
    return [*kept, sampler.draw(sampler.distribution(logits[-1], row), row)]


def _residual(target: Tensor, draft_id: int, draft: Tensor | None) -> Tensor:
    """What a rejected draft is replaced from: the target where it exceeds the draft's distribution, not normalised."""
    if draft is None:
        rest = target.clone()
        rest[draft_id] = 0
    else:
        rest = (target - draft).clamp_min_(0)
    # Equal distributions reject nothing but for rounding.
    return rest if bool(rest.any()) else target
