"""A model run in parts: layer by layer over states that are kept, so that widths that share a beginning share the work.

The model itself makes the call of every part, with all its other layers standing aside: masks, rotary tables, final
norm and whatever a family does to its logits are its own. `can_walk` says whether that gives what a whole pass gives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flexquant_rl.engine.linear import WidthPlan, reading
from flexquant_rl.engine.model import NestedCausalLM, decoder_layers

_WALKING = threading.Lock()
"""One walker at a time: layers that stand aside do so for one thread."""
_CHECK_TOKENS = 12
_CHECK_TOLERANCE = 1e-3


class _ReachedError(Exception):
    """Ends a pass where the wanted states are known."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class LayerWalk:
    """Runs one part of a model at a time. Other threads may run the whole model meanwhile.

    Args:
        model: The model.
    """

    def __init__(self, model: NestedCausalLM) -> None:
        self.model = model
        self._layers = list(decoder_layers(model.hf_model))
        self._extras: dict[int, int] = {}  # what else a layer puts out, beside the states

    def enter(self, token_ids: Tensor) -> Tensor:
        """The states before the first layer, `[R, T]` -> `[R, T, d]`."""
        nothing = torch.empty(0, device=self.model.device)
        return self._states(token_ids, nothing, -1, self._plan_of(token_ids, None))

    def layer(self, layer_idx: int, token_ids: Tensor, states: Tensor, widths: Tensor) -> Tensor:
        """The states after a layer.

        Args:
            layer_idx: Which layer; those before it must have been run once.
            token_ids: `[R, T]` int64, for what the model makes of tokens and positions.
            states: `[R, T, d]` before the layer.
            widths: `[T, U]` int64, for all rows alike; 0 reads the unquantised weights.
        """
        return self._states(token_ids, states, layer_idx, self._plan_of(token_ids, widths))

    def logits(self, token_ids: Tensor, states: Tensor, widths: Tensor, keep: int) -> Tensor:
        """Logits at the last `keep` tokens, `[R, keep, vocab]` float32, from the states after the last layer."""
        with reading(self._plan_of(token_ids, widths, keep)):
            output: Tensor = self._call(token_ids, states, len(self._layers), keep).logits
        return output.float()

    def _states(self, token_ids: Tensor, states: Tensor, layer_idx: int, plan: WidthPlan) -> Tensor:
        try:
            with reading(plan):
                self._call(token_ids, states, layer_idx, 1)
        except _ReachedError as reached:
            return reached.states
        raise RuntimeError(f"layer {layer_idx} was never called")

    def _call(self, token_ids: Tensor, states: Tensor, layer_idx: int, keep: int) -> Any:
        """One call of the model in which only one layer works: -1 for what comes before all, L for what comes after."""
        with _WALKING:
            try:
                for index, layer in enumerate(self._layers):
                    # What the instance has hides the method of its class.
                    layer.__dict__["forward"] = self._stand_in(index, layer, layer_idx, states)
                with torch.inference_mode():
                    return self.model.hf_model(input_ids=token_ids, use_cache=False, logits_to_keep=keep)
            finally:
                for layer in self._layers:
                    layer.__dict__.pop("forward", None)

    def _stand_in(self, index: int, layer: nn.Module, layer_idx: int, states: Tensor) -> Callable[..., Any]:
        forward, walker = layer.forward, threading.get_ident()

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != walker:
                return forward(*args, **kwargs)
            if layer_idx < 0:
                raise _ReachedError(args[0] if args else kwargs["hidden_states"])
            if index == layer_idx:
                if args:
                    output = forward(states, *args[1:], **kwargs)
                else:
                    output = forward(**kwargs | {"hidden_states": states})
                is_tuple = isinstance(output, tuple)
                self._extras[index] = len(output) - 1 if is_tuple else -1
                raise _ReachedError(output[0] if is_tuple else output)
            extras = self._extras[index]
            return states if extras < 0 else (states, *[None] * extras)

        return call

    def _plan_of(self, token_ids: Tensor, widths: Tensor | None, keep: int = 1) -> WidthPlan:
        rows, length = token_ids.shape
        if widths is None:
            widths = torch.zeros(length, self.model.num_units, dtype=torch.int64)
        has_head_unit = self.model.units[-1].kind == "head"
        body = widths[:, : self.model.num_units - has_head_unit]
        head = widths[-keep:, -1].repeat(rows) if has_head_unit else None
        return WidthPlan(body.repeat(rows, 1), head, collect=0)


def can_walk(model: NestedCausalLM, token_ids: Tensor, reference: int) -> bool:
    """Whether a walk over the layers gives the logits of a whole pass, tried on a few tokens.

    A layer that reads more than its own arguments, e.g. the keys of another layer, cannot be run alone.

    Args:
        model: The model.
        token_ids: `[n, T]` int64 text.
        reference: The width that everything but the first layer is read at.
    """
    tokens = token_ids[:1, :_CHECK_TOKENS].to(model.device)
    widths = torch.full((tokens.shape[1], model.num_units), reference)
    widths[:, [unit.layer_idx == 0 for unit in model.units]] = min(model.bit_widths)
    whole = model.forward(tokens, widths[None], keep=tokens.shape[1]).logits
    walk = LayerWalk(model)
    try:
        states = walk.enter(tokens)
        for layer_idx in range(model.num_layers):
            states = walk.layer(layer_idx, tokens, states, widths)
            # Other states in between: what a layer leaves behind for a later one is then not of these.
            walk.layer(layer_idx, tokens, -states, widths)
        walked = walk.logits(tokens, states, widths, tokens.shape[1])
    except Exception:  # whatever a layer raises that misses what another one should have left behind
        return False
    error = (walked - whole).abs().max()
    return walked.shape == whole.shape and bool(error <= _CHECK_TOLERANCE * whole.abs().max())
