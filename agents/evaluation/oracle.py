"""An upper bound that cannot be deployed: which tokens deserve the higher widths, judged with hindsight.

The influence of a token is what its low widths do to the KL of the *whole* sequence, its own output and all later ones
through keys and values. It is estimated by ridge regression over random choices of tokens (a myopic oracle, which
looks at each token's own KL only, does worse than a static allocation). Then the best half of the tokens gets the high
widths and the sequence is really run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.evaluate import Trace, joined, trace_of_pass
from flexquant_rl.engine.control.output_kl import LOGITS_AT_A_TIME, ReferenceDistribution, reference_width
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.config import EnvConfig

_RIDGE = 16.0
_MASKS_AT_ONCE = 32


@dataclass(frozen=True)
class OracleConfig:
    """How hard to look."""

    num_masks: int = 96
    """Random choices of tokens per sequence for the regression, in pairs of a choice and its complement."""
    share_high: float = 0.5
    """Share of tokens that get the high allocation."""
    seed: int = 0
    """Seed of the choices."""


def token_oracle(
    model: NestedCausalLM,
    profile: Profile,
    windows: Tensor,
    low: Tensor,
    high: Tensor,
    env: EnvConfig,
    config: OracleConfig,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Trace:
    """Gives the tokens of most influence the allocation `high` and the others `low`, sequence by sequence.

    Args:
        model: The model.
        profile: Gives the latencies.
        windows: `[S, window_tokens]` int64.
        low: `[U]` widths.
        high: `[U]` widths, no lower than `low` in time.
        env: Shape of the episodes.
        config: How hard to look.
        progress: Wraps the loop over sequences.

    Returns:
        The real run, comparable with any policy's trace on the same windows; its `reward` is zero.
    """
    session = DecodeSession(model, max_length=env.window_tokens - 1)
    runs = []
    for index in progress(range(len(windows))):
        scorer = _MaskScorer(session, windows[index], low, high, env)
        mask = _best_mask(scorer, config, seed=config.seed + index)
        runs.append(scorer.run(mask, profile))
    session.close()
    return joined(runs)


class _MaskScorer:
    """Runs one window with a given choice of high tokens, many choices per pass."""

    def __init__(self, session: DecodeSession, window: Tensor, low: Tensor, high: Tensor, env: EnvConfig) -> None:
        self._session = session
        self._window = window
        self._low, self._high = low, high
        self._first = env.prompt_tokens
        self.num_tokens = env.max_new_tokens
        model = session.model
        base = torch.full((model.num_units,), reference_width(model))
        self._logits = session.score(window[None, :-1], base, first=self._first)
        self._reference = ReferenceDistribution(self._logits)

    def widths(self, masks: Tensor) -> Tensor:
        """`[n, T]` bool -> `[n, prompt + T, U]`: prompts at the largest width."""
        chosen = torch.where(masks[..., None], self._high, self._low)
        prompt = torch.full((len(masks), self._first, chosen.shape[-1]), max(self._session.model.bit_widths))
        return torch.cat([prompt, chosen], dim=1)

    def logits(self, masks: Tensor) -> Tensor:
        """Logits of the continuation, `[n, T, vocab]`."""
        tokens = self._window[:-1].expand(len(masks), -1)
        return self._session.score(tokens, self.widths(masks), first=self._first)

    def sequence_kl(self, masks: Tensor) -> Tensor:
        """Mean output KL of the sequence under each choice, `[n]`."""
        per_pass = max(1, min(_MASKS_AT_ONCE, LOGITS_AT_A_TIME // self._logits.numel()))
        parts = [self._reference.kl_nats(self.logits(chunk)).mean(1) for chunk in masks.split(per_pass)]
        return torch.cat(parts).cpu().double()

    def run(self, mask: Tensor, profile: Profile) -> Trace:
        """The trace of one choice `[T]`."""
        return trace_of_pass(
            self._session.model,
            profile.cost,
            self.widths(mask[None])[:, self._first :],
            self._logits.log_softmax(-1),
            self.logits(mask[None]).log_softmax(-1),
            self._window[None, self._first + 1 :],
        )


def _best_mask(scorer: _MaskScorer, config: OracleConfig, *, seed: int) -> Tensor:
    """The tokens whose high widths lower the sequence's KL most, `[T]` bool."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(config.num_masks // 2, scorer.num_tokens, generator=generator).argsort(1)
    masks = order < scorer.num_tokens // 2
    # The difference of a choice and its complement has no share of what both have in common.
    kl = scorer.sequence_kl(torch.cat([masks, ~masks])).view(2, -1)
    design = 2 * masks.double() - 1
    influence = torch.linalg.solve(
        design.T @ design + _RIDGE * torch.eye(scorer.num_tokens, dtype=torch.float64), design.T @ (kl[0] - kl[1])
    )
    num_high = round(config.share_high * scorer.num_tokens)
    best = torch.zeros(scorer.num_tokens, dtype=torch.bool)
    best[influence.argsort()[:num_high]] = True  # most negative: high widths there save most
    return best
