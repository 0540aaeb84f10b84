"""Whether a model decodes token by token as it reads a text at once: a few cheap passes before it is accepted.

Every linear that is nested is replaced for the time of the probe by a stand-in: a fixed random choice of its inputs,
scaled by the width that the token reads. That needs no weights, so the probe costs milliseconds whatever the size of
the model and comes before quantisation; what it compares is the architecture: positions, masks, cache, order of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexquant_rl.engine.decoding.kv_cache import RowCache
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import WidthPlan, active_plan, layer_hook, reading

_PROMPT_TOKENS = (2, 4)  # rows of different lengths
_STEP_TOKENS = 2
_TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest of them; families that decode well stay below 1e-5."""
_FIX = "use a decoder of plain attention layers (Llama, Qwen, Mistral, GPT-2, OPT, GPT-NeoX, Phi, Gemma)"


class _UnfitError(Exception):
    """Why a model cannot be decoded, in a few words."""


def check_decoding(
    hf_model: PreTrainedModel, unit_of: Mapping[str, int], layers: Sequence[nn.Module], max_context: int
) -> None:
    """Raises InputError unless steps of rows at positions and widths of their own give what one pass gives.

    The model is as it was afterwards, weights or none in its linears, and so is torch's random state.

    Args:
        hf_model: The model, evaluation mode, float32.
        unit_of: Unit of every linear that is or will be nested, by module name.
        layers: Its decoder layers.
        max_context: Tokens that it shall be able to hold; the last position is tried too.
    """
    name = type(hf_model).__name__
    arguments = inspect.signature(hf_model.forward).parameters
    if "position_ids" not in arguments:
        raise InputError(f"{name} takes no position_ids, so its rows cannot be at positions of their own; {_FIX}")
    if "past_key_values" not in arguments:
        raise InputError(f"{name} takes no past_key_values: without a cache it cannot decode token by token; {_FIX}")
    probe = _Probe(hf_model, unit_of, layers)
    try:
        with _stood_in(hf_model, unit_of), _observed(layers):
            probe.check_rows(max_context)
            probe.check_last_position(max_context)
    except _UnfitError as reason:
        raise InputError(f"{name} cannot be decoded token by token: {reason}; {_FIX}") from reason
    except Exception as error:  # a model that is called in a way that it does not know may raise anything
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
        raise InputError(f"{name} cannot be decoded token by token ({reason}); {_FIX}") from error


