"""How much the errors of a width matter at every token and unit of a text, from gradients.

Behind every linear a gate lets the errors of its weights in, one gate for each token and unit, all of them closed. To
second order the KL of the whole sequence is half the Fisher information of the gates. Its diagonal is what the errors
of one (token, unit) alone add to the outputs of this token and, through keys and values, of all later ones. A backward
pass of the logits in a random direction is a sample of it for all gates at once, where trying each gate would take a
forward pass apiece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from flexquant_rl.engine.control.output_kl import reference_width
from flexquant_rl.engine.linear import NestedLinear, logits_under
from flexquant_rl.engine.model import NestedCausalLM


def influences(
    model: NestedCausalLM, windows: Tensor, bit_width: int, *, first: int, num_samples: int, generator: torch.Generator
) -> Tensor:
    """KL that the errors of one width at a (token, unit) alone add to all tokens from there on, in nats.

    Args:
        model: The model, with reference weights where it has them.
        windows: `[S, first + T]` int64.
        bit_width: Whose errors are let in.
        first: Tokens of the prompts, which have none.
        num_samples: Directions; the logarithm of what is returned has a variance of about 2 / num_samples.
        generator: Draws them.

    Returns:
        `[S, T, U]` float32.
    """
    num_rows, length = windows.shape
    keep = length - first
    shape = (num_rows, keep, model.num_units)
    gates = torch.zeros(shape, dtype=torch.float32, device=model.device, requires_grad=True)
    base = torch.full((num_rows, length, model.num_units), reference_width(model))
    plan = model.width_plan(base, keep=keep, collect=0)
    with torch.enable_grad(), _gated(model, gates, bit_width, first):
        logits = logits_under(plan, model.hf_model, windows.to(model.device), keep=keep)
        probability = logits.detach().softmax(-1)
        squares = torch.zeros_like(gates)
        for _ in range(num_samples):
            noise = torch.randn(probability.shape, generator=generator, dtype=torch.float32)
            noise = noise.to(model.device) * probability.sqrt()
            direction = noise - probability * noise.sum(-1, keepdim=True)
            (gradient,) = torch.autograd.grad(logits, gates, direction, retain_graph=True)
            squares += gradient.square()
    return squares.detach().cpu() / (2 * num_samples)


@contextmanager
def _gated(model: NestedCausalLM, gates: Tensor, bit_width: int, first: int) -> Iterator[None]:
    """Inside the block each linear adds its errors times the gates of its unit."""
    model.dense_cache.clear()  # matrices that were decoded in inference mode have no gradients
    padded = F.pad(gates, (0, 0, first, 0))

    def opened(linear: NestedLinear) -> RemovableHandle:
        errors = linear.dense(bit_width) - linear.dense(reference_width(model))
        is_head = model.units[linear.unit_idx].kind == "head"
        gate = (gates if is_head else padded)[..., linear.unit_idx, None]

        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # The gate is closed: only its own gradient passes here, none to what the errors are made of.
            return output + gate * F.linear(args[0].detach(), errors)

        return linear.register_forward_hook(hook)

    handles = [opened(linear) for linear in model.nested_linears().values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.dense_cache.clear()
