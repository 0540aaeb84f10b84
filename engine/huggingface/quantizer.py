"""Nested weights behind transformers' loaders: the quantiser that `import flexquant_rl` registers.

Importing this module registers it, which transformers allows once. A pre-quantised model gets empty nested linears that
transformers fills, a plain one is nested when it is loaded. Both then hold a `NestedCausalLM` under `flexquant`, and
save themselves as checkpoints that `load_model` reads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flexquant_rl.engine.checkpoint import (
    QUANT_METHOD,
    TENSORS_FILE,
    WEIGHTS_ENTRY,
    check_tensors,
    insert_empty_linears,
    parse_quantization,
    quantization_entries,
    write_model,
)
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.hf_modules import stored_tensors
from flexquant_rl.engine.linear import DenseCache, NestedLinear, dense_cache_bytes
from flexquant_rl.engine.model import NestedCausalLM, make_units
from flexquant_rl.engine.nesting import check_units, nest
from flexquant_rl.engine.quantisation.calibration import Calibration
from flexquant_rl.engine.quantisation.config import QuantizationConfig, Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_WITHOUT_EFFECT = ("max_shard_size", "safe_serialization", "token", "save_original_format", "save_peft_format")
"""Options of `save_pretrained` that change nothing about one file of nested weights."""


@register_quantization_config(QUANT_METHOD)
class FlexQuantConfig(QuantizationConfigMixin):
    """How transformers nests a plain model, or what it reads in a nested checkpoint.

    Args:
        method: `rtn`; `gptq` needs text, so it is for `fq quantize`.
        group_size: Consecutive inputs that share a scale and an offset: 32, 64 or 128.
        bit_widths: Widths that get their own fitted scale and offset, ascending, the last is 8.
        unit: What gets one width of its own: a decoder layer, or its attention and MLP separately.
        quantize_head: Whether the output head is stored nested and is one more unit.
        width_weights: For `gptq`, as in `QuantizationConfig`.
        rotate: Whether the model is rotated before.
        stored: The other entries of a checkpoint's `quantization_config`.

    Raises:
        InputError: If a value is outside its domain, or an entry unknown or of another version.
    """

    def __init__(
        self,
        method: Literal["rtn", "gptq"] = QuantizationConfig.method,
        group_size: int = QuantizationConfig.group_size,
        bit_widths: Sequence[int] = QuantizationConfig.bit_widths,
        unit: Literal["layer", "half"] = QuantizationConfig.unit,
        quantize_head: bool = QuantizationConfig.quantize_head,
        width_weights: Sequence[float] = QuantizationConfig.width_weights,
        rotate: bool = QuantizationConfig.rotate,
        **stored: Any,
    ) -> None:
        widths, weights = tuple(bit_widths), tuple(width_weights)
        given = QuantizationConfig(method, group_size, widths, unit, quantize_head, weights, rotate)
        given.validate()
        entries = quantization_entries(given)
        unknown = sorted(stored.keys() - entries.keys() - {"calibration", "tuning"})
        if unknown:
            raise InputError(
                f"FlexQuantConfig has no option {unknown[0]!r}; it takes method, group_size, bit_widths, unit, "
                "quantize_head and rotate"
            )
        # transformers writes all attributes to config.json.
        vars(self).update(entries | stored)
        self.parts()

    def parts(self) -> tuple[QuantizationConfig, Calibration | None, Tuning | None]:
        """What the entries say."""
        return parse_quantization(vars(self), "quantization_config")


@register_quantizer(QUANT_METHOD)
class FlexQuantizer(HfQuantizer):
    """What transformers calls on the way from files to a nested model.

    The result computes in float32 whatever dtype is asked for, as everything here does.
    """

    requires_calibration = False
    quantization_config: FlexQuantConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises InputError if the model shall be spread over several devices."""
        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else {device_map}
        if len(places) > 1 or places & {"auto", "balanced", "balanced_low_0", "sequential", "disk"}:
            raise InputError(
                f"device_map={device_map!r} may spread the model over several devices, and a nested one is on one; "
                "give its name, e.g. device_map='cuda:0'"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Everything that is not nested is float32."""
        return torch.float32

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The first sight of the model's configuration, and the last before its weights are looked for."""
        if getattr(config, WEIGHTS_ENTRY, None) is not None:
            setattr(config, WEIGHTS_ENTRY, TENSORS_FILE)  # in place of the note to those who lack this quantiser
        return config

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The same moment in older releases of transformers 5."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        config, _, _ = self.quantization_config.parts()
        insert_empty_linears(model, make_units(model, config), config, DenseCache(dense_cache_bytes()))
        _untie_nested(model)
        tied = model.all_tied_weights_keys
        wanted = {name: place for name, place in stored_tensors(model).items() if name not in tied}
        files = list(checkpoint_files or ())
        if [Path(file).name for file in files] != [TENSORS_FILE]:
            raise InputError(
                f"a nested checkpoint has its weights in {TENSORS_FILE}, not in {files}; load its directory"
            )
        check_tensors(Path(files[0]).parent, wanted)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config, calibration, tuning = self.quantization_config.parts()
        if self.pre_quantized:
            units = make_units(model, config)
            check_units(model, units)
            model.eval().requires_grad_(False)
            cache = next(module.cache for module in model.modules() if isinstance(module, NestedLinear))
            nested = NestedCausalLM(model, None, config, units, cache, calibration, tuning)
        else:
            # `nest` takes plain models alone, which this one still is.
            del model.config.quantization_config
            model.is_quantized = False  # type: ignore[assignment]
            nested = nest(model, None, config, keep_reference=False)
            model.is_quantized = True  # type: ignore[assignment]
            model.config.quantization_config = self.quantization_config
            _untie_nested(model)
        model.flexquant = nested  # type: ignore[assignment]
        model.save_pretrained = MethodType(_save, model)  # type: ignore[method-assign]
        return model

    def is_serializable(self) -> bool:
        """Whether it can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether its weights can be trained."""
        return False


def nested_model(model: nn.Module) -> NestedCausalLM:
    """The nested model that a model of transformers holds.

    Raises:
        InputError: If it holds none.
    """
    nested = getattr(model, "flexquant", None)
    if not isinstance(nested, NestedCausalLM):
        raise InputError(
            f"{type(model).__name__} is not a nested model; load a nested checkpoint, or a plain model with "
            "quantization_config=FlexQuantConfig()"
        )
    return nested


def _untie_nested(model: PreTrainedModel) -> None:
    """A nested head has weights of its own, of which there is nothing to tie."""
    for name in list(model.all_tied_weights_keys):
        if isinstance(model.get_submodule(name.rpartition(".")[0]), NestedLinear):
            del model.all_tied_weights_keys[name]
            model._tied_weights_keys = dict(model.all_tied_weights_keys)


def _save(self: PreTrainedModel, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """`save_pretrained` of a nested model: the files of a checkpoint but for the tokenizer's.

    Raises:
        InputError: If an option is given that would make it another kind of file.
    """
    is_main_process = options.pop("is_main_process", True)
    for name in sorted(options.keys() - set(_WITHOUT_EFFECT)):
        if options[name]:
            raise InputError(f"{name}={options[name]!r}: a nested model is saved as one checkpoint; leave {name} out")
    if not is_main_process:
        return
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_model(nested_model(self), directory)
