"""Whether a model decodes token by token as it reads a text at once: a few cheap passes before it is accepted.

Every linear that is nested is replaced for the time of the probe by a stand-in: a fixed random choice of its inputs,
scaled by the width that the token reads. That needs no weights, so the probe costs milliseconds whatever the size of
the model and comes before quantisation; what it compares is the architecture: positions, masks, cache, order of tokens.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexquant_rl.engine.errors import InputError, first_line
from flexquant_rl.engine.linear import WidthPlan, layer_hook, logits_under

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flexquant_rl.engine.decoding.kv_cache import RowCache

_NUM_TOKENS = 5
_TINY = 1e-6
_BY_POSITION = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on the position alone; others may change with the length of the sequence."""
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
    call = _Call()
    probe = _Probe(hf_model, max(unit_of.values()) + 1, len(layers), call)
    try:
        with _stood_in(hf_model, unit_of, call), _observed(layers):
            if max_context >= _NUM_TOKENS:
                probe.check_rows()
                if not _rotates_by_position(hf_model):
                    probe.check_last_position(max_context)
    except Exception as error:  # a model that is called in a way that it does not know may raise anything
        raise InputError(f"{name} cannot be decoded token by token: {_reason(hf_model, error)}; {_FIX}") from error


def _rotates_by_position(hf_model: PreTrainedModel) -> bool:
    found = rotations(hf_model.config.get_text_config())
    return bool(found) and all(rotation["rope_type"] in _BY_POSITION for rotation in found)


def rotations(config: Any) -> list[dict[str, Any]]:
    """The parameters of a configuration's rotary embeddings, each with its `rope_type`.

    Some models have some for each type of layer.
    """
    found = getattr(config, "rope_parameters", None) or {}
    return [part for part in (found, *found.values()) if isinstance(part, dict) and "rope_type" in part]


def _reason(hf_model: PreTrainedModel, error: Exception) -> str:
    config = hf_model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention, whose linears read the cache and not the new tokens alone"
    if getattr(config, "alibi", False):
        return "its attention takes positions from the mask (ALiBi), not from position_ids"
    line = first_line(error)
    if isinstance(error, _UnfitError) or line == type(error).__name__:
        return line
    return f"{type(error).__name__}: {line[:200]}"


class _Call:
    """What the pass under way reads: a factor per token and unit, tokens in the order of the input."""

    def __init__(self) -> None:
        self.factors: list[Tensor] = []


class _StandIn(nn.Module):
    """Looks like a nested linear from outside: a width for every token of the call in order, and no dense `weight`."""

    def __init__(self, name: str, shape: tuple[int, int], unit_idx: int, call: _Call, device: torch.device) -> None:
        super().__init__()
        num_inputs, num_outputs = shape
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        signed = torch.randint(2 * num_inputs, (num_outputs,), generator=generator).to(device)
        self._chosen, self._sign = signed // 2, (signed % 2 * 2 - 1) * num_inputs**0.5
        self._name, self._num_inputs, self._unit_idx, self._call = name, num_inputs, unit_idx, call

    def forward(self, x: Tensor) -> Tensor:
        factor = self._call.factors[self._unit_idx]
        flat = x.reshape(-1, self._num_inputs)
        if len(flat) != len(factor):
            raise _UnfitError(
                f"{self._name} reads {len(flat)} vectors where there are {len(factor)} tokens, so that a width per "
                "token means nothing to it"
            )
        # Of one size, so that no outlier decides what attention looks at.
        size = torch.linalg.vector_norm(flat, dim=-1, keepdim=True) + _TINY
        scaled = flat.index_select(1, self._chosen) * (factor / size)
        outputs: Tensor = (scaled * self._sign).view(*x.shape[:-1], -1)
        return outputs


