"""Hugging Face's modules, built without storage and filled from elsewhere.

transformers is imported where it is used: its modelling code takes seconds, and serving the families of `LlamaTree`
needs none of it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.llama_tree import LlamaTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REGISTERING = threading.Lock()
"""One builder at a time: it replaces a method of all modules."""


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside the block hold parameters without storage: no memory, no random initialisation.

    Unlike on torch's meta device, buffers are real: rotary frequencies are computed at construction and stored nowhere.
    What other threads build meanwhile is as always.
    """
    with _REGISTERING:
        register, builder = nn.Module.register_parameter, threading.get_ident()

        def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            # A parameter that is on meta already must keep its identity: that is how embeddings are tied.
            if param is not None and not param.is_meta and threading.get_ident() == builder:
                param = nn.Parameter(param.to("meta"), requires_grad=False)
            register(self, name, param)

        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def empty_causal_lm(hf_config: Any) -> PreTrainedModel:
    """The model of a transformers configuration, its parameters without storage."""
    from transformers import AutoModelForCausalLM

    with _parameters_on_meta():
        hf_model: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    return hf_model


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state by name; a tied one only under the first of its names."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a model without storage its tensors, named as by `stored_tensors`."""
    filled = {
        id(place): nn.Parameter(tensors[name], False) if isinstance(place, nn.Parameter) else tensors[name]
        for name, place in stored_tensors(model).items()
    }
    # Tied names get one parameter between them: the one that their common place was filled with.
    state = {name: filled[id(place)] for name, place in model.state_dict(keep_vars=True).items()}
    model.load_state_dict(state, assign=True)


def full_model(tree: LlamaTree) -> PreTrainedModel:
    """Hugging Face's model over the weights of a tree: each of them stays where it is, once."""
    from transformers import CONFIG_MAPPING, GenerationConfig

    entries = copy.deepcopy(tree.config.entries)  # transformers completes what it is given
    hf_model = empty_causal_lm(CONFIG_MAPPING[tree.config.model_type].from_dict(entries))
    for name, module in tree.named_modules():
        if isinstance(module, NestedLinear):
            hf_model.set_submodule(name, module)
        for key, parameter in module.named_parameters(recurse=False):
            setattr(hf_model.get_submodule(name), key, parameter)
    if tree.generation is not None:
        hf_model.generation_config = GenerationConfig.from_dict(copy.deepcopy(tree.generation))
    hf_model.to(tree.device)  # type: ignore[arg-type]  # the rotary frequencies
    hf_model.eval().requires_grad_(False)
    return hf_model
