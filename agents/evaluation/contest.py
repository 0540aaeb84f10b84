"""The final comparison of a run: every family at the same time budgets on the same test text."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexquant_rl.agents.config import BASELINES
from flexquant_rl.agents.evaluation.baselines import contestant, tuned_baselines
from flexquant_rl.agents.evaluation.budgets import (
    BestOfFamily,
    Contestant,
    Entry,
    KnobFamily,
    MissingFamily,
    Rehearsal,
    SharingFamily,
    TimedFamily,
)
from flexquant_rl.agents.evaluation.equal_time import (
    Rung,
    StaticClock,
    beside_static,
    missing_rungs,
    on_validation_text,
    static_entries,
    static_family,
)
from flexquant_rl.agents.evaluation.evaluate import Evaluator, SharedTrace, Trace, summarise
from flexquant_rl.agents.evaluation.rows import EvalRow
from flexquant_rl.agents.evaluation.showcase import MostMoving
from flexquant_rl.agents.evaluation.wall_clock import ClockedShares, measured_time_shares
from flexquant_rl.agents.policies.families import PPO, STATIC, TOKEN, UNTRAINED
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.training import SeedResult
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.token_policy import DialPolicy, TokenPolicy
from flexquant_rl.fq_env.prompts import spread

# The dial goes a little beyond the range that was trained: the ends of the budgets may lie there.
_DIAL_MARGIN = 4.0
_TIMED_WINDOWS = 3
# More than this between the same steps, as a log ratio, is not the steps'.
_CLOCK_TOLERANCE = 0.03


@dataclass(frozen=True)
class Settings:
    """How every family meets the budgets.

    Attributes:
        entries: For each family and budget in reach, in the order of the families.
        missed: Which budgets are out of reach, and why, in words.
    """

    entries: tuple[Entry, ...]
    missed: tuple[str, ...]

    def static_at(self, time_budget: float | None) -> StaticAllocation | None:
        """The static allocation of a budget."""
        for entry in self.entries:
            if entry.family == STATIC.name and entry.time_budget == time_budget:
                assert isinstance(entry.first.policy, StaticAllocation)
                return entry.first.policy
        return None


def heuristics(
    prepared: Prepared,
    baselines: Collection[str] = BASELINES,
    rehearsal: Callable[[], Rehearsal] | None = None,
) -> list[TimedFamily]:
    """The families that learn nothing by reward: static allocations, fixed widths, and the tuned baselines named.

    The rehearsal is as for `tuned_baselines`.
    """
    context = policy_context(prepared)
    widths = prepared.model.bit_widths
    return [
        static_family(prepared),
        SharingFamily(Fixed.family.name, tuple(contestant(Fixed(width), context) for width in widths)),
        *tuned_baselines(prepared, context, baselines, rehearsal),
    ]


def learned(prepared: Prepared, results: Sequence[SeedResult], rehearsal: Callable[[], Rehearsal]) -> list[TimedFamily]:
    """The family of every training seed, its knob the dial on a log scale."""
    return [_rehearsed(dial_family(prepared, PPO.name, one.policy, one.seed), rehearsal) for one in results]


def untrained(prepared: Prepared, best: SeedResult, rehearsal: Callable[[], Rehearsal]) -> list[TimedFamily]:
    """The network of the best seed as PPO found it, a clone of static allocations by the importance of tokens."""
    if best.cloned is None:
        reason = f"the run has no network of seed {best.seed} from before PPO (cloned.safetensors)"
        return [MissingFamily(UNTRAINED.name, reason)]
    return [_rehearsed(dial_family(prepared, UNTRAINED.name, best.cloned, best.seed), rehearsal)]


def by_token(prepared: Prepared, policy: TokenPolicy | None, rehearsal: Callable[[], Rehearsal]) -> list[TimedFamily]:
    """The policy that looks at the input token alone."""
    if policy is None:
        return [MissingFamily(TOKEN.name, "this run is of a version that did not learn what tokens need")]
    return [_rehearsed(dial_family(prepared, TOKEN.name, policy, None), rehearsal)]


def _rehearsed(family: KnobFamily, rehearsal: Callable[[], Rehearsal]) -> BestOfFamily:
    """A family whose knob is turned in rehearsal before it is measured."""
    return BestOfFamily(family.name, (family,), rehearsal)


def dial_family(prepared: Prepared, name: str, policy: DialPolicy, seed: int | None) -> KnobFamily:
    """A policy at all settings of its dial, from a little below the trained range to a little above."""
    margin = 1.0 if prepared.env.kl_weight is not None else _DIAL_MARGIN
    low, high = math.log(prepared.env.kl_weight_min / margin), math.log(prepared.env.kl_weight_max * margin)

    def at(position: float) -> Contestant:
        return Contestant(name, policy, math.exp(low + position * (high - low)), seed)

    return KnobFamily(name, at, seed)


def tune(prepared: Prepared, families: Sequence[TimedFamily], budgets: Sequence[float], num_sequences: int) -> Settings:
    """Finds the setting of every family at every budget on validation text.

    Args:
        prepared: Model, text, latencies.
        families: The families.
        budgets: Shares of the time at the largest width everywhere.
        num_sequences: Sequences of validation text, as far as they help.
    """
    entries: list[Entry] = []
    missed: list[str] = []
    with on_validation_text(prepared, num_sequences) as measure:
        for family in track(families, "meeting the time budgets"):
            found, reasons = family.entries(budgets, measure)
            entries += found
            missed += reasons
    return Settings(tuple(entries), tuple(missed))


def compete(
    prepared: Prepared,
    contestants: Sequence[Contestant],
    num_sequences: int,
    references: Callable[[], Sequence[EvalRow]] = tuple,
    show_rungs: Callable[[list[Rung]], None] = lambda rungs: None,
) -> list[EvalRow]:
    """Runs single policies on the same test windows, and static ones in the time that each of them took.

    `references` and `show_rungs` are as for `compete_at_budgets`.
    """
    entries = tuple(Entry(one.family, None, one) for one in contestants)
    return compete_at_budgets(prepared, Settings(entries, ()), num_sequences, references, show_rungs=show_rungs)


def compete_at_budgets(
    prepared: Prepared,
    settings: Settings,
    num_sequences: int,
    references: Callable[[], Sequence[EvalRow]] = tuple,
    watch: Callable[[Contestant, Trace], None] = lambda one, trace: None,
    show_rungs: Callable[[list[Rung]], None] = lambda rungs: None,
) -> list[EvalRow]:
    """Runs every family at the settings that were found, on the same test windows, each policy once.

    Args:
        prepared: Model and profile.
        settings: What is run.
        num_sequences: Sequences of test text.
        references: Makes rows of the same windows that no policy makes, such as those of oracles.
        watch: Is shown what every policy did.
        show_rungs: Is given the static allocations that rows were compared with.
    """
    windows, documents = test_windows(prepared, num_sequences)
    members = _members(settings.entries)
    traces = dict(zip(members, traces_of(prepared, [*members.values()], windows), strict=True))
    for key, trace in traces.items():
        watch(members[key], trace)
    clocked, clock = _clocked(prepared, [*members.values()], windows)
    measured = dict(zip(members, zip(clocked.shares, clocked.errors, strict=True), strict=True))
    rows = _rows(prepared, settings, traces, measured, documents)
    beside = references()
    # One look at validation text for all of them: it takes as long as one for a few.
    taken = _taken_without_budget(settings.entries, rows)
    static = static_entries(prepared, sorted({*taken.values(), *missing_rungs([*rows, *beside], clock)}))
    rows = _beside_own_static(settings, traces, rows, {at: static.get(share) for at, share in taken.items()})
    found, rungs = beside_static(prepared, [*rows, *beside], windows, prepared.env, clock, static)
    show_rungs(rungs)
    return found


def compete_long(
    prepared: Prepared, settings: Settings, windows: Tensor, documents: Sequence[int], max_new_tokens: int
) -> list[EvalRow]:
    """The same on long continuations, beyond what the policies were trained to decode. Nothing is timed.

    Args:
        prepared: Model and profile.
        settings: What is run.
        windows: `[S, prompt_tokens + max_new_tokens + 1]` int64.
        documents: The document of each window.
        max_new_tokens: Tokens to decode.
    """
    longer = replace(prepared, env=replace(prepared.env, max_new_tokens=max_new_tokens))
    members = _members(settings.entries)
    traces = dict(zip(members, traces_of(longer, [*members.values()], windows), strict=True))
    rows = _beside_own_static(settings, traces, _rows(longer, settings, traces, {}, documents), {})
    static = static_entries(prepared, missing_rungs(rows, None))
    return beside_static(prepared, rows, windows, longer.env, None, static)[0]


_Key = tuple[object, ...]


def _members(entries: Sequence[Entry]) -> dict[_Key, Contestant]:
    """The distinct policies of some entries: an allocation that serves several budgets is run once."""
    return {_key(member): member for entry in entries for member in entry.members}


def _key(one: Contestant) -> _Key:
    if one.drafts is not None:
        return one.family, one.drafts.name
    if isinstance(one.policy, StaticAllocation):
        return tuple(one.policy.bit_widths.tolist())
    return one.family, one.seed, one.kl_weight, one.policy.name


def traces_of(prepared: Prepared, contestants: Sequence[Contestant], windows: Tensor) -> list[Trace]:
    """What each policy does on the same windows; static ones in one parallel pass."""
    evaluator = Evaluator(prepared.model, prepared.profile, windows, prepared.env, cost=prepared.cost)
    label = f"evaluating {prepared.env.max_new_tokens} tokens"
    static = [one.policy for one in contestants if isinstance(one.policy, StaticAllocation)]
    of_static = iter(evaluator.run_static(static, progress=lambda layers: track(layers, f"{label}, static")))
    others = [one for one in contestants if not isinstance(one.policy, StaticAllocation)]
    of_others = iter([evaluator.run(one.policy, one.kl_weight or 1.0) for one in track(others, label)])
    evaluator.close()
    return [next(of_static if isinstance(one.policy, StaticAllocation) else of_others) for one in contestants]


def _rows(
    prepared: Prepared,
    settings: Settings,
    traces: dict[_Key, Trace],
    measured: dict[_Key, tuple[float, float]],
    documents: Sequence[int],
) -> list[EvalRow]:
    """The rows of the entries, without static beside them; `measured` has shares and their standard errors."""
    rows = []
    for entry in settings.entries:
        keys = [_key(member) for member in entry.members]
        times = [measured[key] for key in keys if key in measured]
        # Time shares mix as the tokens do.
        time = (1 - entry.share) * times[0][0] + entry.share * times[-1][0] if times else None
        error = max(own for _, own in times) if times and not math.isnan(times[0][1]) else None
        rows.append(
            summarise(
                _trace_of(entry, traces),
                policy=entry.name,
                family=entry.family,
                reference=reference_name(prepared.model),
                seed=entry.first.seed,
                kl_weight=entry.first.kl_weight,
                time_budget=entry.time_budget,
                time_share_measured=time,
                time_share_measured_error=error,
                documents=documents,
                is_modelled=entry.first.drafts is None,
            )
        )
    return rows


def _taken_without_budget(entries: Sequence[Entry], rows: Sequence[EvalRow]) -> dict[int, float]:
    """By its index, the modelled share that an entry took which had no budget to meet; static is asked for the same."""
    return {
        index: row.time_share_modelled
        for index, (entry, row) in enumerate(zip(entries, rows, strict=True))
        if entry.time_budget is None and entry.family != STATIC.name and row.time_share_modelled is not None
    }


def _beside_own_static(
    settings: Settings,
    traces: dict[_Key, Trace],
    rows: Sequence[EvalRow],
    in_time_taken: Mapping[int, StaticAllocation | None],
) -> list[EvalRow]:
    """The rows with how often they differ from static: that of their budget, else that of the time they took.

    An entry of the static family stands beside itself.
    """
    found = []
    for index, (entry, row) in enumerate(zip(settings.entries, rows, strict=True)):
        own = entry.first.policy if entry.family == STATIC.name else None
        beside = in_time_taken[index] if index in in_time_taken else settings.static_at(entry.time_budget)
        static = own if isinstance(own, StaticAllocation) else beside
        found.append(unlike_static(row, _trace_of(entry, traces), static))
    return found


def unlike_static(row: EvalRow, trace: Trace | SharedTrace, static: StaticAllocation | None) -> EvalRow:
    """A row with how often its trace differs from static, where there is one."""
    return row if static is None else replace(row, differs_from_static=trace.differs_from(static.bit_widths))


def _trace_of(entry: Entry, traces: dict[_Key, Trace]) -> SharedTrace:
    keys = [_key(member) for member in entry.members]
    return SharedTrace(traces[keys[0]], traces[keys[-1]], entry.share)


def test_windows(prepared: Prepared, num_sequences: int) -> tuple[Tensor, list[int]]:
    """`[S, window_tokens]`, evenly spaced over the test split, and the document of each."""
    documents = spread(prepared.windows.documents("test"), num_sequences).tolist()
    return spread(prepared.windows.test, num_sequences), documents


def _clocked(
    prepared: Prepared, contestants: Sequence[Contestant], windows: Tensor
) -> tuple[ClockedShares, StaticClock | None]:
    """Measured time share of each contestant, and how the clock's shares of static allocations follow the modelled."""
    context = policy_context(prepared)
    fixed = [contestant(Fixed(width), context) for width in prepared.model.bit_widths]
    asked = [*contestants, *(one for one in fixed if _key(one) not in {_key(other) for other in contestants})]
    measured = clocked_shares(prepared, asked, windows)
    static = [
        (float(prepared.cost.time_share(one.policy.bit_widths)), share)
        for one, share in zip(asked, measured.shares, strict=True)
        if one.is_static and isinstance(one.policy, StaticAllocation)
    ]
    clock = StaticClock.fit([modelled for modelled, _ in static], [share for _, share in static])
    count = len(contestants)
    return replace(measured, shares=measured.shares[:count], errors=measured.errors[:count]), clock


