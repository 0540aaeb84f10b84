"""What the linears of a model are fed by a calibration text: the second moments of their inputs, layer by layer.

Only one layer's moments exist at a time, beside the hidden states of the text, so that memory does not grow with depth.
The inputs are those of the unquantised model: moments gathered after quantised layers gave no better models
(docs/weights.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
# Inputs of one block of second moments: only blocks on and above the diagonal are multiplied.
_BLOCK_INPUTS = 512


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
    hf_model: PreTrainedModel,
    layers: Sequence[nn.Module],
    stages: Sequence[Sequence[str]],
    windows: Tensor,
    weights: Mapping[str, Tensor],
) -> Iterator[Tensor]:
    """Yields the weighted mean of ``x xᵀ`` over the tokens of a text for the inputs x of each linear.

    All inputs of a layer are gathered before its first result is yielded, and no layer runs again after that, so a
    linear may be replaced as soon as its result is there.

    Args:
        hf_model: The model, with all its linears as they were loaded.
        layers: Its decoder layers.
        stages: Names of the linears of each layer, in the order of `layers`; one more stage holds the head, if wanted.
        windows: `[n, T]` int64, token ids.
        weights: How much each token counts, by the linear's name: `[t]` of mean 1 for the t tokens that reach it, in
            the order of the text (token_weights.py). All count alike for a linear that has none.

    Yields:
        `[K, K]` float64, in the order of the names; zero for a linear that was not called.

    Raises:
        InputError: If the windows are empty, too long, or hold ids that the model does not know.
    """
    check_windows(hf_model, windows)
    batches = windows.to(hf_model.device).split(max(1, _BATCH_TOKENS // windows.shape[1]))
    returned = _what_layers_return(hf_model, layers, windows[:1, :1].to(hf_model.device))
    hidden, calls = _enter(hf_model, layers, returned, batches)
    for layer_idx, names in enumerate(stages[: len(layers)]):
        with _gathering(hf_model, names, weights) as sums:
            for index, states in enumerate(hidden):
                hidden[index] = calls[len(states)][layer_idx](states)
        for name in names:
            yield sums.pop(name).result() / windows.numel()
    head_names = [name for stage in stages[len(layers) :] for name in stage]
    if head_names:
        with _gathering(hf_model, head_names, weights) as sums:
            _leave(hf_model, layers, returned, zip(batches, hidden, strict=True))
        for name in head_names:
            yield sums.pop(name).result() / windows.numel()


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


def _what_layers_return(
    hf_model: PreTrainedModel, layers: Sequence[nn.Module], token_ids: Tensor
) -> list[tuple[Any, ...] | None]:
    """What each layer returns behind its hidden states, in a run of one token; None where it returns them alone.

    No model that can be nested has numbers there that follow from the text: without a cache and without attentions
    asked for there is nothing.
    """
    returned: list[tuple[Any, ...] | None] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        returned.append(output[1:] if isinstance(output, tuple) else None)

    handles = [layer.register_forward_hook(watch) for layer in layers]
    try:
        hf_model(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return returned


def _enter(
    hf_model: PreTrainedModel,
    layers: Sequence[nn.Module],
    returned: Sequence[tuple[Any, ...] | None],
    batches: Sequence[Tensor],
) -> tuple[list[Tensor], dict[int, list[_LayerCall]]]:
    """Runs what is around the layers to see what reaches the first of them, and how each is called.

    Returns:
        The hidden states of each batch before the first layer; for each number of rows, the calls of the layers.
    """
    hidden: list[Tensor] = []
    calls: dict[int, list[_LayerCall]] = {}

    def watch(layer_idx: int, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if layer_idx == 0:
            hidden.append(states)
            calls[len(states)] = []
        calls[len(states)].append(_LayerCall(layers[layer_idx], args, kwargs))
        return states

    with _standing_in(layers, returned, watch), _one_token_of_the_head(hf_model):
        for token_ids in batches:
            hf_model(input_ids=token_ids, use_cache=False)
    return hidden, calls


def _leave(
    hf_model: PreTrainedModel,
    layers: Sequence[nn.Module],
    returned: Sequence[tuple[Any, ...] | None],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Runs what is around the layers once more to feed the head: batches of token ids and what left the last layer."""
    last = len(layers) - 1
    for token_ids, left in batches:

        def hand_on(layer_idx: int, states: Tensor, *_: Any, left: Tensor = left) -> Tensor:
            return left if layer_idx == last else states

        with _standing_in(layers, returned, hand_on), _one_token_of_the_head(hf_model):
            hf_model(input_ids=token_ids, use_cache=False)


@contextmanager
def _standing_in(
    layers: Sequence[nn.Module],
    returned: Sequence[tuple[Any, ...] | None],
    stand_in: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor],
) -> Iterator[None]:
    """Inside the block layers do not run: `stand_in` makes their hidden states of what they are given, index first."""

    def forward_of(layer_idx: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            result, behind = stand_in(layer_idx, states, rest, kwargs), returned[layer_idx]
            return result if behind is None else (result, *behind)

        return forward

    with replaced_forwards(layers, [forward_of(layer_idx) for layer_idx in range(len(layers))]):
        yield


@contextmanager
def replaced_forwards(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Inside the block each layer runs the function at its place; after it what it ran before."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.__dict__["forward"] = forward  # what the instance has hides the method of its class
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = before


@contextmanager
def _one_token_of_the_head(hf_model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the head multiplies the last token only, and hooks from before see all of its input."""
    head = hf_model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


class _SecondMoments:
    """The sum of ``x xᵀ``, `[K, K]` float64, of which the upper triangle is added up, block by block."""

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        self._sum = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Adds the products of inputs `[t, K]` float32; each block of inputs with itself and all later inputs."""
        for start in range(0, x.shape[1], _BLOCK_INPUTS):
            block = x[:, start : start + _BLOCK_INPUTS]
            self._sum[start : start + block.shape[1], start:] += block.T @ x[:, start:]

    def result(self) -> Tensor:
        """The whole sum."""
        return self._sum.triu_().add_(self._sum.triu(1).T)


@contextmanager
def _gathering(
    hf_model: PreTrainedModel, names: Sequence[str], weights: Mapping[str, Tensor]
) -> Iterator[dict[str, _SecondMoments]]:
    """Sums ``x xᵀ`` over all inputs x that the named linears get inside the block, by name, each with its weight."""
    linears = {name: hf_model.get_submodule(name) for name in names}
    sums: dict[str, _SecondMoments] = {}
    for name, linear in linears.items():
        assert is_dense(linear)
        num_inputs = linear.weight.shape[0 if is_conv1d(linear) else 1]
        sums[name] = _SecondMoments(num_inputs, linear.weight.device)
    num_seen = dict.fromkeys(names, 0)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def gather(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            if name in weights:
                x = x * weights[name][num_seen[name] : num_seen[name] + len(x), None].sqrt()
                num_seen[name] += len(x)
            sums[name].add(x)

        return gather

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
