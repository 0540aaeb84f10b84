"""`fq evaluate`: policies side by side on the test split of some text."""

from __future__ import annotations

import math
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
from flexquant_rl.agents.evaluation.report import console_table
from flexquant_rl.agents.evaluation.rows import public_dict
from flexquant_rl.agents.export import ExportedPolicy, load_exported_together
from flexquant_rl.agents.policies.families import PPO, parse_policy
from flexquant_rl.agents.policies.unbound import UnboundPolicy
from flexquant_rl.agents.preparation import Prepared, policy_context, prepare
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.policy import LearnedPolicy
from flexquant_rl.engine.errors import InputError


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
    # Before the model: a wrong name or a damaged policy should not be found out after minutes.
    directories = {name: Path(name) for name in options.policy if Path(name).is_dir()}
    unbound = {name: parse_policy(name) for name in options.policy if name not in directories}
    exported = load_exported_together(directories)
    if exported:
        config = replace(config, quantization=next(iter(exported.values())).quantization)
    prepared = prepare(config, None, tuple(exported.values()))
    rows = compete(prepared, _contestants(prepared, options, unbound, exported), options.sequences)
    print(console_table(rows))
    clocks: tuple[Clock, ...] = ("modelled", "measured")
    found = [compare(rows, family, clock=clock) for family in families(rows) for clock in clocks]
    findings = [comparison.sentence() for comparison in found if comparison is not None]
    print(*(f"{finding}." for finding in findings), sep="\n", end="\n\n")
    print_result(
        {
            "latency_source": prepared.cost.source,
            "reference": reference_name(prepared.model),
            "findings": findings,
            "rows": [public_dict(row) for row in rows],
        }
    )


def _contestants(
    prepared: Prepared,
    options: EvaluateOptions,
    unbound: dict[str, UnboundPolicy],
    exported: dict[str, ExportedPolicy],
) -> list[Contestant]:
    """Policies in the order of their names; learned ones at every setting of the dial."""
    context = policy_context(prepared)
    found = []
    for name in options.policy:
        if name in unbound:
            found.append(contestant(unbound[name], context))
            continue
        policy = exported[name].policy
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
