"""`fq evaluate`: policies side by side on the test split of some text."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flexquant_rl.agents.commands.options import EvaluateOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.config import TrainConfig, check_config
from flexquant_rl.agents.evaluation.baselines import contestant
from flexquant_rl.agents.evaluation.budgets import Contestant
from flexquant_rl.agents.evaluation.comparison import Clock, compare, families
from flexquant_rl.agents.evaluation.contest import compete
from flexquant_rl.agents.evaluation.figures import plot_pareto
from flexquant_rl.agents.evaluation.report import PARETO_FILE, ROWS_FILE, console_table, write_report
from flexquant_rl.agents.evaluation.rows import EvalRow, public_dict, write_rows
from flexquant_rl.agents.export import ExportedPolicy, load_exported_together
from flexquant_rl.agents.policies.drafts import Drafts, parse_drafts
from flexquant_rl.agents.policies.families import PPO, parse_policy
from flexquant_rl.agents.policies.unbound import UnboundPolicy
from flexquant_rl.agents.preparation import Prepared, policy_context, prepare
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.policy import LearnedPolicy
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import check_new_directory, new_directory


def evaluate(options: EvaluateOptions) -> None:
    """Prints the table and the rows."""
    config = TrainConfig(
        model=options.model,
        text=tuple(map(str, options.text)),
        text_field=options.text_field,
        env=options.env,
        device=options.device,
        profile=None if options.profile is None else str(options.profile),
        latency=options.latency,
        threads=options.threads,
        test_sequences=options.sequences,
        num_dials=options.dials,
    )
    check_config(config)
    if not options.policy:
        raise InputError("--policy names no policy; name one or more, e.g. fixed:4 knapsack:4.5")
    if options.out is not None:
        check_new_directory(options.out)
    # Before the model: a wrong name or a damaged policy should not be found out after minutes.
    directories = {name: Path(name) for name in options.policy if Path(name).is_dir()}
    unbound = {name: parse_drafts(name) or parse_policy(name) for name in options.policy if name not in directories}
    exported = load_exported_together(directories)
    if exported:
        config = replace(config, quantization=next(iter(exported.values())).quantization)
    # First those that carry a profile: of fixed widths and drafts nothing was measured.
    carrying = sorted(exported.values(), key=lambda one: -one.profile.num_tokens)
    prepared = prepare(config, None, carrying)
    rows = compete(prepared, _contestants(prepared, options, unbound, exported), options.sequences)
    print(console_table(rows))
    clocks: tuple[Clock, ...] = ("modelled", "measured")
    found = [compare(rows, family, clock=clock) for family in families(rows) for clock in clocks]
    findings = [comparison.sentence() for comparison in found if comparison is not None]
    print(*(f"{finding}." for finding in findings), sep="\n", end="\n\n")
    if options.out is not None:
        _write(options.out, prepared, options, rows, findings)
    print_result(
        {
            "latency_source": prepared.cost.source,
            "reference": reference_name(prepared.model),
            "findings": findings,
            "rows": [public_dict(row) for row in rows],
            "out": None if options.out is None else str(options.out),
        }
    )


def _write(
    out: Path, prepared: Prepared, options: EvaluateOptions, rows: Sequence[EvalRow], findings: Sequence[str]
) -> None:
    """Leaves the report, its rows and the picture of both modes."""
    name, text, source = Path(resolve_model(options.model)).name, prepared.windows.source, prepared.cost.source
    tokens = prepared.env.max_new_tokens
    with new_directory(out) as directory:
        write_rows(directory / ROWS_FILE, rows)
        plot_pareto(
            rows,
            directory / PARETO_FILE,
            title="Output KL at equal time",
            caption=f"{name}, {text}; {rows[0].num_sequences} test sequences of {tokens} tokens; KL against the "
            f"{reference_name(prepared.model)} model.",
            source=source,
        )
        facts = {"model": name, "text": text, "profile source": source, "machine": platform.machine()}
        write_report(directory, rows=rows, sentences=findings, facts=facts)


def _contestants(
    prepared: Prepared,
    options: EvaluateOptions,
    unbound: dict[str, UnboundPolicy | Drafts],
    exported: dict[str, ExportedPolicy],
) -> list[Contestant]:
    """Policies in the order of their names; learned ones at every setting of the dial."""
    context = policy_context(prepared)
    found = []
    for name in options.policy:
        if name in unbound:
            asked = unbound[name]
            if isinstance(asked, Drafts):
                found.append(Contestant.of_drafts(Drafts.family.name, asked.bind(context)))
            else:
                found.append(contestant(asked, context))
            continue
        policy = exported[name].policy
        if isinstance(policy, DeployedDrafts):
            found.append(Contestant.of_drafts(f"{Drafts.family.name}:{name}", policy))
            continue
        family = f"{PPO.name}:{name}" if isinstance(policy, LearnedPolicy) else name  # each a front of its own
        dials = _dials(prepared, policy, options.dials) if isinstance(policy, LearnedPolicy) else [None]
        found += [Contestant(family, policy, dial) for dial in dials]
    return found


def _dials(prepared: Prepared, policy: LearnedPolicy, count: int) -> list[float]:
    """Settings of a policy's dial: over the range that its card knows, or the one asked for."""
    known = [point.kl_weight for point in policy.card.dial]
    if prepared.env.kl_weight is not None or not known:
        return prepared.dials(count).tolist()
    return torch.logspace(math.log10(min(known)), math.log10(max(known)), count, dtype=torch.float64).tolist()