class _StandIn(nn.Module):
    """Looks like a nested linear from outside: tokens in the order of the active plan, a width for each, no `weight`."""

    def __init__(self, name: str, num_inputs: int, num_outputs: int, unit_idx: int, seed: int, device: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(num_inputs, (num_outputs,), generator=generator)
        sign = torch.randint(2, (num_outputs,), generator=generator) * 2 - 1
        self._name, self._num_inputs, self._unit_idx = name, num_inputs, unit_idx
        self._chosen, self._sign = chosen.to(device), sign.to(device, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        plan = active_plan()
        assert plan is not None
        widths = plan.groups(self._unit_idx).per_token().to(x.device, torch.float32)
        if x.numel() != len(widths) * self._num_inputs:
            raise _UnfitError(
                f"{self._name} reads {x.numel() // self._num_inputs} vectors where there are {len(widths)} tokens, so "
                "that a width per token means nothing to it"
            )
        # Of unit size, so that no outlier decides what attention looks at.
        unit = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        return unit[..., self._chosen] * self._sign * (1 + widths.view(*x.shape[:-1], 1) / 8)


class _Probe:
    """Passes over a few tokens."""

    def __init__(self, hf_model: PreTrainedModel, unit_of: Mapping[str, int], layers: Sequence[nn.Module]) -> None:
        self._hf_model = hf_model
        self._num_layers = len(layers)
        self._has_head = hf_model.get_output_embeddings() in [hf_model.get_submodule(name) for name in unit_of]
        self._num_units = max(unit_of.values()) + 1
        vocab_size = hf_model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        config = hf_model.config.get_text_config()
        special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")}
        plain = [token_id for token_id in range(min(vocab_size, 4096)) if token_id not in special] or [0]
        num_tokens = max(_PROMPT_TOKENS) + _STEP_TOKENS
        rows = torch.arange(len(_PROMPT_TOKENS))[:, None]
        columns = torch.arange(num_tokens)
        # Whatever differs from token to token: 37 and 101 divide no common size of a vocabulary.
        self._token_ids = torch.tensor(plain)[(5 + 37 * columns + 101 * rows) % len(plain)].to(hf_model.device)
        units = torch.arange(self._num_units)
        self._widths = 3 + (units + 2 * columns[:, None] + 3 * rows[..., None]) % 6  # [R, T, U], from 3 to 8

    def check_rows(self, max_context: int) -> None:
        """Compares rows that are extended together with each of them read at once."""
        lengths = [tokens + _STEP_TOKENS for tokens in _PROMPT_TOKENS]
        if max(lengths) > max_context:
            return
        cache = RowCache(self._num_layers, len(lengths), max(lengths), self._hf_model.device)
        prompts = [
            self._continue(cache, self._token_ids[row : row + 1, :count], self._widths[row : row + 1, :count], row)
            for row, count in enumerate(_PROMPT_TOKENS)
        ]
        begun = [slice(count, count + _STEP_TOKENS) for count in _PROMPT_TOKENS]
        token_ids = torch.stack([self._token_ids[row, span] for row, span in enumerate(begun)])
        widths = torch.stack([self._widths[row, span] for row, span in enumerate(begun)])
        steps = self._continue(cache, token_ids, widths, None)
        for row, length in enumerate(lengths):
            token_ids, widths = self._token_ids[row : row + 1, :length], self._widths[row : row + 1, :length]
            whole = self._logits(token_ids, widths)
            stepped = torch.cat([prompts[row], steps[row : row + 1]], dim=1)
            if not _same(stepped, whole):
                raise _UnfitError(self._why_different(token_ids, widths, whole, stepped))

    def check_last_position(self, max_context: int) -> None:
        """Compares a step to the last position with one pass over the same tokens and positions."""
        token_ids, widths = self._token_ids[:1, :4], self._widths[:1, :4]
        if max_context < 4:
            return
        positions = torch.tensor([[0, 1, 2, max_context - 1]], device=self._hf_model.device)
        caches = [RowCache(self._num_layers, 1, 4, self._hf_model.device) for _ in range(2)]
        whole = self._continue(caches[0], token_ids, widths, None, positions)
        parts = [
            self._continue(caches[1], token_ids[:, part], widths[:, part], None, positions[:, part])
            for part in (slice(0, 3), slice(3, 4))
        ]
        if not _same(torch.cat(parts, dim=1), whole):
            raise _UnfitError(f"what it makes of its first tokens changes when position {max_context - 1} is reached")

    def _why_different(self, token_ids: Tensor, widths: Tensor, whole: Tensor, stepped: Tensor) -> str:
        if bool(torch.isfinite(whole).all()):
            ends_otherwise = torch.cat([token_ids[:, :-1], token_ids[:, :1]], dim=1)
            if not _same(self._logits(ends_otherwise, widths)[:, :-1], whole[:, :-1]):
                return "it is an encoder, whose earlier tokens see the later ones"
        config = self._hf_model.config.get_text_config()
        if getattr(config, "alibi", False):
            return "its attention takes positions from the mask (ALiBi), not from position_ids"
        error = float((stepped - whole).abs().max())
        return f"its logits differ by {error:.2g} from those of the same text read at once"

    def _continue(
        self, cache: RowCache, token_ids: Tensor, widths: Tensor, row: int | None, positions: Tensor | None = None
    ) -> Tensor:
        """Appends tokens to all rows, or restarts one with them, at the cache's positions unless others are given."""
        rows = None if row is None else torch.tensor([row], device=self._hf_model.device)
        places, mask = cache.begin(token_ids.shape[1], rows, restart=row is not None)
        logits = self._logits(token_ids, widths, cache, places if positions is None else positions, mask)
        cache.commit()
        return logits

    def _logits(
        self,
        token_ids: Tensor,
        widths: Tensor,
        cache: RowCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`[R, T, vocab]`, called as `NestedCausalLM.forward` calls the model."""
        columns = widths.flatten(0, 1)
        body, head = (columns[:, :-1], columns[:, -1]) if self._has_head else (columns, None)
        keep = token_ids.shape[1]
        plan = WidthPlan(body, head, collect=0 if cache is None else keep)
        with torch.inference_mode(), reading(plan):
            output = self._hf_model(
                input_ids=token_ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=keep,
            )
        if plan.collect and len(plan.residual_update) != self._num_layers:
            raise _UnfitError(f"a pass calls {len(plan.residual_update)} of its {self._num_layers} layers")
        logits: Tensor = output.logits
        return logits.float()


def _same(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= _TOLERANCE * expected.abs().max())


@contextmanager
def _stood_in(hf_model: PreTrainedModel, unit_of: Mapping[str, int]) -> Iterator[None]:
    """Stand-ins in the places of the linears."""
    originals: dict[str, Any] = {name: hf_model.get_submodule(name) for name in unit_of}
    try:
        for seed, (name, linear) in enumerate(originals.items()):
            num_inputs, num_outputs = _shape(linear)
            stand_in = _StandIn(name, num_inputs, num_outputs, unit_of[name], seed, hf_model.device)
            hf_model.set_submodule(name, stand_in)
        yield
    finally:
        for name, linear in originals.items():
            hf_model.set_submodule(name, linear)


def _shape(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear, a Conv1D or a nested linear."""
    if hasattr(linear, "planes"):
        return linear.num_inputs, linear.planes.shape[1]
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return linear.weight.shape[0], linear.weight.shape[1]


@contextmanager
def _observed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """The layers' statistics are taken, as in every step."""
    handles = [
        layer.register_forward_hook(layer_hook(index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
