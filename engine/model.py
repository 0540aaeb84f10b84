"""A Hugging Face causal LM whose linears hold nested weights, cut into the units that a precision policy controls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from flexquant_rl.engine.context_length import max_context, rotary_limit
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.freed_memory import return_freed_memory
from flexquant_rl.engine.hf_modules import full_model
from flexquant_rl.engine.linear import (
    DenseCache,
    NestedLinear,
    WidthPlan,
    is_dense,
    layer_hook,
    logits_under,
)
from flexquant_rl.engine.llama_tree import LlamaTree
from flexquant_rl.engine.quantisation.calibration import Calibration
from flexquant_rl.engine.quantisation.config import QuantizationConfig, Tuning
from flexquant_rl.engine.token_text import TokenText

if TYPE_CHECKING:  # its modelling code takes seconds to import, and serving needs none of it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.pytorch_utils import Conv1D

    from flexquant_rl.engine.decoding.kv_cache import RowCache


@dataclass(frozen=True)
class Unit:
    """The smallest part of a model that has a bit-width of its own.

    Attributes:
        name: `layer.3`, `layer.3.attention`, `layer.3.mlp` or `head`; `layer.3.q` for a matrix of its own.
        kind: What it is.
        layer_idx: Decoder layer, or the number of layers for the head.
        linears: Module names of its linears.
        num_weights: Weights in them.
    """

    name: str
    kind: Literal["layer", "attention", "mlp", "matrix", "head"]
    layer_idx: int
    linears: tuple[str, ...]
    num_weights: int


@dataclass(frozen=True)
class ForwardResult:
    """One pass, at the kept tokens: logits `[R, kept, vocab]`, residual_update and crest `[R, kept, L]`; float32.

    The statistics of the layers are None where none were collected.
    """

    logits: Tensor
    residual_update: Tensor | None
    crest: Tensor | None


class NestedCausalLM:
    """A causal LM with one stored copy of nested weights.

    Attributes:
        tree: Its modules under Hugging Face's names, evaluation mode, float32, linears replaced by `NestedLinear`.
        config: How it was quantised.
        calibration: The text that it was calibrated on, or None.
        tuning: How its scales and offsets were tuned, or None.
        units: What a policy controls, in the order of every `[..., num_units]` tensor.
        fingerprint: sha256 of the nested tensors, units and widths; ties profiles and policies to the model.
    """

    def __init__(
        self,
        tree: PreTrainedModel | LlamaTree,
        token_text: PreTrainedTokenizerBase | TokenText | None,
        config: QuantizationConfig,
        units: tuple[Unit, ...],
        dense_cache: DenseCache,
        calibration: Calibration | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.tree = tree
        self._token_text = token_text
        self.config = config
        self.calibration = calibration
        self.tuning = tuning
        self.dense_cache = dense_cache
        self.bit_widths = config.bit_widths
        self._take_units(units)
        if not isinstance(tree, LlamaTree):  # whose layers are not called
            _observe_layers(tree)
        self.fingerprint = _fingerprint(self.nested_linears(), units, self.bit_widths)

    def _take_units(self, units: tuple[Unit, ...]) -> None:
        self.units = units
        self._body_units = [index for index, unit in enumerate(units) if unit.kind != "head"]
        self._has_head_unit = units[-1].kind == "head"
        self._unit_layer = torch.tensor([unit.layer_idx for unit in units])

    @contextmanager
    def cut_into(self, units: tuple[Unit, ...]) -> Iterator[None]:
        """Inside the block the linears belong to other units, each to one. Nobody else may run the model meanwhile."""
        linears, own = self.nested_linears(), self.units
        unit_of = {name: linear.unit_idx for name, linear in linears.items()}
        try:
            self._take_units(units)
            for index, unit in enumerate(units):
                for name in unit.linears:
                    linears[name].unit_idx = index
            yield
        finally:
            self._take_units(own)
            for name, index in unit_of.items():
                linears[name].unit_idx = index

    @property
    def hf_model(self) -> PreTrainedModel:
        """Hugging Face's model, which can be called.

        Made on first use from a `LlamaTree`, and from then on the tree.
        """
        tree = self.tree
        if isinstance(tree, LlamaTree):
            # Two threads at once make one each, of the same weights: either will do.
            tree = full_model(tree)
            _observe_layers(tree)
            self.tree = tree
        return tree

    @property
    def token_text(self) -> PreTrainedTokenizerBase | TokenText:
        """Its tokenizer, for tokens from text and text from tokens.

        Raises:
            InputError: If it has none, as a model that Hugging Face's loader made.
        """
        if self._token_text is None:
            raise InputError("the model was loaded without its tokenizer; load both with flexquant_rl.load_model")
        return self._token_text

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Transformers' tokenizer, made on first use like `hf_model`; errors as `token_text`."""
        token_text = self.token_text
        if isinstance(token_text, TokenText):
            token_text = self._token_text = token_text.full()
        return token_text

    @property
    def num_units(self) -> int:
        """U: length of every bit-width vector."""
        return len(self.units)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.tree.config.get_text_config().num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Size of the output distribution."""
        return int(self.tree.config.get_text_config().vocab_size)

    @property
    def max_context(self) -> int:
        """Tokens that the model can attend to; a sliding window counts as the limit."""
        return max_context(self.tree)

    @property
    def context_note(self) -> str:
        """Why the context ends earlier than the model's configuration says, in brackets, or nothing."""
        config = self.tree.config.get_text_config()
        if self.max_context == rotary_limit(config):
            return " (where longrope changes the rotary factors of all positions)"
        return " (its sliding window)" if self.max_context == getattr(config, "sliding_window", None) else ""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tree.device

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those of the generation configuration, often several, and the tokenizer's own."""
        tree = self.tree
        source = tree if isinstance(tree, LlamaTree) else tree.generation_config
        configured = getattr(source, "eos_token_id", None)
        listed = configured if isinstance(configured, list | tuple) else [configured]
        own = None if self._token_text is None else self._token_text.eos_token_id
        return tuple(sorted({int(t) for t in (*listed, own) if t is not None}))

    @property
    def has_reference(self) -> bool:
        """Whether the unquantised weights are kept beside the nested ones."""
        return all(linear.reference_weight is not None for linear in self.nested_linears().values())

    def drop_reference(self) -> NestedCausalLM:
        """Gives up the unquantised weights: 4 bytes per weight that serving does not read."""
        for linear in self.nested_linears().values():
            linear.reference_weight = None
        return_freed_memory()
        return self

    @property
    def unit_weights(self) -> Tensor:
        """`[U]` int64: weights per unit."""
        return torch.tensor([unit.num_weights for unit in self.units])

    def nested_linears(self) -> dict[str, NestedLinear]:
        """All nested linears by module name, in model order."""
        return {name: m for name, m in self.tree.named_modules() if isinstance(m, NestedLinear)}

    def set_pairs(self, pairs: Mapping[str, Mapping[int, tuple[Tensor, Tensor]]]) -> None:
        """Replaces scales and offsets: `[N, G]` float16 each, of groups that hold inputs, by linear and width."""
        linears = self.nested_linears()
        for name, by_width in pairs.items():
            for bit_width, (scale, offset) in by_width.items():
                place = (linears[name].bit_widths.index(bit_width), slice(None), slice(scale.shape[1]))
                linears[name].scale[place], linears[name].offset[place] = scale, offset
        self.dense_cache.clear()
        self.fingerprint = _fingerprint(linears, self.units, self.bit_widths)

    def weight_bytes(self, unit_idx: int, bit_width: int) -> int:
        """Bytes of nested weights that one token's pass reads for a unit at a width."""
        linears = self.nested_linears()
        return sum(linears[name].weight.bytes_read(bit_width) for name in self.units[unit_idx].linears)

    def embedding_matrix(self) -> Tensor:
        """Input embeddings, `[vocab, d]`."""
        embedding = self.tree.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding.weight.detach()

    def mean_bit_width(self, bit_widths: Tensor) -> Tensor:
        """Parameter-weighted mean width of `[..., U]` -> `[...]` float32."""
        weights = self.unit_weights.to(bit_widths.device, torch.float32)
        return (bit_widths.float() * weights).sum(-1) / weights.sum()

    def per_unit(self, per_layer: Tensor) -> Tensor:
        """Spreads a per-layer statistic `[..., L]` over units, `[..., U]`; zero for the head."""
        padded = torch.cat([per_layer, per_layer.new_zeros(*per_layer.shape[:-1], 1)], dim=-1)
        return padded[..., self._unit_layer.to(per_layer.device)]

    def to(self, device: torch.device | str) -> NestedCausalLM:
        """Moves the model; dequantised copies are dropped."""
        self.dense_cache.clear()
        self.tree.to(device)  # type: ignore[arg-type]
        return self

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        bit_widths: Tensor,
        *,
        keep: int,
        cache: RowCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> ForwardResult:
        """Runs the model with a width per token and unit.

        Args:
            token_ids: `[R, T]` int64.
            bit_widths: `[R, T, U]` int64; `REFERENCE_WIDTH` (0) reads the unquantised weights.
            keep: Logits are computed for the last `keep` tokens of each row.
            cache: Keys and values so far, or None for a pass that starts at position 0 and keeps nothing.
            positions: `[R, T]` int64, with `cache`.
            mask: Additive `[R, 1, T, end]`, with `cache`.
        """
        plan = self.width_plan(bit_widths, keep=keep, collect=0 if cache is None else keep)
        logits = logits_under(plan, self.hf_model, token_ids, keep=keep, cache=cache, positions=positions, mask=mask)
        return self.result_of(plan, logits)

    def width_plan(self, bit_widths: Tensor, *, keep: int, collect: int) -> WidthPlan:
        """What the linears read in a pass, as an argument of it: `[R, T, U]` widths, `keep` as in `forward`."""
        body = bit_widths[..., self._body_units].flatten(0, 1)
        head = bit_widths[:, -keep:, -1].flatten() if self._has_head_unit else None
        return WidthPlan(body, head, collect=collect)

    def result_of(self, plan: WidthPlan, logits: Tensor) -> ForwardResult:
        """The logits of a pass with what its plan has collected."""
        if not plan.collect:
            return ForwardResult(logits, None, None)
        return ForwardResult(
            logits,
            torch.stack([plan.residual_update[index] for index in range(self.num_layers)], dim=-1),
            torch.stack([plan.crest[index] for index in range(self.num_layers)], dim=-1),
        )


