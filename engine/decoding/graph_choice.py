"""What the captured graphs of a GPU can run: which models, and which policies with them."""

from __future__ import annotations

import torch

from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.control.drafts import DraftPolicy
from flexquant_rl.engine.control.served_drafts import ServedDrafts
from flexquant_rl.engine.decoding.graph_widths import why_not_on_device
from flexquant_rl.engine.decoding.llama_parts import why_other_numbers
from flexquant_rl.engine.linear import REFERENCE_WIDTH, NestedLinear
from flexquant_rl.engine.model import NestedCausalLM, decoder_layers
from flexquant_rl.kernels import launching
from flexquant_rl.kernels.rms_norm import MAX_INPUTS


def why_not_graph(model: NestedCausalLM, policy: Policy | DraftPolicy) -> str | None:
    """Returns why captured graphs cannot run a model with a policy where the model is, in a few words, or None.

    A policy that drafts runs on the host, between passes (`GraphSession`); any other on the device (`GraphDecoder`).
    """
    if model.device.type != "cuda":
        return f"the model is on {model.device}, the captured graph is for a CUDA device"
    return why_not_kernels(model) or (
        _why_not_drafts(policy) if isinstance(policy, DraftPolicy) else why_not_on_device(policy)
    )


def _why_not_drafts(policy: DraftPolicy) -> str | None:
    widths = [policy.verify_bit_widths, *([policy.level_bit_widths] if isinstance(policy, ServedDrafts) else [])]
    if any(bool((width == REFERENCE_WIDTH).any()) for width in widths):
        return f"policy {policy.name!r} reads the unquantised weights"
    return None


def why_not_kernels(model: NestedCausalLM) -> str | None:
    """Returns why the GPU's kernels cannot run a model, in a few words, or None; the interpreter runs them anywhere."""
    reason = why_other_numbers(model.tree)
    if reason is not None:
        return reason
    device = model.device
    # Triton launches on the current device, whatever its arguments are on.
    if device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device():
        return f"the model is on {device}, but the current device is cuda:{torch.cuda.current_device()}"
    reason = launching.why_not_triton(device)
    if reason is not None:
        return reason
    for name, module in decoder_layers(model.tree).named_modules():
        if name.endswith("_proj") and not isinstance(module, NestedLinear):
            return f"layers.{name} is not nested"
    num_inputs = model.embedding_matrix().shape[1]
    if num_inputs > MAX_INPUTS:
        return f"its residual stream has {num_inputs} values, a kernel holds {MAX_INPUTS}"
    return None