class _Probe:
    """Passes over a few tokens."""

    def __init__(self, hf_model: PreTrainedModel, num_units: int, num_layers: int, call: _Call) -> None:
        self._hf_model = hf_model
        self._num_layers = num_layers
        self._call = call
        embedding: Any = hf_model.get_input_embeddings()
        vocab_size = int(embedding.weight.shape[0])
        config = hf_model.config.get_text_config()
        special: set[Any] = set()
        for kind in ("pad", "bos", "eos"):
            listed = getattr(config, f"{kind}_token_id", None)
            special.update(listed if isinstance(listed, list | tuple) else [listed])
        plain = [token_id for token_id in range(min(vocab_size, 4096)) if token_id not in special] or [0]
        rows, columns = torch.arange(2)[:, None], torch.arange(_NUM_TOKENS)
        # Whatever differs from token to token: 37 and 101 divide no common size of a vocabulary.
        self._token_ids = torch.tensor(plain)[(5 + 37 * columns + 101 * rows) % len(plain)].to(hf_model.device)
        units = torch.arange(num_units)
        self._widths = 3 + (units + 2 * columns[:, None] + 3 * rows[..., None]) % 6  # [R, T, U], from 3 to 8

    def check_rows(self) -> None:
        """Compares rows that are extended together, one of them two tokens behind, with both of them read at once."""
        cache = self._cache(2, _NUM_TOKENS)
        ahead = self._continue(cache, self._token_ids[1:, :2], self._widths[1:, :2], row=1)
        outputs: list[list[Tensor]] = [[], [ahead[0]]]
        for begin, end in ((0, 2), (2, 3)):  # several tokens, and one: models may have a way of their own for that
            spans = [slice(begin, end), slice(begin + 2, end + 2)]
            token_ids = torch.stack([self._token_ids[row, span] for row, span in enumerate(spans)])
            widths = torch.stack([self._widths[row, span] for row, span in enumerate(spans)])
            for row, logits in enumerate(self._continue(cache, token_ids, widths)):
                outputs[row].append(logits)
        whole = self._logits(self._token_ids, self._widths)
        for row, parts in enumerate(outputs):
            stepped = torch.cat(parts)
            if not _same(stepped, whole[row, : len(stepped)]):
                raise _UnfitError(self._why_different(stepped, whole, row))

    def check_last_position(self, max_context: int) -> None:
        """Compares a step to the last position with one pass over the same tokens and positions."""
        token_ids, widths = self._token_ids[:1, :4], self._widths[:1, :4]
        positions = torch.tensor([[0, 1, 2, max_context - 1]], device=self._hf_model.device)
        caches = [self._cache(1, 4) for _ in range(2)]
        whole = self._continue(caches[0], token_ids, widths, positions=positions)
        parts = [
            self._continue(caches[1], token_ids[:, part], widths[:, part], positions=positions[:, part])
            for part in (slice(0, 3), slice(3, 4))
        ]
        if not _same(torch.cat(parts, dim=1), whole):
            raise _UnfitError(
                f"what it makes of its first tokens changes when position {max_context - 1} is reached, as rotary "
                "factors that depend on the length do"
            )

    def _why_different(self, stepped: Tensor, whole: Tensor, row: int) -> str:
        if bool(torch.isfinite(whole).all()):
            ends_otherwise = torch.cat([self._token_ids[:, :-1], self._token_ids[:, :1]], dim=1)
            if not _same(self._logits(ends_otherwise, self._widths)[:, :-1], whole[:, :-1]):
                return "it is an encoder, whose earlier tokens see the later ones"
        error = float((stepped - whole[row, : len(stepped)]).abs().max())
        return f"its logits differ by {error:.2g} from those of the same text read at once"

    def _cache(self, num_rows: int, max_length: int) -> RowCache:
        from flexquant_rl.engine.decoding.kv_cache import RowCache  # a cache of transformers

        return RowCache(self._num_layers, num_rows, max_length, self._hf_model.device)

    def _continue(
        self,
        cache: RowCache,
        token_ids: Tensor,
        widths: Tensor,
        *,
        row: int | None = None,
        positions: Tensor | None = None,
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
        """`[R, T, vocab]`."""
        keep = token_ids.shape[1]
        self._call.factors = [1 + column.reshape(-1, 1) / 8 for column in widths.to(self._hf_model.device).unbind(-1)]
        plan = WidthPlan(torch.empty(0, 0), None, collect=0 if cache is None else keep)
        with torch.inference_mode():
            logits = logits_under(
                plan, self._hf_model, token_ids, keep=keep, cache=cache, positions=positions, mask=mask
            )
        if plan.collect and len(plan.residual_update) != self._num_layers:
            raise _UnfitError(f"a pass calls {len(plan.residual_update)} of its {self._num_layers} layers")
        return logits


def _same(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= _TOLERANCE * expected.abs().max())


@contextmanager
def _stood_in(hf_model: PreTrainedModel, unit_of: Mapping[str, int], call: _Call) -> Iterator[None]:
    """Stand-ins in the places of the linears."""
    originals: dict[str, Any] = {name: hf_model.get_submodule(name) for name in unit_of}
    try:
        for name, linear in originals.items():
            hf_model.set_submodule(name, _StandIn(name, _shape(linear), unit_of[name], call, hf_model.device))
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
    handles = [layer.register_forward_hook(layer_hook(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
