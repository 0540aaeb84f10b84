"""`fq export`: the policy of a run, or a static allocation by name, as an artefact that needs torch alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from flexquant_rl.agents.commands.options import ExportOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.commands.servable import load_servable, may_be_name
from flexquant_rl.agents.export import export_again, export_drafts_run, export_run
from flexquant_rl.agents.policies.drafts import parse_drafts
from flexquant_rl.agents.policies.families import parse_policy
from flexquant_rl.agents.runs.run import load_run
from flexquant_rl.engine.control.artefact import CARD_FILE, DeployedPolicy, save_policy
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import check_new_directory


def export(options: ExportOptions) -> None:
    """Writes the artefact and prints what it holds."""
    policy = _from_run(options) if _is_run(options) else _from_name(options)
    print_result(
        {
            "out": str(options.out),
            "policy": policy.name,
            "bytes": sum(file.stat().st_size for file in options.out.iterdir()),
            "units": list(policy.card.unit_names),
            "dial": [asdict(point) for point in policy.card.dial],
        }
    )


def _is_run(options: ExportOptions) -> bool:
    """A directory, or what can only have been meant as one."""
    return Path(options.policy).exists() or not may_be_name(options.policy)


def _from_run(options: ExportOptions) -> DeployedPolicy:
    for name in ("model", "profile", "text"):
        value = getattr(options, name)
        if value:
            raise InputError(f"--{name} is for a policy by name, and {options.policy} is a run; leave it out")
    run = Path(options.policy)
    is_artefact = (run / CARD_FILE).is_file()
    if is_artefact or load_run(run).task == "verified":
        _check_no_onnx(options)
        return export_again(run, options.out) if is_artefact else export_drafts_run(run, options.out)
    return export_run(run, options.out, onnx=options.onnx)


def _check_no_onnx(options: ExportOptions) -> None:
    if options.onnx:
        raise InputError(f"--onnx writes the network of a lossy run, and {options.policy} is none; leave it out")


def _from_name(options: ExportOptions) -> DeployedPolicy:
    _check_no_onnx(options)
    # Before the model: a wrong name should not be found out after minutes.
    _ = parse_drafts(options.policy) or parse_policy(options.policy)
    if options.model is None:
        raise InputError(f"{options.policy} is a policy of some model; name the model with --model MODEL")
    check_new_directory(options.out)
    found = load_servable(options.model, options.policy, profile=options.profile, text=options.text)
    save_policy(found.policy, found.profile, options.out)
    return found.policy
