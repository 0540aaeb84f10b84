"""Nesting a model: its linears are replaced one by one, fitted to a calibration text where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from flexquant_rl.engine.context_length import max_context
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.freed_memory import return_freed_memory
from flexquant_rl.engine.hf_modules import stored_tensors
from flexquant_rl.engine.linear import (
    DenseCache,
    NestedLinear,
    dense_cache_bytes,
    dense_matrix,
    is_dense,
    reference_matrix,
)
from flexquant_rl.engine.llama_tree import LlamaTree
from flexquant_rl.engine.model import NestedCausalLM, Unit, decoder_layers, make_units
from flexquant_rl.engine.plain_model import check_finite, check_no_state, check_weights
from flexquant_rl.engine.probe import check_decoding
from flexquant_rl.engine.quantisation.calibration import Calibration, input_hessians
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.quantisation.gptq import quantize_gptq
from flexquant_rl.engine.quantisation.quantize import quantize_rtn
from flexquant_rl.engine.quantisation.rotation import rotate
from flexquant_rl.engine.quantisation.token_weights import token_weights
from flexquant_rl.engine.token_text import TokenText
from flexquant_rl.kernels.bitplane import NestedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps a loop over items; the text says what it does."""

CALIBRATION_MISSING = (
    "method='gptq' fits weights to text, but there is none; run `fq quantize SOURCE OUT --method gptq "
    "--calibration FILE` and use OUT"
)
"""What is wrong where `gptq` is asked for without calibration."""

_GIVE_ITS_MODEL = "give the model that the checkpoint was made from"
# Codes that serve all widths are off by a few percent of the weights at 8 bits; other weights by more than all of them.
_LARGEST_DISTANCE = 0.2
# What is not nested is stored as it was, or rounded to 16 bits after a rotation. A fine-tuned model is further away.
_LARGEST_ROUNDING = 2e-3


def unseen(items: Iterable[Any], label: str) -> Iterable[Any]:
    """A loop whose progress nobody watches."""
    return items


def nest(
    hf_model: PreTrainedModel | LlamaTree,
    tokenizer: PreTrainedTokenizerBase | TokenText | None,
    config: QuantizationConfig,
    *,
    keep_reference: bool = True,
    calibration: Tensor | None = None,
    progress: Progress = unseen,
) -> NestedCausalLM:
    """Quantises a model in place.

    Args:
        hf_model: Any causal LM whose decoder layers are made of `nn.Linear` or GPT-2's `Conv1D`.
        tokenizer: Its tokenizer; None for a model that nobody asks for text.
        config: Method, group size, widths, unit.
        keep_reference: Keep the unquantised matrices too, as the reference for output KL.
        calibration: `[n, T]` int64, windows of token ids to fit the weights to. `gptq` needs them; with `rtn` they
            only refit scales and offsets.
        progress: Wraps the loops over linears and over calibration windows.

    Raises:
        InputError: If a tensor holds NaN or infinite values, the architecture is not supported, or `gptq` gets no
            calibration.
    """
    config.validate()
    if config.method == "gptq" and calibration is None:
        raise InputError(CALIBRATION_MISSING)
    check_weights(hf_model)
    if not isinstance(hf_model, LlamaTree):
        check_no_state(type(hf_model).__name__, hf_model.config)
    hf_model.float().eval()
    for name, parameter in hf_model.named_parameters():
        check_finite(name, parameter)
    if config.rotate:
        rotate(hf_model, nests_head=config.quantize_head)
    units = make_units(hf_model, config)
    unit_of = check_units(hf_model, units)
    cache = DenseCache(dense_cache_bytes())
    hessians: Iterator[Tensor | None] = repeat(None)
    if calibration is not None:
        assert not isinstance(hf_model, LlamaTree), "calibration runs the model"
        weights = token_weights(hf_model, list(unit_of), calibration, progress=progress)
        hessians = _input_hessians(hf_model, units, calibration, weights)
    for (name, unit_idx), hessian in zip(progress(list(unit_of.items()), "quantising"), hessians, strict=False):
        linear = _nested(hf_model.get_submodule(name), hessian, unit_idx, config, name, cache, keep_reference)
        hf_model.set_submodule(name, linear)
        if hessian is not None:  # what it was quantised with is large; data-free nesting should stay fast
            return_freed_memory()
    hf_model.eval().requires_grad_(False)
    facts = None if calibration is None else Calibration.of(calibration)
    return NestedCausalLM(hf_model, tokenizer, config, units, cache, facts)


