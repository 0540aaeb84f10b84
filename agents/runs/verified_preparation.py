"""From a model and some text to what training policies of drafts needs: a recording, costs, tables of its splits.

Recording and costs are kept in the run's directory, so that a resume finds the same ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.evaluation.drafting import context_of
from flexquant_rl.agents.progress import say, track
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.drafting_rules import DraftingContext
from flexquant_rl.engine.control.recording import record
from flexquant_rl.engine.control.traces import SplitName, Traces, read_plan, read_traces
from flexquant_rl.engine.control.verified_signals import VerifiedSchema
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.control.verify_timer import measured_costs, measured_decision_ms
from flexquant_rl.engine.decoding.choice import session_opener
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_json, write_json
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.recording_prompts import plan_recording
from flexquant_rl.fq_env.trace_table import TraceTable

TRACES_FOLDER, COSTS_FILE = "traces", "costs.json"
_COSTS_VERSION = 2
_CONTEXT_TOKENS = 64
_MOST_RECORDERS = 4
# The same step timed in two ways, as a log ratio. One of them asks a policy.
_TOLERANCE = 0.25


@dataclass(frozen=True)
class PreparedDrafts:
    """What every later phase needs.

    Attributes:
        model: The nested model.
        traces: The recording.
        costs: What drafts, passes and decisions cost on this device.
    """

    model: NestedCausalLM
    traces: Traces
    costs: VerifyCosts

    @cached_property
    def train(self) -> TraceTable:
        """Training sequences."""
        return self._table("train")

    @cached_property
    def validation(self) -> TraceTable:
        """Validation sequences."""
        return self._table("validation")

    @cached_property
    def tuning(self) -> TraceTable:
        """Both: what rules are tuned on."""
        return self._table("train", "validation")

    @cached_property
    def test(self) -> TraceTable:
        """Test sequences, opened by the evaluation alone."""
        return self._table("test")

    @cached_property
    def context(self) -> DraftingContext:
        """What rules may know, from training sequences."""
        return context_of(self.train, self.costs)

    @property
    def levels(self) -> Tensor:
        """`[L, U]` int64, the allocations that draft."""
        widths = torch.tensor(self.traces.plan.draft_widths)
        return widths[:, None].expand(-1, self.model.num_units).contiguous()

    @property
    def verify_bit_widths(self) -> Tensor:
        """`[U]` int64."""
        return torch.full((self.model.num_units,), self.traces.plan.verify_width)

    def _table(self, *splits: SplitName) -> TraceTable:
        chosen = [index for split in splits for index in self.traces.of_split(split)]
        return TraceTable(self.traces, sorted(chosen))


def prepare_drafts(config: TrainConfig, run_dir: Path) -> PreparedDrafts:
    """Loads or quantises the model, records what is missing, and times drafts and passes where that is not done.

    Args:
        config: Configuration of the run.
        run_dir: Where recording and costs are kept.

    Raises:
        InputError: If the model, the text or the recording cannot be used, or not together.
    """
    if config.traces is not None:  # before the model: a wrong directory should not be found out after minutes
        _check_recorded_alone(config)
        read_plan(Path(config.traces))
    say("loading the model and nesting its weights")
    model = load_model(
        resolve_model(config.model),
        config.quantization,
        keep_reference=False,
        progress=lambda items: track(items, "quantising"),
    ).to(config.device)
    traces = _recorded(config, model, run_dir / TRACES_FOLDER)
    for split in ("train", "validation", "test"):
        if not traces.of_split(split):
            raise InputError(f"the traces hold no {split} sequence; record more with `fq record --tokens`")
    return PreparedDrafts(model, traces, _costs(config, model, traces, run_dir / COSTS_FILE))


def _check_recorded_alone(config: TrainConfig) -> None:
    """Raises InputError on options of a recording beside one that exists."""
    default, own = TrainConfig().verified, config.verified
    names = ("tokens", "widths", "depth", "verify_width", "prompt_tokens", "max_new_tokens")
    given = [f"--verified.{name.replace('_', '-')}" for name in names if getattr(own, name) != getattr(default, name)]
    given += [f"--{name.replace('_', '-')}" for name in ("text", "text_field") if getattr(config, name)]
    if given:
        raise InputError(f"{given[0]} is for a recording made here, and --traces {config.traces} is one; leave it out")


def _recorded(config: TrainConfig, model: NestedCausalLM, directory: Path) -> Traces:
    if config.traces is not None:
        traces = read_traces(Path(config.traces))
        traces.plan.check_model(model.fingerprint)
        return traces
    drafts = config.verified
    plan = plan_recording(
        model,
        [Path(text) for text in config.text],
        decoder="auto" if config.device == "cpu" else "hf",
        verify_width=drafts.verify_width,
        widths=drafts.widths,
        depth=drafts.depth,
        tokens=drafts.tokens,
        prompt_tokens=drafts.prompt_tokens,
        max_new_tokens=drafts.max_new_tokens,
        text_field=config.text_field,
    )
    say(f"recording {len(plan.sequences)} continuations and the drafts of {len(plan.draft_widths)} widths")
    # The bytes are the same however many sequences are recorded at a time.
    num_threads = config.threads or min(_MOST_RECORDERS, os.cpu_count() or 1)
    record(plan, model, directory, num_threads=num_threads, progress=track)
    return read_traces(directory)


def _costs(config: TrainConfig, model: NestedCausalLM, traces: Traces, path: Path) -> VerifyCosts:
    plan = traces.plan
    if path.exists():
        return _kept_costs(path, plan.digest())
    say("timing drafts, passes and decisions")
    schema = VerifiedSchema(len(plan.draft_widths), plan.depth, traces.embedding.shape[1])
    controller_ms, confidence_ms = measured_decision_ms(model, schema)
    context = min(_CONTEXT_TOKENS, model.max_context - plan.depth - 2)
    opener = session_opener(
        model, max_length=context + plan.depth + 2, decoder=plan.decoder, num_threads=config.threads
    )
    session = opener(1)
    costs = measured_costs(
        session,
        plan.draft_widths,
        verify_width=plan.verify_width,
        depth=plan.depth,
        context=context,
        controller_ms=controller_ms,
        confidence_ms=confidence_ms,
    )
    session.close()
    of_itself = costs.verify_ms[0] / costs.full_ms
    if plan.verify_width == max(model.bit_widths) and abs(math.log(of_itself)) > _TOLERANCE:
        say(
            f"the clock disagrees with itself: a step took {of_itself:.2f} of its own time; what is judged by these "
            f"times is unreliable: delete {path} when the machine is quiet, and start a new run with --traces"
        )
    write_json(path, {"version": _COSTS_VERSION, "recording": plan.digest(), "costs": costs.to_dict()})
    return costs


def _kept_costs(path: Path, recording: str) -> VerifyCosts:
    costs, recorded = read_costs(path)
    if recorded != recording:
        raise InputError(f"{path} is of another recording than this run's; put that one back, or start a new run")
    return costs


def read_costs(path: Path) -> tuple[VerifyCosts, str]:
    """The costs that a run keeps, and the digest of the recording that they are of.

    Raises:
        InputError: If the file cannot be read, or is of another version.
    """
    fix = "delete it to have drafts and passes timed again"
    try:
        data = read_json(path)
        version, recorded = data["version"], str(data["recording"])
        costs = VerifyCosts.from_dict(data["costs"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: no readable costs ({error}); {fix}") from error
    if version != _COSTS_VERSION:
        # What the run has tuned and chosen by the old ones would not agree with new ones.
        raise InputError(
            f"{path} has costs of version {version}, this is {_COSTS_VERSION}; start a new run, with --traces "
            f"{path.parent / TRACES_FOLDER} if the recording is there"
        )
    return costs, recorded


def longest_first(table: TraceTable, count: int) -> Sequence[int]:
    """At most `count` sequences of a table, those of most tokens, of as many documents as there are."""
    order = sorted(range(table.num_sequences), key=lambda index: -int(table.num_tokens[index]))
    seen: dict[int, int] = {}
    turn = list[tuple[int, int]]()
    for place, index in enumerate(order):
        document = int(table.documents[index])
        turn.append((seen.get(document, 0), place))
        seen[document] = seen.get(document, 0) + 1
    return [order[place] for _, place in sorted(turn)][:count]
