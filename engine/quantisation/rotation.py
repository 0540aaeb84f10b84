"""Rotation of a model before it is quantised: the same function, with weights that few bits lose less of.

Hidden states h of the residual stream become h Q with one orthogonal matrix Q, which every matrix that reads or writes
the stream absorbs. RMSNorm does not see Q once its scales are in the matrices behind it. Values are rotated within
each head, and turned back by the output projection. Nothing is left to do at run time. Outlier columns, which stretch
the groups that they are in, are spread over all columns.

References:
    QuaRot, arXiv:2404.00456, and SpinQuant, arXiv:2405.16406, the parts of them that cost nothing at run time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flexquant_rl.engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from flexquant_rl.engine.llama_tree import LlamaShape, LlamaTree

ROTATED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose norms are plain RMSNorms, so that a rotation passes through them."""


def rotate(
    model: PreTrainedModel | LlamaTree,
    *,
    nests_head: bool = True,
    seed: int = 0,
    embedding_dtype: torch.dtype = torch.float16,
) -> None:
    """Rotates a model in place. The head gets weights of its own where it shared the embedding's.

    Matrices are multiplied in float64 and kept in float32.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3, in float32.
        nests_head: Whether the head will be nested. A head that is not and shares the embedding's weights cannot stay.
        seed: Of the random part of Q.
        embedding_dtype: Precision that embeddings are rounded to. A rotated embedding fits 16 bits no longer, and no
            width of ours is that precise.

    Raises:
        InputError: If the architecture has norms that a rotation does not pass through, or the head has to stay tied.
    """
    check_rotatable(model.config, nests_head=nests_head)
    config = model.config
    size = config.hidden_size
    head_size = getattr(config, "head_dim", None) or size // config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    norm, embedding, head = (_weights(model, name) for name in ("model.norm", "model.embed_tokens", "lm_head"))
    stream, values = (orthogonal_matrix(count, generator).to(embedding.device) for count in (size, head_size))
    untied = nn.Linear(size, len(head), bias=False, dtype=head.dtype, device=head.device)
    untied.weight = nn.Parameter(_reading(head, norm, stream), requires_grad=False)
    model.set_submodule("lm_head", untied)
    norm.fill_(1)
    embedding.copy_((embedding.double() @ stream).to(embedding_dtype))
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        for norm_name, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            norm = _weights(model, f"{layer}.{norm_name}")
            for name in readers:
                weight = _weights(model, f"{layer}.{name}")
                weight.copy_(_reading(weight, norm, stream))
            norm.fill_(1)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            _rotate_writer(model.get_submodule(f"{layer}.{name}"), stream)
        _rotate_values(model, layer, values)


def why_not_rotatable(config: PretrainedConfig | LlamaShape, *, nests_head: bool = True) -> str | None:
    """Why a model of this configuration cannot be rotated; None if it can."""
    if config.model_type not in ROTATED_MODEL_TYPES:
        return (
            f"a rotation does not pass through the norms of model type {config.model_type!r}, only through those of "
            f"{', '.join(ROTATED_MODEL_TYPES)}"
        )
    if not nests_head and config.tie_word_embeddings:
        return "rotate=True gives the head weights of its own, but quantize_head=False leaves it the embedding's"
    return None


def check_rotatable(config: PretrainedConfig | LlamaShape, *, nests_head: bool = True) -> None:
    """Raises InputError if a model of this configuration cannot be rotated."""
    reason = why_not_rotatable(config, nests_head=nests_head)
    if reason is not None:
        raise InputError(f"{reason}; leave the rotation out")


def orthogonal_matrix(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix `[size, size]`, float64, that mixes all columns evenly.

    It is the Kronecker product of a random orthogonal matrix, for the odd part of the size, and a Hadamard matrix,
    behind random signs.
    """
    power = size & -size
    mixing = torch.linalg.qr(torch.randn(size // power, size // power, dtype=torch.float64, generator=generator))[0]
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * torch.kron(mixing.contiguous(), _hadamard(power))


def _hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix of a power of two, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix.new_tensor([[1, 1], [1, -1]]), matrix)
    return matrix / math.sqrt(size)


def _weights(model: PreTrainedModel | LlamaTree, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _reading(weight: Tensor, norm: Tensor, stream: Tensor) -> Tensor:
    """A matrix `[N, size]` that reads the normalised stream: the norm's scales and Q go into its columns."""
    return ((weight.double() * norm.double()) @ stream).to(weight.dtype)


def _rotate_writer(linear: nn.Module, stream: Tensor) -> None:
    """Rotates what a matrix `[size, K]` adds to the stream."""
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach()
    weight.copy_(stream.T @ weight.double())
    if linear.bias is not None:
        bias = linear.bias.detach()
        bias.copy_(bias.double() @ stream)


def _rotate_values(model: PreTrainedModel | LlamaTree, layer: str, values: Tensor) -> None:
    """Rotates the values of every head, and turns them back where the output projection reads them."""
    head_size = len(values)
    reader, writer = (model.get_submodule(f"{layer}.self_attn.{name}") for name in ("v_proj", "o_proj"))
    assert isinstance(reader, nn.Linear) and isinstance(writer, nn.Linear)
    weight = reader.weight.detach()
    weight.copy_((values.T @ weight.double().unflatten(0, (-1, head_size))).flatten(0, 1))
    if reader.bias is not None:
        bias = reader.bias.detach()
        bias.copy_((bias.double().unflatten(0, (-1, head_size)) @ values).flatten())
    weight = writer.weight.detach()
    weight.copy_((weight.double().unflatten(1, (-1, head_size)) @ values).flatten(1))
