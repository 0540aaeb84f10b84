"""Times captured passes over several tokens of one row, Llama-3.1-8B of random weights: what verifying drafts costs.

A pass reads every weight once, whatever the number of tokens. All passes of a width start from the same cache; none is
timed unless its logits are, bit for bit, those of single steps. A sample is one pass as a session makes it, with the
copies of its tokens and of its logits; `steps` is its time over that of one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from _command import run
from bench_graph_decode import BIT_WIDTHS, Shape, nested_weights, weight_bytes
from torch import Tensor

from flexquant_rl.engine.benches.ceilings import copy_provider
from flexquant_rl.engine.benches.clocks import Clock, CudaClock
from flexquant_rl.engine.benches.harness import BenchRefusedError, Provider, Row, Track, Turn, interleave, rows
from flexquant_rl.engine.benches.options import BenchOptions
from flexquant_rl.engine.benches.verify import add_steps
from flexquant_rl.engine.decoding.graph_rows import PASS_SIZES, GraphPasses, GraphRows

_NAME = "nested"


@dataclass(frozen=True, kw_only=True)
class GraphVerifyBench(BenchOptions):
    """Times passes over several tokens of a Llama-3.1-8B of random weights on the GPU."""

    rounds: int = 12
    """Turns of every pass; in every second round their order is reversed."""
    passes: int = 16
    """Timed passes of a turn."""
    context: int = 512
    """Tokens in the cache before a pass."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain."""
        super().validate()
        self._check_positive("passes", "context")


@dataclass(frozen=True)
class FilledRow:
    """A row of random keys and values, and the tokens that are read behind them."""

    passes: GraphPasses
    held: GraphRows
    context: int
    token_ids: list[int]

    def read(self, count: int, widths: Tensor) -> Tensor:
        """Logits of a pass over the first tokens, `[count, V]`; afterwards the row is as it was."""
        size = self.passes.bucket_size(self.context + max(PASS_SIZES))
        logits, _ = self.passes.read(self.held, 0, size, self.token_ids[:count], widths)
        self.held.lengths.fill_(self.context)
        return logits

    def steps(self, widths: Tensor) -> Tensor:
        """Logits of single steps over all tokens, `[16, V]`; afterwards the row is as it was."""
        size = self.passes.bucket_size(self.context + max(PASS_SIZES))
        found = [self.passes.read(self.held, 0, size, [token_id], widths)[0] for token_id in self.token_ids]
        self.held.lengths.fill_(self.context)
        return torch.cat(found)


def random_row(shape: Shape, device: torch.device, context: int) -> FilledRow:
    """A row that holds `context` tokens."""
    passes = GraphPasses(nested_weights(shape, device))
    held = passes.take(1)
    cache = passes.bucket(held, passes.bucket_size(context + max(PASS_SIZES)))
    cache[:, :, :, :, :context] = torch.randn(cache[:, :, :, :, :context].shape, device=device)
    held.lengths.fill_(context)
    return FilledRow(passes, held, context, torch.randint(shape.vocab, (max(PASS_SIZES),)).tolist())


def check_rows(row: FilledRow, widths: Tensor) -> None:
    """Refuses to time passes whose logits are not those of single steps."""
    steps = row.steps(widths)
    for count in PASS_SIZES:
        if not torch.equal(row.read(count, widths), steps[:count]):
            raise BenchRefusedError(f"a pass over {count} tokens at {int(widths[0])} bits has other logits than steps")


def providers(row: FilledRow, clock: Clock, num_passes: int) -> list[Provider]:
    """Passes of every size at every width."""
    weights = row.passes.weights
    found = []
    for width in BIT_WIDTHS:
        widths = torch.full((weights.num_units,), width)
        check_rows(row, widths)
        for count in PASS_SIZES:
            facts = {"bit_width": width, "num_threads": 1, "num_tokens": count}
            num_bytes = round(float(weight_bytes(weights, width).sum()))
            found.append(Provider(_NAME, turn_of(row, clock, count, widths, num_passes), num_bytes, facts))
    return found


def turn_of(row: FilledRow, clock: Clock, count: int, widths: Tensor, num_passes: int) -> Turn:
    """A turn of passes, each a sample."""

    def turn() -> list[float]:
        return [clock.seconds(lambda: row.read(count, widths)) for _ in range(num_passes)]

    return turn


def measure(options: GraphVerifyBench, device: torch.device, track: Track) -> list[Row]:
    """Times every pass."""
    clock = CudaClock(device)
    torch.manual_seed(0)
    timed = providers(random_row(Shape(), device, options.context), clock, options.passes)
    everything = [copy_provider(clock, device), *timed]
    interleave(everything, options.rounds, track)
    found = rows(everything, {"op": "graph_verify", "context": options.context, "clock": clock.name, "seed": 0})
    add_steps(found[1:])
    return found


if __name__ == "__main__":
    run(
        "graph_verify",
        ("tests/kernels/test_gemv.py", "tests/engine/decoding/test_graph_session.py"),
        GraphVerifyBench,
        measure,
    )
