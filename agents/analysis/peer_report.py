"""The part of an analysis' report that is about other libraries: at equal bytes and at equal time, where ours stand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from flexquant_rl.agents.analysis.rows import StrategyRow, TimeRow, times_by_row
from flexquant_rl.agents.analysis.strategies import is_peer, recipe_text
from flexquant_rl.agents.analysis.token_report import kl_text
from flexquant_rl.agents.evaluation.markdown import bullets, table_of

_Place = Callable[[StrategyRow], float | None]
"""Where a row stands: its bytes, or its time if it has one."""


def ms_text(row: TimeRow | None) -> str:
    """A measured time with its quartiles."""
    if row is None:
        return "not measured"
    return f"{row.measured_ms:#.3g} ({row.measured_low:#.3g} to {row.measured_high:#.3g})"


def line_at(line: Sequence[tuple[float, float]], at: float) -> float | None:
    """The height of a line through points, ordered by their place; None outside."""
    for (left, low), (right, high) in itertools.pairwise(line):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return None


def best_at(rows: Sequence[StrategyRow], place: _Place, at: float) -> tuple[float, str] | None:
    """The least KL of our strategies at a place, and whose it is; None where all of them are beyond it.

    The logarithm of KL is taken from a straight line between neighbours of those that no cheaper one beats. Where even
    the last of them is cheaper, it is that one's.
    """
    found = []
    for name in dict.fromkeys(row.strategy for row in rows if not is_peer(row.strategy)):
        own = [(place(row), row.output_kl_nats) for row in rows if row.strategy == name and row.output_kl_nats > 0]
        line: list[tuple[float, float]] = []
        for x, kl in sorted((x, math.log(kl)) for x, kl in own if x is not None):
            if not line or kl < line[-1][1]:  # what is dearer and loses more is nobody's choice
                line.append((x, kl))
        height = line[-1][1] if line and at > line[-1][0] else line_at(line, at)
        if height is not None:
            found.append((math.exp(height), name))
    return min(found, default=None)


def peer_sections(rows: Sequence[StrategyRow], times: Sequence[TimeRow]) -> list[str]:
    """The table of other libraries' formats, each beside ours at its bytes and at its time; nothing without any."""
    peers = [row for row in rows if is_peer(row.strategy)]
    if not peers:
        return []
    clock, lines = times_by_row(rows, times), []
    for row in peers:
        beside = [_beside(rows, place, row) for place in _places(rows, times, row)]
        lines.append(
            (
                f"`{row.strategy}`",
                str(row.bit_width),
                kl_text(row.output_kl_nats),
                f"{kl_text(row.output_kl_low)} to {kl_text(row.output_kl_high)}",
                kl_text(row.output_kl_p99_nats),
                f"{row.perplexity:#.4g}",
                f"{100 * row.top1_agreement:.1f}",
                f"{row.bytes_per_weight:.3f}",
                ms_text(clock.get((row.strategy, row.bit_width))),
                *beside,
            )
        )
    header = (
        *("format", "bits", "output KL (nats)", "95% interval", "KL p99 (nats)", "perplexity", "top-1 agreement (%)"),
        *("bytes per weight", "ms per token, measured", "ours at its bytes (nats)", "ours at its time (nats)"),
    )
    seconds: dict[str, list[str]] = {}
    for row in peers:
        seconds.setdefault(row.strategy, []).append(f"{row.quantising_seconds:.0f} s at {row.bit_width} bits")
    return [
        "## Beside other libraries",
        table_of(header, lines),
        bullets(
            [f"`{name}`: {recipe_text(name)}; quantising took {' and '.join(each)}." for name, each in seconds.items()]
        ),
    ]


def peer_findings(rows: Sequence[StrategyRow], times: Sequence[TimeRow]) -> list[str]:
    """How our best strategies compare with each library, in a sentence each for bytes and for time."""
    found = []
    peers = [(row, _places(rows, times, row)) for row in rows if is_peer(row.strategy)]
    for number, words in enumerate(("bytes per weight", "measured time")):
        compared, beaten = [], []
        for row, places in peers:
            place = places[number]
            at = place(row)
            best = None if at is None else best_at(rows, place, at)
            if best is not None and row.output_kl_nats > 0:
                label = f"`{row.strategy}` at {row.bit_width} bits"
                compared.append(f"{label} {best[0] / row.output_kl_nats:.2g}")
                beaten += [label] if best[0] <= row.output_kl_nats else []
        if compared:
            found.append(
                f"KL of our best strategy over that of another library's format at equal {words}: "
                f"{', '.join(compared)}. Ours loses no more in {len(beaten)} of {len(compared)}."
            )
    return found


def peer_method(rows: Sequence[StrategyRow], times: Sequence[TimeRow]) -> list[str]:
    """How other libraries were measured; nothing without any."""
    if not any(is_peer(row.strategy) for row in rows):
        return []
    turns = "all formats in turns on as many threads as ours"  # analyses of before version 4
    if any(row.beside for row in times):
        turns = (
            "each in turns with ours on as many threads while no other library's model is held. Ours at its time is by "
            "the same turns"
        )
    return [
        "Other libraries quantise the unquantised weights themselves, without text. KL is of the values that their "
        "files or modules stand for, read in float32 by the same modules as ours; what they lose by rounding "
        "activations is not in it. Their bytes are those that they store of the nested matrices, scales included: "
        "llama.cpp gives some matrices another type than it is asked for, and rows that are no multiple of 256 have "
        "no k-quant. With a tied head its embedding is quantised too.",
        "Their times are of their own decoding (llama.cpp's library; HQQ's modules in Hugging Face's model, which "
        f"decode a matrix at every step on a CPU), {turns}.",
        "Ours at its bytes, or at its time: the least KL of our strategies there, its logarithm taken from a straight "
        "line between neighbouring widths of one strategy, or that of its largest width where even this one reads or "
        "takes less; nothing where all of them need more.",
    ]


def _places(rows: Sequence[StrategyRow], times: Sequence[TimeRow], peer: StrategyRow) -> tuple[_Place, _Place]:
    """Bytes per weight, and milliseconds by the turns that a peer's format took with ours."""
    # Analyses of before version 4 had all formats take turns at once.
    beside = peer.strategy if any(row.beside == peer.strategy for row in times) else None
    clock = times_by_row(rows, times, beside)

    def time_of(row: StrategyRow) -> float | None:
        timed = clock.get((row.strategy, row.bit_width))
        return None if timed is None else timed.measured_ms

    return (lambda row: row.bytes_per_weight), time_of


def _beside(rows: Sequence[StrategyRow], place: _Place, row: StrategyRow) -> str:
    at = place(row)
    best = None if at is None else best_at(rows, place, at)
    return "-" if best is None else f"{kl_text(best[0])} `{best[1]}`"
