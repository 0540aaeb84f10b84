"""Where a width's output KL comes from: keys and values that the past wrote at it, or the token's own step.

A token of the text is read twice more. Once at the width, behind a past that the reference wrote: what is left is its
own step. Once by the reference, behind a past that the width wrote: what is left is the past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.engine.control.output_kl import ReferenceDistribution, reference_width
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM

_CACHE_BYTES = 1 << 28
"""Keys and values of the rows that are stepped together."""


@dataclass(frozen=True)
class PastKl:
    """Output KL by its origin, `[W, n, P]` float32 nats on the CPU.

    Attributes:
        own_step: The token is read at the width, all before it by the reference.
        past: All before the token is read at the width, the token by the reference.
    """

    own_step: Tensor
    past: Tensor


def past_kl_nats(
    model: NestedCausalLM,
    windows: Tensor,
    bit_widths: Sequence[int],
    *,
    places: Tensor,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> PastKl:
    """Reads tokens of a text behind the pasts of the reference and of each width.

    Args:
        model: The model.
        windows: `[n, T]` int64.
        bit_widths: W stored widths, in every unit alike.
        places: `[P]` int64, which tokens of each window.
        progress: Wraps the loop over windows.
    """
    shape = (len(bit_widths), len(windows), len(places))
    found = PastKl(*(torch.empty(shape, dtype=torch.float32) for _ in range(2)))
    base = reference_width(model)
    for row in progress(range(len(windows))):
        window = windows[row].to(model.device)
        clean = _read(model, window, base)
        widths = torch.full((model.num_units,), base)
        reference = clean.score(window[None], widths)[0, places]
        found.own_step[:, row] = _stepped(clean, window, places, bit_widths, reference)
        clean.close()
        for index, bit_width in enumerate(bit_widths):
            written = _read(model, window, bit_width)
            found.past[index, row] = _stepped(written, window, places, [base], reference)[0]
            written.close()
    return found


def _read(model: NestedCausalLM, window: Tensor, bit_width: int) -> DecodeSession:
    """A session whose one row holds a window, every token read at the same width."""
    session = DecodeSession(model, max_length=len(window))
    session.prefill(window[None], bit_widths=torch.full((model.num_units,), bit_width))
    return session


def _stepped(
    session: DecodeSession, window: Tensor, places: Tensor, bit_widths: Sequence[int], reference: Tensor
) -> Tensor:
    """KL of tokens of a window, `[W, P]`, each read at some widths behind what the session holds of what is before it.

    Args:
        session: Holds the window `[T]`.
        window: `[T]` int64.
        places: `[P]` int64.
        bit_widths: Widths of each token's own step.
        reference: `[P, vocab]` logits after these tokens.
    """
    chunks = torch.arange(len(places)).split(max(1, _CACHE_BYTES // session.num_bytes))
    parts = []
    for chunk in chunks:
        branches, base = session.branches(places[chunk]), ReferenceDistribution(reference[chunk])
        kl = []
        for bit_width in bit_widths:
            widths = torch.full((session.model.num_units,), bit_width)
            kl.append(base.kl_nats(branches.step(window[places[chunk]], widths).logits).cpu())
            branches.truncate(places[chunk])
        branches.close()
        parts.append(torch.stack(kl))
    return torch.cat(parts, dim=1)