def _observe_layers(hf_model: PreTrainedModel) -> None:
    """Has the layers' statistics taken in every pass."""
    for layer_idx, layer in enumerate(decoder_layers(hf_model)):
        layer.register_forward_hook(layer_hook(layer_idx), with_kwargs=True)


def decoder_layers(hf_model: PreTrainedModel | LlamaTree) -> nn.ModuleList:
    """Finds the list of decoder layers, whatever the architecture calls it.

    Raises:
        InputError: If there is no such list.
    """
    depth = int(hf_model.config.get_text_config().num_hidden_layers)
    for module in hf_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and _linears(module[0]):
            return module
    kind = "mixture-of-experts layers with fused weights" if _has_experts(hf_model) else "layers of another kind"
    raise InputError(
        f"{type(hf_model).__name__} has no list of {depth} decoder layers made of Linear modules; {kind} are not "
        "supported"
    )


def _linears(module: nn.Module) -> dict[str, nn.Linear | Conv1D | NestedLinear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, NestedLinear) or is_dense(m)}


def make_units(hf_model: PreTrainedModel | LlamaTree, config: QuantizationConfig) -> tuple[Unit, ...]:
    """Cuts a model into units, before or after its linears have been replaced."""
    names = {module: name for name, module in hf_model.named_modules()}
    units = []
    for layer_idx, layer in enumerate(decoder_layers(hf_model)):
        linears = _linears(layer)
        prefix = names[layer]
        for name, parameter in layer.named_parameters():
            if parameter.dim() > 2:
                is_expert = _has_experts(hf_model) and "conv" not in name
                what = f"fuses the weights of {len(parameter)} experts" if is_expert else "is no matrix"
                raise InputError(
                    f"{prefix}.{name} {what}, which cannot be nested; use a model whose layers are made of Linear "
                    "modules"
                )
        if config.unit == "layer":
            units.append(_unit(f"layer.{layer_idx}", "layer", layer_idx, prefix, linears))
            continue
        attention = {name: m for name, m in linears.items() if "attn" in name or "attention" in name}
        mlp = {name: m for name, m in linears.items() if name not in attention}
        if not attention or not mlp:
            raise InputError(f"{prefix} does not divide into attention and MLP, as unit='half' needs; use unit='layer'")
        units.append(_unit(f"layer.{layer_idx}.attention", "attention", layer_idx, prefix, attention))
        units.append(_unit(f"layer.{layer_idx}.mlp", "mlp", layer_idx, prefix, mlp))
    if config.quantize_head:
        head = hf_model.get_output_embeddings()
        units.append(_unit("head", "head", len(decoder_layers(hf_model)), names[head], {"": head}))
    return tuple(units)


def _has_experts(hf_model: PreTrainedModel | LlamaTree) -> bool:
    config = hf_model.config.get_text_config()
    return any(getattr(config, f"{prefix}_experts", None) for prefix in ("num", "num_local", "n_routed", "moe_num"))


def _unit(
    name: str,
    kind: Literal["layer", "attention", "mlp", "head"],
    layer_idx: int,
    prefix: str,
    linears: dict[str, Any],
) -> Unit:
    paths = tuple(f"{prefix}.{local}".rstrip(".") for local in linears)
    return Unit(name, kind, layer_idx, paths, sum(_num_weights(linear) for linear in linears.values()))


def _num_weights(linear: nn.Linear | Conv1D | NestedLinear) -> int:
    if isinstance(linear, NestedLinear):
        return linear.planes.shape[1] * linear.num_inputs
    return linear.weight.numel()


def _fingerprint(linears: dict[str, NestedLinear], units: tuple[Unit, ...], bit_widths: tuple[int, ...]) -> str:
    digest = hashlib.sha256(repr((bit_widths, [unit.name for unit in units])).encode())
    for name, linear in linears.items():
        digest.update(name.encode())
        for tensor in (linear.planes, linear.scale, linear.offset):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