def clocked_shares(prepared: Prepared, contestants: Sequence[Contestant], windows: Tensor) -> ClockedShares:
    """Measured time of each contestant on a few of the windows, over that of the largest width everywhere."""
    say("timing whole continuations")
    measured = measured_time_shares(
        prepared.model,
        prepared.profile,
        spread(windows, _TIMED_WINDOWS),
        prepared.env,
        [(one.drafts or one.policy, one.kl_weight or 1.0) for one in contestants],
        num_threads=prepared.num_threads,
        progress=lambda rounds: track(rounds, "timing"),
    )
    full = prepared.cost.full_width()
    _check_clock([share for one, share in zip(contestants, measured.shares, strict=True) if _plays(one, full)])
    return measured


def _check_clock(full_shares: Sequence[float]) -> None:
    """Says so if the largest width everywhere took another time than itself: then the machine was not quiet."""
    for share in full_shares:
        if abs(math.log(share)) > _CLOCK_TOLERANCE:
            say(
                f"the clock disagrees with itself: the largest width everywhere took {share:.2f} of its own time; "
                "measured shares are unreliable until the machine is quiet"
            )


def _plays(one: Contestant, bit_widths: Tensor) -> bool:
    widths = one.policy.bit_widths if isinstance(one.policy, StaticAllocation) and one.is_static else None
    return widths is not None and torch.equal(widths, bit_widths)


def most_moving(prepared: Prepared, one: Contestant, num_sequences: int) -> MostMoving:
    """What a learned policy does on the test windows at one dial, where none of its settings was run."""
    windows, _ = test_windows(prepared, num_sequences)
    seen = MostMoving()
    seen.consider(one, traces_of(prepared, [one], windows)[0])
    return seen


def read_tokens(prepared: Prepared, num_sequences: int, sequence_idx: int) -> list[str]:
    """The tokens that the steps of a test sequence read, decoded."""
    windows, _ = test_windows(prepared, num_sequences)
    tokens = windows[sequence_idx, prepared.env.prompt_tokens : -1].tolist()
    return [str(prepared.model.tokenizer.decode([token])) for token in tokens]
