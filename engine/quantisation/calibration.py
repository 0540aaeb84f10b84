"""What the linears of a model are fed by a calibration text: the second moments of their inputs, layer by layer.

Only one layer's moments exist at a time, beside the hidden states of the text, so that memory does not grow with depth.
The inputs are those of the unquantised model: moments gathered after quantised layers gave no better models
(docs/weights.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import is_conv1d, is_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of one pass: bounds the memory of activations.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Calibration:
    """What a model was calibrated on; saved with its checkpoint.

    Attributes:
        num_tokens: Tokens read.
        sha256: Digest of the token ids, int64, little-endian, window after window.
        files: Names of the files that they are of; none where it was no file.
        weights: How much of the windows each file gave; none: as much as it is long.
    """

    num_tokens: int
    sha256: str
    files: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, windows: Tensor) -> Calibration:
        """Describes windows `[n, T]` int64."""
        return cls(windows.numel(), hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest())


@dataclass(frozen=True, eq=False)
class _LayerCall:
    """How the model calls a layer, without the hidden states: the same for all batches of one shape."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        output = self.layer(hidden, *self.args, **self.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


@torch.no_grad()
def input_hessians(
    hf_model: PreTrainedModel, layers: Sequence[nn.Module], stages: Sequence[Sequence[str]], windows: Tensor
) -> Iterator[Tensor]:
    """Yields the mean of ``x xᵀ`` over the tokens of a text for the inputs x of each linear.

    All inputs of a layer are gathered before its first result is yielded, and the head's before everything, so a
    linear may be replaced as soon as its result is there.

    Args:
        hf_model: The model, with all its linears as they were loaded.
        layers: Its decoder layers.
        stages: Names of the linears of each layer, in the order of `layers`; one more stage holds the head, if wanted.
        windows: `[n, T]` int64, token ids.

    Yields:
        `[K, K]` float64, in the order of the names; zero for a linear that was not called.

    Raises:
        InputError: If the windows are empty, too long, or hold ids that the model does not know.
    """
    check_windows(hf_model, windows)
    batches = windows.to(hf_model.device).split(max(1, _BATCH_TOKENS // windows.shape[1]))
    head_names = [name for stage in stages[len(layers) :] for name in stage]
    with _gathering(hf_model, head_names) as head_sums:
        hidden, calls = _enter(hf_model, layers, batches)
    for layer_idx, names in enumerate(stages[: len(layers)]):
        with _gathering(hf_model, names) as sums:
            for index, states in enumerate(hidden):
                hidden[index] = calls[len(states)][layer_idx](states)
        for name in names:
            yield sums.pop(name) / windows.numel()
    for name in head_names:
        yield head_sums.pop(name) / windows.numel()


def check_windows(hf_model: PreTrainedModel, windows: Tensor) -> None:
    """Raises InputError unless windows are int64 `[n, T]`, not empty, of ids that the model knows."""
    if windows.dim() != 2 or 0 in windows.shape or windows.dtype != torch.int64:
        raise InputError(
            f"calibration windows are {windows.dtype} {list(windows.shape)} but must be int64 [windows, tokens], at "
            "least one token; give more text"
        )
    vocab_size = int(hf_model.config.get_text_config().vocab_size)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"calibration windows hold token ids from {low} to {high}, but the model knows 0 to {vocab_size - 1}; "
            "use the model's own tokenizer"
        )


def _enter(
    hf_model: PreTrainedModel, layers: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[list[Tensor], dict[int, list[_LayerCall]]]:
    """Runs the whole model to see what reaches the first layer, and how each layer is called.

    Returns:
        The hidden states of each batch before the first layer; for each number of rows, the calls of the layers.
    """
    hidden: list[Tensor] = []
    calls: dict[int, list[_LayerCall]] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        if module is layers[0]:
            hidden.append(states)
            calls[len(states)] = []
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls[len(states)].append(_LayerCall(module, args[1:], rest))

    handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]
    head = hf_model.get_output_embeddings()
    if head is not None:
        # Registered after the hook that gathers, so that what the head computes is next to nothing.
        handles.append(head.register_forward_pre_hook(lambda _, args: (args[0][:, -1:], *args[1:])))
    try:
        for token_ids in batches:
            hf_model(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return hidden, calls


@contextmanager
def _gathering(hf_model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Sums ``x xᵀ`` over all inputs that the named linears get inside the block: `[K, K]` float64 by name."""
    linears = {name: hf_model.get_submodule(name) for name in names}
    sums: dict[str, Tensor] = {}
    for name, linear in linears.items():
        assert is_dense(linear)
        num_inputs = linear.weight.shape[0 if is_conv1d(linear) else 1]
        sums[name] = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=linear.weight.device)
    latest: list[Tensor] = []  # the last input and its product: attention and MLP feed one input to several linears

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def gather(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not latest or latest[0] is not args[0]:
                flat = args[0].reshape(-1, args[0].shape[-1]).float()
                latest[:] = [args[0], (flat.T @ flat).double()]
            sums[name] += latest[1]

        return gather

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
