"""Output KL: how far a next-token distribution is from the reference's, and what the reference is."""

from __future__ import annotations

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.decoder import DecoderModel
from flexquant_rl.engine.linear import REFERENCE_WIDTH

LOGITS_AT_A_TIME = 7 << 20
"""Floats of a piece of text whose logits are looked at. Up to 32 MiB the allocator gives memory out again; beyond,
every page is a new one."""


def reference_name(model: DecoderModel) -> str:
    """The reference in words: `unquantised`, or `8-bit` where no other copy exists."""
    return "unquantised" if model.has_reference else f"{max(model.bit_widths)}-bit"


def reference_width(model: DecoderModel) -> int:
    """The width that quality is compared against: 0 (unquantised) where kept, else the largest stored."""
    return REFERENCE_WIDTH if model.has_reference else max(model.bit_widths)


def output_kl_nats(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || quantised) of next-token distributions, `[..., vocab]` -> `[...]` nats, never negative."""
    return kl_nats(reference_logits.log_softmax(-1), logits.log_softmax(-1))


def kl_nats(reference_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """KL(reference || other) of `[..., vocab]` log-probabilities -> `[...]` nats, never negative."""
    probability = reference_log_probs.exp()
    terms = probability * (reference_log_probs - log_probs)
    # A token that the reference rules out adds nothing, whatever its logits are (0 * inf is NaN).
    return terms.where(probability > 0, 0.0).sum(-1).clamp_min(0)


def logit_probes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Random vectors with the second derivative of KL(reference || other) in the logits as their covariance.

    This is ``diag(p) - p pᵀ`` of the probabilities p. What such a vector brings about in a pass backwards is, on
    average over vectors, twice the KL of an error, to second order. Unlike a label drawn from p, less its
    probabilities, a vector is never large where p is sure of one token.

    Args:
        logits: `[..., vocab]` of the reference.
        generator: Draws them, on the CPU.

    Returns:
        `[..., vocab]` in the dtype of the logits.
    """
    probes = torch.empty_like(logits)
    rows, out = logits.flatten(0, -2), probes.flatten(0, -2)
    num_rows = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
    for block, place in zip(rows.split(num_rows), out.split(num_rows), strict=True):
        root = block.float().softmax(-1).sqrt_()
        noise = torch.randn(root.shape, generator=generator).to(root.device)
        noise -= (root * noise).sum(-1, keepdim=True) * root
        place.copy_(noise.mul_(root))
    return probes


class ReferenceDistribution:
    """The reference's next-token distributions, for comparison with many others.

    With p the reference's probabilities and d the differences of the logits less their mean sum p d, KL is
    log(1 + sum p (e^d - 1)). That is one exponential for each comparison, and small KL keep their digits.

    Args:
        logits: `[..., vocab]` float32 of the reference.
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._probability = logits.softmax(-1)

    @property
    def top1(self) -> Tensor:
        """`[...]` int64, the most likely token."""
        return self._logits.argmax(-1)

    def kl_nats(self, logits: Tensor) -> Tensor:
        """KL(reference || other) of `[..., vocab]` logits -> `[...]` nats, never negative."""
        moved = logits - self._logits
        moved -= torch.linalg.vecdot(self._probability, moved)[..., None]
        kl: Tensor = torch.linalg.vecdot(self._probability, moved.expm1_()).log1p()
        if bool(kl.isfinite().all()):
            return kl.clamp_min(0)
        return output_kl_nats(self._logits, logits)  # tokens that are ruled out, or logits far apart
