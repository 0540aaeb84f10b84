"""The stages of an analysis, strategy by strategy, each kept as soon as it is there and never done twice."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flexquant_rl.agents.analysis.measure import PeerTurn, part_rows, past_rows, strategy_rows, time_rows, window_rows
from flexquant_rl.agents.analysis.peers import Peers
from flexquant_rl.agents.analysis.rows import (
    PartRow,
    PastRow,
    Plan,
    RowStore,
    StrategyRow,
    TimeRow,
    TokensRow,
    WindowRow,
)
from flexquant_rl.agents.analysis.strategies import STORED, Strategy, by_start, is_peer, parse_strategy
from flexquant_rl.agents.progress import say, track
from flexquant_rl.engine.checkpoint import load_checkpoint, load_model
from flexquant_rl.engine.context_length import max_context
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.freed_memory import return_freed_memory
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import give_reference, nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig, TuningConfig
from flexquant_rl.engine.quantisation.tuning import default_learning_rate, tune_pairs
from flexquant_rl.engine.quantisation.unfinished import (
    STATE_FILE,
    has_start,
    nested_start,
    removed_when_over,
    unfinished_directory,
)
from flexquant_rl.fq_env.calibration_text import CalibrationText


@dataclass(frozen=True, eq=False)
class AnalysedText:
    """The text of an analysis.

    Attributes:
        windows: `[n, first + T + 1]` int64.
        sources: The file of each window.
        documents: The document of each window.
    """

    windows: Tensor
    sources: tuple[str, ...]
    documents: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is measured, of which model, and where it is kept.

    Attributes:
        store: The rows.
        plan: What they depend on.
        text: What is read.
        path: Directory or name of the model.
        fitted_to: The text that strategies are fitted to.
        reference: Directory or name of the model that a nested checkpoint is judged against; None: its own 8 bits.
        examined: The strategy whose parts and pasts are measured.
        peers: Whether other libraries' formats are measured too.
    """

    store: RowStore
    plan: Plan
    text: AnalysedText
    path: str
    fitted_to: CalibrationText
    reference: str | None
    examined: str
    peers: bool = False

    def run(self, strategies: Sequence[str]) -> None:
        """Measures what is missing of some strategies, by name."""
        if self.plan.nested and self._is_missing(STORED):
            self._measure(self._stored(), STORED, 0.0)
            gc.collect()
            return_freed_memory()
        for start, members in by_start(map(parse_strategy, () if self.plan.nested else strategies)):
            missing = [one for one in members if self._is_missing(one.name)]
            if missing:
                self._run_start(start, missing)
                gc.collect()
                return_freed_memory()
        # A nested checkpoint has no weights that another library could quantise; what it was made from has.
        peers = Peers(self.reference or self.path, self.plan, self.text.windows) if self.peers else None
        if peers is not None:
            for name in peers.names():
                if name not in self._names(StrategyRow):
                    self._measure_peer(peers, name)
        self._time(peers)

    def _stored(self) -> NestedCausalLM:
        """The nested checkpoint, with what it is judged against."""
        model = load_checkpoint(Path(self.path))
        if self.reference is not None:
            give_reference(model, load_causal_lm(self.reference)[0])
        return model

    def _measure_peer(self, peers: Peers, name: str) -> None:
        """Measures a format of another library; the text has been read with the reference before."""
        found, tokens = peers.rows(name, self.store.read(WindowRow))
        self.store.replace(tokens, TokensRow, [name])
        self.store.add(found)
        for row in found:
            say(f"{name}: KL {row.output_kl_nats:.4f} nats at {row.bytes_per_weight:.3f} bytes per weight")
        return_freed_memory()

    def _time(self, peers: Peers | None) -> None:
        """Times our formats, and each of another library in turns with ours, whatever is missing.

        The cheapest recipe stands for all of a group size. One format of another library is held at a time, so that
        its time does not depend on which others are measured.
        """
        sizes = sorted({row.group_size for row in self.store.read(StrategyRow) if not is_peer(row.strategy)})
        names = [name for name in peers.names() if name in self._names(StrategyRow)] if peers else []
        missing = [beside for beside in (None, *names) if not self._is_timed(beside, sizes)]
        if not missing:
            return
        if self.plan.nested:
            models = [load_checkpoint(Path(self.path))]
        else:
            configs = [QuantizationConfig("rtn", size, self.plan.bit_widths) for size in sizes]
            models = [load_model(self.path, config, keep_reference=False) for config in configs]
        decoder, num_threads = default_decoder(models[0], self.plan.threads)
        if decoder != "lean":
            # Hugging Face's modules read decoded matrices, the same bytes at every width: their time says nothing.
            return
        for beside in missing:
            say(f"timing steps in groups of {', '.join(map(str, sizes))}" + (f" beside {beside}" if beside else ""))
            opened: AbstractContextManager[list[PeerTurn]] = (
                peers.turns(beside, num_threads) if peers and beside else nullcontext([])
            )
            with opened as turns:
                found = time_rows(models, self.plan, self.text.windows, turns, beside)
            kept = [row for row in self.store.read(TimeRow) if row.beside != beside]
            self.store.replace([*kept, *found], TimeRow)

    def _is_timed(self, beside: str | None, sizes: Sequence[int]) -> bool:
        """Whether all our group sizes took turns, alone or with a format of another library."""
        rows = [row for row in self.store.read(TimeRow) if row.beside == beside]
        return {row.group_size for row in rows if row.strategy is None} >= set(sizes)

    def _run_start(self, start: Strategy, members: Sequence[Strategy]) -> None:
        """Quantises once and measures all strategies that begin with it."""
        say(f"{start.name}: loading the model")
        began = time.perf_counter()
        hf_model, tokenizer = load_causal_lm(self.path)
        config = QuantizationConfig(start.method, start.group_size, self.plan.bit_widths, rotate=start.rotated)

        def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
            return track(items, f"{start.name}: {label}")

        if not start.calibrated:
            model = nest(hf_model, tokenizer, config, progress=progress)
            self._measure(model, start.name, time.perf_counter() - began)
            return
        steps = self.plan.tune_steps if any(one.tuned for one in members) else 0
        tuning = TuningConfig(steps, default_learning_rate(hf_model.num_parameters()))
        moments, windows = self.fitted_to.fitting_windows(tokenizer, max_context(hf_model), steps)
        directory = unfinished_directory(self.store.directory / start.name.replace(":", "-"))
        with removed_when_over(directory):
            was_there = has_start(directory)
            model = nested_start(directory, hf_model, tokenizer, config, moments, progress=progress)
            # What an interrupted run has quantised took a time that is not known.
            seconds = math.nan if was_there else time.perf_counter() - began
            for one in members:
                if one.tuned:
                    held_out = self.fitted_to.held_out_windows(tokenizer, model.max_context)
                    seconds += tune_pairs(
                        model, windows, held_out, tuning, state_file=directory / STATE_FILE, report=say
                    )
                self._measure(model, one.name, seconds)

    def _measure(self, model: NestedCausalLM, name: str, seconds: float) -> None:
        store, plan, text = self.store, self.plan, self.text
        rows = store.read(WindowRow)
        if not rows:
            say("reading the text with the reference")
            rows = window_rows(model, plan, text.windows, text.sources, text.documents)
            store.replace(rows, WindowRow)
        if name not in self._names(StrategyRow):
            found, tokens = strategy_rows(model, name, plan, text.windows, rows, seconds, track)
            store.replace(tokens, TokensRow, [name])
            store.add(found)
            for row in found:
                say(f"{name}: KL {row.output_kl_nats:.4f} nats at {row.bit_width} bits")
        if name == self.examined and name not in self._names(PastRow):
            store.replace(past_rows(model, name, plan, text.windows, track), PastRow, [name])
        if name == self.examined and name not in self._names(PartRow):
            store.replace(part_rows(model, name, plan, text.windows, track), PartRow, [name])

    def _is_missing(self, name: str) -> bool:
        kinds: list[type[Any]] = [StrategyRow]
        if name == self.examined:
            kinds += [PartRow, PastRow]
        return any(name not in self._names(kind) for kind in kinds)

    def _names(self, kind: type[Any]) -> set[str]:
        return {row.strategy for row in self.store.read(kind)}


@contextmanager
def goes_on() -> Iterator[None]:
    """Tells whoever interrupts the block that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        if interruption.args:  # a stage has said so already
            raise
        raise KeyboardInterrupt("the same command goes on from there") from interruption
