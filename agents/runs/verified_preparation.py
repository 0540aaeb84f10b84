"""From a model and some text to what training policies of drafts needs: a recording, costs, tables of its splits.

Recording and costs are kept in the run's directory, so that a resume finds the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.evaluation.drafting import context_of
from flexquant_rl.agents.policies.draft_levels import mixed_levels
from flexquant_rl.agents.preparation import profile_beside
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.clock_check import warn_of_clock
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.artefact import PROFILE_FILE
from flexquant_rl.engine.control.draft_timer import timed_drafts
from flexquant_rl.engine.control.drafting_rules import DraftingContext
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.recording import record
from flexquant_rl.engine.control.traces import RecordingPlan, SplitName, Traces, is_whole, read_plan, read_traces
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_json, write_json
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.recording_prompts import plan_recording
from flexquant_rl.fq_env.trace_table import TraceTable

TRACES_FOLDER, COSTS_FILE = "traces", "costs.json"
_COSTS_VERSION = 3
_MOST_RECORDERS = 4
_OPTION = "--profile FILE (without --latency)"
_TIMED_AGAIN = "delete it to have drafts and passes timed again"


@dataclass(frozen=True)
class PreparedDrafts:
    """What every later phase needs.

    Attributes:
        model: The nested model.
        traces: The recording.
        costs: What drafts, passes and decisions cost on this device.
        timed_by: Who measured that: `this run` or `fq profile`.
        ngram_drafts: Drafts of a round at most that are found in the text.
    """

    model: NestedCausalLM
    traces: Traces
    costs: VerifyCosts
    timed_by: str
    ngram_drafts: int

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
        return self.traces.plan.levels(self.model.num_units)

    @property
    def verify_bit_widths(self) -> Tensor:
        """`[U]` int64."""
        return torch.full((self.model.num_units,), self.traces.plan.verify_width)

    def _table(self, *splits: SplitName) -> TraceTable:
        chosen = [index for split in splits for index in self.traces.of_split(split)]
        return TraceTable(self.traces, sorted(chosen), self.ngram_drafts)


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
        progress=track,
    ).to(config.device)
    profiled = _profiled_costs(config, model, run_dir)  # before what takes minutes, too
    traces = _recorded(config, model, run_dir / TRACES_FOLDER)
    for split in ("train", "validation", "test"):
        if not traces.of_split(split):
            raise InputError(f"the traces hold no {split} sequence; record more with `fq record --tokens`")
    costs, timed_by = _costs(config, model, traces.plan, run_dir / COSTS_FILE, profiled)
    return PreparedDrafts(model, traces, costs, timed_by, min(config.verified.ngram_drafts, traces.plan.depth))


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
        mixed=mixed_levels(model, drafts.widths, _profile_file(config, directory.parent), _OPTION),
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


def _costs(
    config: TrainConfig, model: NestedCausalLM, plan: RecordingPlan, path: Path, profiled: VerifyCosts | None
) -> tuple[VerifyCosts, str]:
    """The costs that a run has kept, those of a profile, or those timed now; and by whom they were timed."""
    if path.exists():
        return _kept_costs(path, plan)
    costs, timed_by = profiled, "fq profile"
    if costs is None:
        say("timing drafts, passes and decisions")
        costs, timed_by = (
            timed_drafts(
                model,
                plan.levels(model.num_units),
                verify_width=plan.verify_width,
                depth=plan.depth,
                decoder=plan.decoder,
                num_threads=config.threads,
            ),
            "this run",
        )
    warn_of_clock(
        costs,
        f"delete {path} when the machine is quiet, and start a new run with --traces"
        if profiled is None
        else "run fq profile again when the machine is quiet, and start a new run with --traces",
    )
    kept = {"version": _COSTS_VERSION, "recording": plan.digest(), "costs": costs.to_dict(), "timed_by": timed_by}
    write_json(path, kept)
    return costs, timed_by


def _profiled_costs(config: TrainConfig, model: NestedCausalLM, run_dir: Path) -> VerifyCosts | None:
    """The costs of the profile that is named, which must fit, or of the one beside the model, where it fits."""
    named = _named_profile(config, run_dir)
    path = _profile_file(config, run_dir)
    if path is None or (run_dir / COSTS_FILE).exists():
        return None
    plan = None if config.traces is None else read_plan(Path(config.traces))
    wanted = plan or config.verified
    widths = config.verified.widths if plan is None else plan.draft_widths
    decoder = default_decoder(model)[0] if plan is None else plan.decoder
    if not all(map(is_whole, widths)):
        say("drafts and passes are timed here, as a profile has no times of drafts between stored widths")
        return None
    try:
        times = Profile.load(path).draft_times(model, decoder, config.threads)
        costs = times.costs_of(sorted(set(map(int, widths))), wanted.verify_width, wanted.depth)
    except InputError as error:
        if named is not None:
            raise InputError(f"{config.profile}: {error}, or leave --profile out to have drafts timed here") from error
        say(f"drafts and passes are timed here, as {path} does not do: {error}")
        return None
    say(f"times of drafts and passes are those of {config.profile or path}")
    return costs


def _named_profile(config: TrainConfig, run_dir: Path) -> Path | None:
    """The profile that the run has kept, or that its options name."""
    kept = run_dir / PROFILE_FILE
    return kept if kept.exists() else None if config.profile is None else Path(config.profile)


def _profile_file(config: TrainConfig, run_dir: Path) -> Path | None:
    """That profile, or the one beside the model where times are not asked to be taken here."""
    return _named_profile(config, run_dir) or (profile_beside(config.model) if config.latency is None else None)


def _kept_costs(path: Path, plan: RecordingPlan) -> tuple[VerifyCosts, str]:
    kept = read_costs(path)
    if kept.recording != plan.digest():
        raise InputError(f"{path} is of another recording than this run's; put that one back, or start a new run")
    try:
        kept.costs.check(len(plan.draft_widths), plan.depth)
    except InputError as error:
        raise InputError(f"{path}: {error}; {_TIMED_AGAIN}") from error
    return kept.costs, kept.timed_by


@dataclass(frozen=True)
class KeptCosts:
    """The costs that a run keeps.

    Attributes:
        costs: What they are.
        recording: Digest of the recording that they are of.
        timed_by: Who measured them: `this run` or `fq profile`.
    """

    costs: VerifyCosts
    recording: str
    timed_by: str


def read_costs(path: Path) -> KeptCosts:
    """Reads the costs that a run keeps.

    Raises:
        InputError: If the file cannot be read, or is of another version.
    """
    try:
        data = read_json(path)
        version = data["version"]
        costs = VerifyCosts.from_dict(data["costs"])
        kept = KeptCosts(costs, str(data["recording"]), str(data.get("timed_by", "this run")))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: no readable costs ({error}); {_TIMED_AGAIN}") from error
    if version != _COSTS_VERSION:
        # What the run has tuned and chosen by the old ones would not agree with new ones.
        raise InputError(
            f"{path} has costs of version {version}, this is {_COSTS_VERSION}; start a new run, with --traces "
            f"{path.parent / TRACES_FOLDER} if the recording is there"
        )
    return kept


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
