"""How much an error of a linear's outputs matters at each token of a calibration text.

Second moments that count all tokens alike spend bits where the model does not look. KL(model || changed model) grows,
to second order, with the square of the change along ``diag(p) - p pᵀ`` of the next-token probabilities p. A random
vector with this covariance is sent back through the model. The mean square of what arrives at a linear's outputs is how
much KL a squared error costs there: at this token, of this linear, all later tokens included.

References:
    GuidedQuant, arXiv:2505.07004, section 3, weighs the moments by the gradient of the loss, for each group of outputs.
    Here the loss is the KL that we judge by, and all outputs of a linear share a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexquant_rl.engine.control.output_kl import logit_probes
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.freed_memory import return_freed_memory
from flexquant_rl.engine.quantisation.calibration import check_windows
from flexquant_rl.engine.quantisation.tuned_linear import has_bfloat16

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flexquant_rl.engine.nesting import Progress

# One probe is noisy, and the first tokens of a window, which all others look at, would outweigh the rest by far. Of the
# powers that were tried this was as good as any (docs/weights.md).
_EXPONENT = 0.5


def token_weights(
    hf_model: PreTrainedModel,
    names: Sequence[str],
    windows: Tensor,
    progress: Progress,
) -> dict[str, Tensor]:
    """Weighs the tokens of a text for each linear, by passes forwards and backwards through the model.

    Its parameters need no gradient after that. Products are in bfloat16 where the processor has it.

    Args:
        hf_model: The unquantised model.
        names: Its linears.
        windows: `[n, T]` int64, token ids.
        progress: As for `nest`.

    Returns:
        By name, `[t]` float32 with mean 1, for the t tokens that reach the linear, in the order of the text; ones where
        no token matters. A linear that no token reaches is missing.

    Raises:
        InputError: As `input_hessians`, and if a gradient is not finite.
    """
    check_windows(hf_model, windows)
    generator = torch.Generator().manual_seed(0)
    device, half = hf_model.device, has_bfloat16(hf_model.device)
    hf_model.requires_grad_(False)
    with _watching(hf_model, names) as energies:
        for tokens in progress(windows.to(device).split(1), "weighing tokens"):
            with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = hf_model(input_ids=tokens, use_cache=False).logits[0]
            logits.backward(logit_probes(logits.detach(), generator))
            del logits
            return_freed_memory()  # what stays of a window lies between what goes: the next would take new memory
    # The nearest to the loss first: what is not finite there is not finite in anything before it either.
    found = {name: _normalised(name, torch.cat(parts)) for name, parts in reversed(energies.items()) if parts}
    return dict(reversed(found.items()))


@contextmanager
def _watching(hf_model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collects, inside the block, the mean square of the gradient at the outputs of each linear, token by token."""
    energies: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def arrived(gradient: Tensor) -> None:
            energies[name].append(gradient.float().square().mean(-1).flatten())

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(arrived)

        return hook

    def begin(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        output.requires_grad_()

    handles = [hf_model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    handles.append(hf_model.get_input_embeddings().register_forward_hook(begin))
    try:
        yield energies
    finally:
        for handle in handles:
            handle.remove()


def _normalised(name: str, energy: Tensor) -> Tensor:
    num_bad = int((~torch.isfinite(energy)).sum())
    if num_bad:
        raise InputError(
            f"{name}: the gradients of {num_bad} of {len(energy)} calibration tokens are NaN or infinite, but must be "
            "finite to weigh the tokens; use other calibration text, or --method rtn without any"
        )
    weights = energy.pow(_EXPONENT)
    mean = float(weights.mean())
    return weights / mean if mean > 0 else torch.ones_like(weights)
