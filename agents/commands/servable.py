"""What `--policy` may name where one policy is to run: a directory, or by name what needs no training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeGuard

from flexquant_rl.agents.config import Device, TrainConfig
from flexquant_rl.agents.dial_setting import dial_setting
from flexquant_rl.agents.export import ExportedPolicy, load_exported, load_exported_together
from flexquant_rl.agents.policies.drafts import Drafts, LookupDrafts, parse_drafts
from flexquant_rl.agents.policies.families import bind_policy, parse_policy
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.unbound import UnboundPolicy
from flexquant_rl.agents.preparation import Prepared, policy_context, prepare
from flexquant_rl.agents.progress import track
from flexquant_rl.engine.checkpoint import is_nested_model, load_model
from flexquant_rl.engine.control.artefact import DeployedPolicy, load_policy, policy_directory
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts, DraftsFacts, deploy_rule
from flexquant_rl.engine.control.ladder import Ladder, Rung, is_ladder, read_ladder
from flexquant_rl.engine.control.policy import DialPoint, PolicyCard, StaticPolicy
from flexquant_rl.engine.control.profile import Profile, unmeasured_profile
from flexquant_rl.engine.control.served_drafts import ServedDrafts
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig


@dataclass(frozen=True)
class Servable:
    """A policy that can run, and what it runs on.

    Attributes:
        model: The model that it controls.
        policy: The policy.
        profile: What it sees of the model, and what its steps cost.
        rung: Where it is on a ladder, if it is on one.
        exported: What was read of a directory.
    """

    model: NestedCausalLM
    policy: DeployedPolicy
    profile: Profile
    rung: Rung | None = None
    exported: ExportedPolicy | None = None

    def setting(
        self,
        *,
        speed: float | None = None,
        kl_weight: float | None = None,
        names: tuple[str, str] = ("speed", "kl_weight"),
    ) -> DialPoint | None:
        """The setting of the dial, that of the rung where there is one; arguments and errors as for `dial_setting`."""
        if self.rung is None:
            return dial_setting(self.policy, speed=speed, kl_weight=kl_weight, names=names)
        if kl_weight is not None:
            raise InputError(
                f"{names[1]} {kl_weight:g} sets the dial of one policy, and a ladder has several; give {names[0]} "
                "instead"
            )
        rung = self.rung
        if rung.kl_weight is None:
            return None
        return DialPoint(rung.kl_weight, rung.speedup_measured, rung.output_kl_nats, float("nan"))


@dataclass(frozen=True)
class Rungs:
    """A whole ladder, for a server whose requests each take a rung of their own.

    Attributes:
        ladder: The table.
        policies: The policy of each folder.
        profile: What those that look at a profile see.
    """

    ladder: Ladder
    policies: Mapping[str, DeployedPolicy]
    profile: Profile


def load_rungs(policy: str, model_fingerprint: str, found: Servable | None = None) -> Rungs | None:
    """Every rung of a ladder; None where `--policy` names none.

    Args:
        policy: As `--policy` names it.
        model_fingerprint: The model that is served.
        found: What `load_servable` found for the same name: its rung is not read again.

    Raises:
        InputError: If the table or a policy cannot be read or is of another model, or if those that see a profile see
            different ones.
    """
    directory = Path(policy)
    if not is_ladder(directory):
        return None
    ladder = read_ladder(directory)
    known = {}
    if found is not None and found.rung is not None and found.exported is not None:
        known[found.rung.policy] = found.exported
    exported = load_exported_together({rung.policy: directory / rung.folder for rung in ladder.rungs}, known)
    for one in exported.values():
        one.card.check_model(model_fingerprint, one.directory)
    profile = max((one.profile for one in exported.values()), key=lambda one: one.num_tokens)
    return Rungs(ladder, {rung.folder: exported[rung.policy].policy for rung in ladder.rungs}, profile)


def load_servable(
    model: str,
    policy: str,
    *,
    profile: Path | None = None,
    text: Sequence[Path] = (),
    threads: int | None = None,
    device: Device = "cpu",
    speed: float | None = None,
    verify_width: int | None = None,
    loaded: NestedCausalLM | None = None,
) -> Servable:
    """Loads a model and the policy of a directory, or the static allocation or drafts of a name.

    Args:
        model: As commands name it.
        policy: Directory of an exported policy, of a run or of a ladder, or a name such as `fixed:4`, `knapsack:4.5`
            or `draft:3`.
        profile: With a name: profile of the model; default: the one in its directory, else made here where needed.
        text: With a name: text files to profile on; default: the held-out standard library.
        threads: Threads that a measured profile must be of.
        device: Where a profile is made.
        speed: Of a ladder: how fast its rung is to be.
        verify_width: Of a ladder: the width that its rung's text equals.
        loaded: The model, where another policy has had it loaded already; taken if it is nested as this one needs it.

    Raises:
        InputError: If model or policy cannot be used, or not together.
    """
    if Path(policy).is_dir():
        if profile is not None or text:
            option = f"--profile {profile}" if profile is not None else f"--text {text[0]}"
            raise InputError(f"{option} is for policies by name, and {policy} carries its own profile; leave it out")
        directory, rung = Path(policy), None
        if is_ladder(directory):
            rung = read_ladder(directory).chosen(speed, verify_width)
            directory = directory / rung.folder
        exported = load_exported(directory, policy if rung is None else rung.policy)
        nested = _load(model, exported.quantization, loaded)
        exported.card.check_model(nested.fingerprint, exported.directory)
        return Servable(nested, exported.policy, exported.profile, rung, exported)
    unbound = parse_name(policy)
    # Whatever lies beside the model: what weighs nothing is bound without it, and may run with any number of threads.
    if profile is None and _is_one_width(unbound):
        if text:
            raise InputError(f"--text {text[0]} is to profile on, and {policy} needs no profile; leave it out")
        return _one_width(_load(model, QuantizationConfig(), loaded), unbound)
    config = TrainConfig(
        model=model,
        profile=None if profile is None else str(profile),  # else the one beside the model
        text=tuple(map(str, text)),
        threads=threads,
        device=device,
    )
    return _by_name(config, unbound)


def parse_name(policy: str) -> UnboundPolicy | Drafts:
    """Reads the name of a policy, which is no directory.

    Raises:
        InputError: If there is no policy of that name.
    """
    if not may_be_name(policy):  # so a directory was meant
        raise InputError(
            f"{policy} is not the directory of an exported policy or of a run; export one with `fq export RUN OUT`, or "
            "name a static allocation, e.g. fixed:4"
        )
    return parse_drafts(policy) or parse_policy(policy)


def check_exists(policy: str) -> None:
    """Raises InputError unless a policy has that name, or its directory holds one: no model is loaded to find out."""
    path = Path(policy)
    if not path.is_dir():
        parse_name(policy)
    elif is_ladder(path):
        read_ladder(path)
    else:
        load_policy(policy_directory(path))


def weighs_units(policy: str) -> bool:
    """Whether the policy of a name chooses by a profile of the model; those of directories carry their own.

    Raises:
        InputError: If there is no policy of that name.
    """
    is_name = not Path(policy).is_dir() and may_be_name(policy)
    return is_name and not _is_one_width(parse_drafts(policy) or parse_policy(policy))


def may_be_name(policy: str) -> bool:
    """Whether what is no directory can have been meant as a name; one name alone says nothing behind a colon."""
    return policy == LookupDrafts.family.name or (":" in policy and os.sep not in policy)


def _is_one_width(unbound: UnboundPolicy | Drafts) -> TypeGuard[Fixed | Drafts]:
    """Whether it has one width for all units, or drafts at one."""
    return isinstance(unbound, Fixed) or (isinstance(unbound, Drafts) and unbound.is_one_width)


def _load(model: str, quantization: QuantizationConfig, loaded: NestedCausalLM | None) -> NestedCausalLM:
    path = resolve_model(model)
    if loaded is not None and (is_nested_model(path) or loaded.config == quantization):
        return loaded
    return load_model(path, quantization, keep_reference=False, progress=track)


def _one_width(model: NestedCausalLM, unbound: Fixed | Drafts) -> Servable:
    """One width for all units: nothing is weighed against anything, so no text is read. The profile says so."""
    schema = SignalSchema(model.num_units, model.bit_widths)
    policy = (
        _deployed_drafts(model, unbound, unbound.at_one_width(schema))
        if isinstance(unbound, Drafts)
        else static_policy(model, unbound.allocation(schema))
    )
    return Servable(model, policy, unmeasured_profile(model))


def _by_name(config: TrainConfig, unbound: UnboundPolicy | Drafts) -> Servable:
    """Binds a name to a model."""
    prepared = prepare(config, None)
    policy = deployed_by_name(prepared, unbound)
    return Servable(prepared.model.drop_reference(), policy, prepared.profile)


def deployed_by_name(prepared: Prepared, unbound: UnboundPolicy | Drafts) -> DeployedPolicy:
    """A policy by name, bound to a prepared model.

    Raises:
        InputError: If it looks at signals: it cannot leave without the trainer.
    """
    if isinstance(unbound, Drafts):
        return _deployed_drafts(prepared.model, unbound, unbound.bind(policy_context(prepared)))
    bound = bind_policy(unbound, policy_context(prepared))
    if not isinstance(bound, StaticAllocation):
        raise InputError(
            f"policy {policy_name(unbound)!r} decides at every token and needs the trainer's package; serve a static "
            "one (fixed:4, knapsack:4.5) or an exported policy, and compare this one with `fq evaluate`"
        )
    return static_policy(prepared.model, bound)


def _deployed_drafts(model: NestedCausalLM, unbound: Drafts, served: ServedDrafts) -> DeployedDrafts:
    """Drafts by name with the card that ties them to a model."""
    card, facts = _card(model), DraftsFacts(unbound.rule)
    levels, verify = served.level_bit_widths, served.verify_bit_widths
    return deploy_rule(served.name, served.schema, levels, verify, card, facts, served.ngram_drafts)


def _card(model: NestedCausalLM) -> PolicyCard:
    return PolicyCard.of_model(model, {"quantization": asdict(model.config)})


def static_policy(model: NestedCausalLM, allocation: StaticAllocation) -> StaticPolicy:
    """A static allocation with the card that ties it to a model."""
    return StaticPolicy(allocation.name, allocation.bit_widths, _card(model))