def give_reference(model: NestedCausalLM, hf_model: PreTrainedModel) -> None:
    """Keeps the unquantised weights that a nested model was made from, as its reference for output KL.

    Args:
        model: A nested model without them.
        hf_model: The model that it was made from. It is used up: its linears are taken out.

    Raises:
        InputError: If it is another model.
    """
    names = {name for name, _ in hf_model.named_modules()}
    linears = model.nested_linears()
    missing = [name for name in linears if name not in names]
    if missing:
        raise InputError(f"the reference has no {missing[0]}, so it is another model; {_GIVE_ITS_MODEL}")
    hf_model.float()
    if model.config.rotate:
        rotate(hf_model, nests_head=model.config.quantize_head)
    references: dict[str, Tensor] = {}
    _check_what_is_not_nested(model, hf_model)
    for name, linear in linears.items():
        weight = references[name] = reference_matrix(hf_model.get_submodule(name))
        hf_model.set_submodule(name, nn.Identity())  # one copy of the model is enough
        _check_distance(name, linear.dense(linear.bit_widths[-1]), weight, _LARGEST_DISTANCE)
    for name, linear in linears.items():
        linear.reference_weight = references[name]
    model.dense_cache.clear()


def _check_what_is_not_nested(model: NestedCausalLM, hf_model: PreTrainedModel) -> None:
    theirs = stored_tensors(hf_model)
    for name, tensor in stored_tensors(model.hf_model).items():
        if name in theirs:
            _check_distance(name, tensor, theirs[name], _LARGEST_ROUNDING)


def _check_distance(name: str, own: Tensor, reference: Tensor, largest: float) -> None:
    """Raises InputError if a tensor is further from the reference's than a share of its norm."""
    if own.shape != reference.shape:
        raise InputError(
            f"{name} is {list(reference.shape)} in the reference and {list(own.shape)} here; {_GIVE_ITS_MODEL}"
        )
    base = reference.detach().float()
    distance, norm = float((own.detach().float() - base).norm()), float(base.norm())
    if not distance <= largest * norm:
        raise InputError(
            f"{name} is {distance / norm if norm else math.inf:.2%} away from the reference's, more than {largest:.1%},"
            f" so it is another model; {_GIVE_ITS_MODEL}"
        )


def check_units(hf_model: PreTrainedModel | LlamaTree, units: tuple[Unit, ...]) -> dict[str, int]:
    """Returns the unit of every linear by module name; InputError if the model cannot be decoded (see probe.py)."""
    unit_of = {name: index for index, unit in enumerate(units) for name in unit.linears}
    if not isinstance(hf_model, LlamaTree):  # all of its families can be
        check_decoding(hf_model, unit_of, list(decoder_layers(hf_model)), max_context(hf_model))
    return unit_of


def _input_hessians(
    hf_model: PreTrainedModel, units: tuple[Unit, ...], calibration: Tensor, weights: dict[str, Tensor]
) -> Iterator[Tensor]:
    """`input_hessians` in the order of the units' linears; units of one layer are next to each other."""
    layers = list(decoder_layers(hf_model))
    stages = [
        [name for unit in units if unit.layer_idx == layer_idx for name in unit.linears]
        for layer_idx in range(len(layers) + 1)  # the head is one more
    ]
    return input_hessians(hf_model, layers, stages, calibration, weights)


def _nested(
    linear: nn.Module,
    hessian: Tensor | None,
    unit_idx: int,
    config: QuantizationConfig,
    name: str,
    cache: DenseCache,
    keep_reference: bool,
) -> NestedLinear:
    """What takes the place of a linear."""
    assert is_dense(linear)
    return NestedLinear(
        _quantize(dense_matrix(linear), hessian, config, name),
        None if linear.bias is None else linear.bias.detach(),
        unit_idx=unit_idx,
        cache=cache,
        reference_weight=reference_matrix(linear) if keep_reference else None,
    )


def _quantize(weight: Tensor, hessian: Tensor | None, config: QuantizationConfig, name: str) -> NestedWeight:
    if config.method == "rtn":
        return quantize_rtn(
            weight, group_size=config.group_size, bit_widths=config.bit_widths, hessian=hessian, name=name
        )
    assert hessian is not None, "nest checked that there is calibration text"
    return quantize_gptq(
        weight,
        hessian,
        group_size=config.group_size,
        bit_widths=config.bit_widths,
        width_weights=config.width_weights,
        name=name,
    )
