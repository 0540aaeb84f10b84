"""How much the errors of widths matter at every token and unit of a text, from gradients.

Behind every linear a gate lets the errors of its weights in, one gate for each token and unit, all of them closed. To
second order the KL of the whole sequence is half the Fisher information of the gates. Its diagonal is what the errors
of one (token, unit) alone add to the outputs of this token and, through keys and values, of all later ones. The gates
of a token opened together give the same of the token. A backward pass of the logits in a random direction is a sample
of both for all gates at once, where trying each gate would take a forward pass apiece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from flexquant_rl.engine.control.output_kl import LOGITS_AT_A_TIME, logit_probes, reference_width
from flexquant_rl.engine.linear import NestedLinear, logits_under
from flexquant_rl.engine.model import NestedCausalLM


@dataclass(frozen=True)
class Influence:
    """KL that errors at one place alone add to all tokens from there on, in nats.

    Attributes:
        units: `[S, T, U]` float32, of a unit at a token.
        tokens: `[S, T]` float32, of all units of a token together.
    """

    units: Tensor
    tokens: Tensor


def influences(
    model: NestedCausalLM,
    windows: Tensor,
    bit_widths: Tensor,
    *,
    first: int,
    num_samples: int,
    generator: torch.Generator,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Influence:
    """What the errors of an allocation do at each token and unit of a text.

    Args:
        model: The model, with reference weights where it has them.
        windows: `[S, first + T]` int64.
        bit_widths: `[U]`, whose errors are let in.
        first: Tokens of the prompts, which have none.
        num_samples: Directions; the logarithm of what is returned has a variance of about 2 / num_samples.
        generator: Draws them.
        progress: Wraps the loop over pieces of the text.
    """
    per_pass = max(1, LOGITS_AT_A_TIME // ((windows.shape[1] - first) * model.vocab_size))
    with torch.enable_grad(), _gated(model, bit_widths, first) as gates:
        pieces = progress(windows.split(per_pass))
        parts = [_of_part(model, part, gates, first, num_samples, generator) for part in pieces]
    return Influence(*(torch.cat([getattr(part, name) for part in parts]) for name in ("units", "tokens")))


class _Gates:
    """The gates of the rows that are read now, `[R, T, U]`."""

    values: Tensor


def _of_part(
    model: NestedCausalLM, windows: Tensor, gates: _Gates, first: int, num_samples: int, generator: torch.Generator
) -> Influence:
    num_rows, length = windows.shape
    keep = length - first
    gates.values = torch.zeros(
        num_rows, keep, model.num_units, dtype=torch.float32, device=model.device, requires_grad=True
    )
    base = torch.full((num_rows, length, model.num_units), reference_width(model))
    plan = model.width_plan(base, keep=keep, collect=0)
    logits = logits_under(plan, model.hf_model, windows.to(model.device), keep=keep)
    units = torch.zeros_like(gates.values)
    tokens = torch.zeros(num_rows, keep, device=model.device)
    for _ in range(num_samples):
        probes = logit_probes(logits.detach(), generator)
        (gradient,) = torch.autograd.grad(logits, gates.values, probes, retain_graph=True)
        units += gradient.square()
        tokens += gradient.sum(-1).square()
    return Influence(*(squares.detach().cpu() / (2 * num_samples) for squares in (units, tokens)))


@contextmanager
def _gated(model: NestedCausalLM, bit_widths: Tensor, first: int) -> Iterator[_Gates]:
    """Inside the block each linear adds its errors times the gates of its unit."""
    model.dense_cache.clear()  # autograd keeps no matrix that was decoded in inference mode
    gates = _Gates()

    def opened(linear: NestedLinear) -> RemovableHandle:
        unit_idx = linear.unit_idx
        errors = linear.dense(int(bit_widths[unit_idx])) - linear.dense(reference_width(model))
        is_head = model.units[unit_idx].kind == "head"

        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            gate = gates.values[..., unit_idx, None]
            # The gate is closed: only its own gradient passes here, none to what the errors are made of.
            return output + (gate if is_head else F.pad(gate, (0, 0, first, 0))) * F.linear(args[0].detach(), errors)

        return linear.register_forward_hook(hook)

    handles = [opened(linear) for linear in model.nested_linears().values()]
    model.dense_cache.clear()  # of the width, whose errors are kept
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()
        model.dense_cache.clear()
