"""`fq combine`: several policies of one model on one dial, each measured on validation text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from flexquant_rl.agents.commands.contestants import AskedPolicies, check_counts
from flexquant_rl.agents.commands.options import CombineOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.commands.servable import deployed_by_name
from flexquant_rl.agents.config import TrainConfig, check_config
from flexquant_rl.agents.evaluation.budgets import Contestant
from flexquant_rl.agents.evaluation.contest import clocked_shares, traces_of
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.preparation import Prepared, prepare
from flexquant_rl.agents.progress import say
from flexquant_rl.engine.control.artefact import DeployedPolicy, save_policy
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.ladder import Ladder, Mode, Rung, front, write_ladder
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.policy import StaticPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.files import check_new_directory, new_directory
from flexquant_rl.fq_env.prompts import spread


def combine(options: CombineOptions) -> None:
    """Writes the ladder and prints its rungs; plain decoding at the largest width is always among what is measured."""
    config = TrainConfig(
        model=options.model,
        text=tuple(map(str, options.text)),
        text_field=options.text_field,
        env=options.env,
        profile=None if options.profile is None else str(options.profile),
        threads=options.threads,
        validation_sequences=options.sequences,
        num_dials=options.dials,
    )
    check_counts(options.sequences, options.dials)
    check_config(config)
    asked = AskedPolicies.read(options.policy)
    check_new_directory(options.out)
    prepared = prepare(replace(config, quantization=asked.quantization or config.quantization), None, asked.carrying)
    asked = _with_plain(asked, max(prepared.model.bit_widths))
    policies = _deployed(prepared, asked)
    bound = asked.bound(prepared, options.dials, {name: policy for name, (policy, _) in policies.items()})
    folders = {name: f"{place:02d}" for place, name in enumerate(policies)}
    named = [(folders[name], policies[name][0], one) for name, one in bound]
    rungs, num_tokens = _measured(prepared, named, options.sequences)
    kept = front(rungs)
    ladder = Ladder(prepared.model.fingerprint, reference_name(prepared.model), num_tokens, kept)
    with new_directory(options.out) as directory:
        for name, (policy, profile) in policies.items():
            if any(rung.folder == folders[name] for rung in kept):
                save_policy(policy, profile, directory / folders[name])
        write_ladder(directory, ladder)
    for rung in kept:
        print(rung.words())
    left_out = [asdict(rung) for rung in rungs if rung not in kept]
    if left_out:
        say(f"{len(left_out)} of {len(rungs)} settings are slower than another one and lose as much; left out")
    print_result({"out": str(options.out), **asdict(ladder), "left_out": left_out})


def _with_plain(asked: AskedPolicies, full: int) -> AskedPolicies:
    """With plain decoding at the largest width, unless it was given: what is slower and loses something is no rung."""
    plain = Fixed(full)
    if plain in asked.unbound.values() or any(_plain_width(one.policy) == full for one in asked.exported.values()):
        return asked
    name = policy_name(plain)
    return replace(asked, names=(*asked.names, name), unbound={**asked.unbound, name: plain})


def _plain_width(policy: DeployedPolicy) -> int | None:
    """The width at which every token is read, once; None where there is no such."""
    if isinstance(policy, DeployedDrafts):
        return policy.verify_width if policy.never_drafts else None
    widths = policy.bit_widths.unique().tolist() if isinstance(policy, StaticPolicy) else []
    return int(widths[0]) if len(widths) == 1 else None


def _deployed(prepared: Prepared, asked: AskedPolicies) -> dict[str, tuple[DeployedPolicy, Profile]]:
    """Every policy by its name as it can be saved, with what it sees; InputError if one of them cannot."""
    found: dict[str, tuple[DeployedPolicy, Profile]] = {}
    for name in asked.names:
        if name in asked.exported:
            found[name] = (asked.exported[name].policy, asked.exported[name].profile)
        else:
            found[name] = (deployed_by_name(prepared, asked.unbound[name]), prepared.profile)
    return found


def _measured(
    prepared: Prepared, named: Sequence[tuple[str, DeployedPolicy, Contestant]], num_sequences: int
) -> tuple[list[Rung], int]:
    """What each setting gives on validation text, and how many tokens that is."""
    windows = spread(prepared.windows.validation, num_sequences)
    contestants = [one for _, _, one in named]
    traces = traces_of(prepared, contestants, windows)
    shares = clocked_shares(prepared, contestants, windows).shares
    full = max(prepared.model.bit_widths)
    rungs = []
    for (folder, policy, one), trace, share in zip(named, traces, shares, strict=True):
        verify = policy.verify_width if isinstance(policy, DeployedDrafts) else _plain_width(policy)
        mode: Mode = "lossless" if verify == full else "verified" if isinstance(policy, DeployedDrafts) else "lossy"
        kl_nats = float(trace.output_kl_nats.double().mean())
        rungs.append(Rung(folder, policy.name, mode, verify, one.kl_weight, 1 / share, kl_nats))
    return rungs, traces[0].output_kl_nats.numel()
