"""Times whole tokens of a Llama-3.1-8B of random weights, batch 1, each loop under its own captured graph.

What is compared: every static width; widths that change at every token against a fixed mix of the same bytes; a learned
policy (random network) against a table of the very widths that it chose, which leaves the cost of signals and network;
float16 products of torch in the same loop. No checkpoint is needed: planes and scales are drawn on the device, so the
text means nothing. A turn is `--steps` replays between two events, and its one sample the mean time of a token.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from _command import run
from torch import Tensor
from torch.nn import functional

from flexquant_rl.engine.benches.ceilings import copy_provider
from flexquant_rl.engine.benches.clocks import Clock, CudaClock
from flexquant_rl.engine.benches.harness import Provider, Row, Track, Turn, add_tokens_per_s, interleave, rows
from flexquant_rl.engine.benches.options import BenchOptions
from flexquant_rl.engine.benches.random_weights import random_weight
from flexquant_rl.engine.control.policy import PrecisionNet
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.decoding.graph_decode import LogReader
from flexquant_rl.engine.decoding.graph_loop import DecodeLoop
from flexquant_rl.engine.decoding.graph_pass import TokenPass
from flexquant_rl.engine.decoding.graph_weights import StepLayer, StepLinear, StepWeights
from flexquant_rl.engine.decoding.graph_widths import LearnedWidths, WidthSource, WidthTable
from flexquant_rl.kernels.activations import ActivationMode, PackedActivations
from flexquant_rl.kernels.attention import AttentionParts, attend
from flexquant_rl.kernels.policy_net import PolicyWeights
from flexquant_rl.kernels.rotary import rotary
from flexquant_rl.kernels.token_signals import SignalConstants

BIT_WIDTHS = (3, 4, 5, 6, 8)


@dataclass(frozen=True, kw_only=True)
class GraphDecodeBench(BenchOptions):
    """Times whole tokens of a Llama-3.1-8B of random weights on the GPU."""

    rounds: int = 12
    """Turns of every loop; in every second round their order is reversed."""
    steps: int = 128
    """Tokens of a turn."""
    context: int = 512
    """Tokens in the cache before a turn."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain."""
        super().validate()
        self._check_positive("steps", "context")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; those of Llama-3.1-8B by default."""

    hidden: int = 4096
    ffn: int = 14_336
    layers: int = 32
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    vocab: int = 128_256
    max_length: int = 8192

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's products."""
        queries = self.heads * self.head_dim
        return {
            "qkv": (queries + 2 * self.key_heads * self.head_dim, self.hidden),
            "output": (self.hidden, queries),
            "gate_up": (2 * self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }


def nested_weights(shape: Shape, device: torch.device) -> StepWeights:
    """Random planes and scales; units are the layers and the head."""

    def linear(size: tuple[int, int]) -> StepLinear:
        return StepLinear(random_weight(*size, bit_widths=BIT_WIDTHS, device=device))

    ones = torch.ones(shape.hidden, device=device)
    layers = tuple(
        StepLayer(
            **{name: linear(size) for name, size in shape.matrices.items()},
            attention_norm=ones,
            mlp_norm=ones,
            query_norm=None,
            key_norm=None,
            attention_unit=index,
            mlp_unit=index,
        )
        for index in range(shape.layers)
    )
    positions = torch.arange(shape.max_length, device=device)[:, None]
    angles = positions * 500_000.0 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    return StepWeights(
        layers=layers,
        embedding=torch.randn(shape.vocab, shape.hidden, device=device),
        final_norm=ones,
        head=linear((shape.vocab, shape.hidden)),
        head_unit=shape.layers,
        cosine=angles.cos().contiguous(),
        sine=angles.sin().contiguous(),
        num_heads=shape.heads,
        num_key_heads=shape.key_heads,
        head_dim=shape.head_dim,
        norm_epsilon=1e-5,
        attention_scale=shape.head_dim**-0.5,
        num_units=shape.layers + 1,
    )


class DensePass(TokenPass):
    """The same pass over one token with float16 matrices and torch's products: the baseline."""

    def __init__(self, weights: StepWeights, shape: Shape, **options: Any) -> None:
        super().__init__(weights, 1, **options)
        device = weights.device

        def matrix(size: tuple[int, int]) -> Tensor:
            return torch.randn(*size, device=device, dtype=torch.float16).mul_(0.02)

        self._dense = {
            id(layer): {name: matrix(size) for name, size in shape.matrices.items()} for layer in weights.layers
        }
        self._head_matrix = matrix((shape.vocab, shape.hidden))
        self._norm = torch.ones(shape.hidden, device=device, dtype=torch.float16)
        self._mixed = PackedActivations.allocate(
            1, shape.heads * shape.head_dim, device=device, mode="float", dtype=torch.float16
        )

    @property
    def num_bytes(self) -> int:
        """Of all matrices, which a token reads once."""
        matrices = [matrix for layer in self._dense.values() for matrix in layer.values()]
        return sum(matrix.nbytes for matrix in [*matrices, self._head_matrix])

    def _half_normed(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.half(), x.shape[-1:], self._norm, self.weights.norm_epsilon)

    def _attention(
        self,
        layer: StepLayer,
        before: Tensor,
        positions: Tensor,
        keys_and_values: Tensor,
        parts: AttentionParts,
        rows: Tensor | None,
    ) -> None:
        weights, dense = self.weights, self._dense[id(layer)]
        keys, values = keys_and_values
        qkv = torch.mm(self._half_normed(before), dense["qkv"].t())
        rotary(qkv, weights.cosine, weights.sine, positions, keys, values, rows=rows, out=self._queries)
        attend(
            self._queries,
            keys,
            values,
            positions,
            scale=weights.attention_scale,
            rows=rows,
            parts=parts,
            out=self._mixed,
        )
        mixed = self._mixed.values[0].t().reshape(1, -1)
        torch.add(before, torch.mm(mixed, dense["output"].t()), out=self._middle)

    def _mlp(self, layer: StepLayer, after: Tensor) -> None:
        dense, middle = self._dense[id(layer)], self._middle
        gate, up = torch.mm(self._half_normed(middle), dense["gate_up"].t()).chunk(2, dim=-1)
        torch.add(middle, torch.mm(functional.silu(gate) * up, dense["down"].t()), out=after)

    def _head(self, hidden: Tensor) -> None:
        self.logits.copy_(torch.mm(self._half_normed(hidden), self._head_matrix.t()))


class DenseLoop(DecodeLoop):
    """The loop with `DensePass`."""

    def __init__(self, weights: StepWeights, source: WidthSource, shape: Shape) -> None:
        self._shape = shape
        super().__init__(weights, source)

    def _new_pass(self, weights: StepWeights, mode: ActivationMode, cache_dtype: torch.dtype) -> DensePass:
        return DensePass(weights, self._shape, mode=mode, cache_dtype=cache_dtype)

    @property
    def num_bytes(self) -> int:
        """Of all matrices, which a token reads once."""
        assert isinstance(self._pass, DensePass)
        return self._pass.num_bytes


@dataclass
class Contestant:
    """A loop that is timed, under its name in the rows, and what tells it apart from others of that name."""

    name: str
    loop: DecodeLoop
    facts: dict[str, Any]
    bytes_per_token: float


def weight_bytes(weights: StepWeights, width: int) -> Tensor:
    """`[U]` bytes that each unit's weights are read at a width."""

    def read(*linears: StepLinear) -> int:
        return sum(linear.weight.bytes_read(width) for linear in linears if linear.weight is not None)

    layers = [read(layer.qkv, layer.output, layer.gate_up, layer.down) for layer in weights.layers]
    return torch.tensor([*layers, read(weights.head)], dtype=torch.float64)


def mean_bytes(weights: StepWeights, table: Tensor) -> float:
    """Bytes of weights that a token reads, the mean over a table `[S, U]` of widths."""
    by_width = {width: weight_bytes(weights, width) for width in BIT_WIDTHS}
    units = range(table.shape[1])
    return sum(float(by_width[int(row[unit])][unit]) for row in table for unit in units) / len(table)


def learned_widths(weights: StepWeights, device: torch.device) -> LearnedWidths:
    """A random network whose choices move with the signals."""
    schema = SignalSchema(weights.num_units, BIT_WIDTHS)
    torch.manual_seed(0)
    net = PrecisionNet(schema).requires_grad_(False)
    net.width_head.weight.normal_()
    constants = SignalConstants(
        torch.randn(len(weights.embedding), schema.num_embedding_dims, device=device),
        torch.randn(weights.num_units, 2 * len(BIT_WIDTHS), device=device),
        torch.linspace(0, 1, weights.num_units, device=device),
        torch.full((weights.num_units,), 1 / weights.num_units, device=device),
        torch.arange(weights.num_units, dtype=torch.int32, device=device),
    )
    return LearnedWidths(PolicyWeights.from_state_dict(net.state_dict(), BIT_WIDTHS, device=device), constants)


def start(loop: DecodeLoop, context: int, steps: int) -> None:
    """Puts a sequence of random keys and values into the cache."""
    weights = loop.weights
    loop.prepare(context, context + steps + 1)
    size = (1, weights.num_key_heads, context, weights.head_dim)
    pair = torch.randn(2, *size, device=weights.device)
    logits = torch.randn(1, len(weights.embedding), device=weights.device)
    statistics = torch.ones(2, len(weights.layers), device=weights.device)
    loop.begin([(pair[0], pair[1])] * len(weights.layers), logits, statistics, largest_width=8, kl_weight=10.0)


def make_contestants(shape: Shape, device: torch.device, context: int, steps: int) -> list[Contestant]:
    """Every loop that is timed."""
    weights = nested_weights(shape, device)
    num_units = weights.num_units

    def table_loop(table: Tensor, **facts: Any) -> Contestant:
        loop = DecodeLoop(weights, WidthTable(table, device=device))
        return Contestant("nested", loop, facts, mean_bytes(weights, table))

    found = [table_loop(torch.full((1, num_units), width), widths=f"static {width}") for width in BIT_WIDTHS]
    generator = torch.Generator().manual_seed(1)
    mix = torch.tensor(BIT_WIDTHS)[torch.arange(num_units) % len(BIT_WIDTHS)]
    # Layers are alike and the head keeps its width: every row reads the same bytes.
    mixes = [torch.cat([mix[:-1][torch.randperm(num_units - 1, generator=generator)], mix[-1:]]) for _ in range(64)]
    found.append(table_loop(mix[None], widths="a mix, fixed"))
    found.append(table_loop(torch.stack(mixes), widths="the mix, permuted at every token"))
    learned = DecodeLoop(weights, learned_widths(weights, device))
    start(learned, context, steps)
    learned.advance(steps)
    chosen = learned.book.width_log[1 : steps + 1].long().cpu()
    num_bytes = mean_bytes(weights, chosen)
    mean_width = round(float(chosen.float().mean()), 3)
    facts = {"widths": "learned policy on the device", "mean_width": mean_width}
    found.append(Contestant("nested", learned, facts, num_bytes))
    found.append(table_loop(chosen, widths="what the policy chose, as a table", mean_width=mean_width))
    dense = DenseLoop(weights, WidthTable(torch.full((1, num_units), 8), device=device), shape)
    found.append(Contestant("torch", dense, {"widths": "float16"}, dense.num_bytes))
    return found


def turn_of(loop: DecodeLoop, clock: Clock, context: int, steps: int) -> Turn:
    """A turn that decodes one sequence; its one sample is the mean time of a step."""

    def turn() -> list[float]:
        start(loop, context, steps)
        return [clock.seconds(lambda: loop.advance(steps)) / steps]

    return turn


def count_syncs(loop: DecodeLoop, context: int, steps: int) -> int:
    """Host synchronisations during the steps and the copies of their tokens."""
    start(loop, context, steps)
    reader = LogReader(loop)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for entry in range(1, steps + 1):
                loop.advance(1)
                reader.request(entry, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def measure(options: GraphDecodeBench, device: torch.device, track: Track) -> list[Row]:
    """Times every loop."""
    clock = CudaClock(device)
    torch.manual_seed(0)
    contestants = make_contestants(Shape(), device, options.context, options.steps)
    loops = [
        Provider(
            contestant.name,
            turn_of(contestant.loop, clock, options.context, options.steps),
            round(contestant.bytes_per_token),
            contestant.facts,
        )
        for contestant in contestants
    ]
    providers = [copy_provider(clock, device), *loops]
    interleave(providers, options.rounds, track)
    for provider, contestant in zip(loops, contestants, strict=True):
        provider.facts["host_syncs"] = count_syncs(contestant.loop, options.context, options.steps)
    common = {"op": "graph_decode", "context": options.context, "steps": options.steps, "clock": clock.name, "seed": 0}
    found = rows(providers, common)
    add_tokens_per_s(found)
    return found


if __name__ == "__main__":
    run("graph_decode", ("tests/engine/decoding/test_graph_decode.py",), GraphDecodeBench, measure)
