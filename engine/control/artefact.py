"""The files of a deployed policy: written at once, read with every check. Loading needs torch alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flexquant_rl.engine.control.deployed_drafts import (
    DeployedDrafts,
    drafts_from,
    drafts_tensors,
    drafts_to_dict,
    drafts_version,
)
from flexquant_rl.engine.control.policy import (
    DialPoint,
    LearnedPolicy,
    PolicyCard,
    PrecisionNet,
    StaticPolicy,
)
from flexquant_rl.engine.control.signals import SIGNAL_SCHEMA_VERSION, SignalSchema
from flexquant_rl.engine.control.token_policy import TokenPolicy
from flexquant_rl.engine.control.verified_signals import VERIFIED_SCHEMA_VERSION
from flexquant_rl.engine.errors import InputError, first_line
from flexquant_rl.engine.files import file_sha256, new_directory, read_json, write_json, write_tensors

if TYPE_CHECKING:  # loading a policy needs torch alone
    from flexquant_rl.engine.control.profile import Profile

POLICY_VERSION = 3
CARD_FILE = "policy.json"
PROFILE_FILE = "profile.json"
WEIGHTS_FILE = "policy.safetensors"
_STATIC_TENSOR = "bit_widths"

DeployedPolicy = LearnedPolicy | TokenPolicy | StaticPolicy | DeployedDrafts
"""What is exported and loaded."""


def save_policy(policy: DeployedPolicy, profile: Profile, out: Path) -> None:
    """Writes `policy.safetensors`, `policy.json` and the `profile.json` it was trained with, atomically.

    The profile belongs to the policy: sensitivities and times are among its signals. The weights of a static
    allocation are its widths; a policy of drafts has its levels and verify widths there, a network its weights, and a
    policy by tokens its network's and its allocations.

    Raises:
        InputError: If `out` exists and is not an empty directory.
    """
    card = policy.card
    more: dict[str, Any] = {}
    if isinstance(policy, LearnedPolicy):
        kind, tensors = "learned", dict(policy.net.state_dict())
    elif isinstance(policy, TokenPolicy):
        kind, tensors = "token", policy.state_dict()
    elif isinstance(policy, DeployedDrafts):
        kind, tensors, more = "drafts", drafts_tensors(policy), {"drafts": drafts_to_dict(policy)}
    else:
        kind, tensors = "static", {_STATIC_TENSOR: policy.bit_widths}
    with new_directory(out) as directory:
        profile.save(directory / PROFILE_FILE)
        write_tensors(directory / WEIGHTS_FILE, tensors)
        write_json(
            directory / CARD_FILE,
            {
                "version": POLICY_VERSION,
                "kind": kind,
                "name": policy.name,
                "schema": card.schema.to_dict(),
                "model_fingerprint": card.model_fingerprint,
                "unit_names": list(card.unit_names),
                "dial": [vars(point) for point in card.dial],
                "config": card.config,
                **more,
                "weights_sha256": file_sha256(directory / WEIGHTS_FILE),
                "profile_sha256": file_sha256(directory / PROFILE_FILE),
            },
        )


def policy_directory(path: Path) -> Path:
    """The directory of a policy's files: `path` itself, or `policy` in it where it is a run."""
    is_run = not (path / CARD_FILE).exists() and (path / "policy" / CARD_FILE).exists()
    return path / "policy" if is_run else path


def load_policy(
    directory: Path | str,
    *,
    model_fingerprint: str | None = None,
    name: str | None = None,
    repair: str = "export it again with `fq export`",
) -> DeployedPolicy:
    """Loads an exported policy: learned, by tokens, static, or one of drafts. Needs torch alone.

    Args:
        directory: Holds `policy.safetensors`, `policy.json` and `profile.json`.
        model_fingerprint: Fingerprint of the model that the policy will control; None skips the check.
        name: As it appears in tables; default: the directory's, for a static allocation its own.
        repair: What to do about damaged or missing files, as the error says it.

    Raises:
        InputError: If files are missing, damaged, of another schema or of another model.
    """
    directory = Path(directory)
    card_path, weights_path = directory / CARD_FILE, directory / WEIGHTS_FILE
    try:
        data = read_json(card_path)
        weights = load_file(weights_path)
        found = {"weights": file_sha256(weights_path), "profile": file_sha256(directory / PROFILE_FILE)}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{directory}: no readable policy ({error}); {repair}") from error
    if not isinstance(data, dict) or not isinstance(data.get("schema"), dict):
        raise InputError(f"{card_path}: not a policy; {repair}")
    _check_versions(directory, data)
    try:
        card = _card(data)
        kind, own_name = data["kind"], str(data["name"])
        expected = {part: str(data[f"{part}_sha256"]) for part in found}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{card_path}: not a whole policy ({error!r}); {repair}") from error
    if model_fingerprint is not None:
        card.check_model(model_fingerprint, directory)
    for part, path in (("weights", weights_path), ("profile", directory / PROFILE_FILE)):
        if found[part] != expected[part]:
            raise InputError(
                f"{path}: sha256 {found[part][:12]}, but policy.json says {expected[part][:12]}, so the file was "
                f"edited or damaged; {repair}"
            )
    if kind == "static":
        return StaticPolicy(name or own_name, _static_widths(weights, card, f"{weights_path}", repair), card)
    if kind == "drafts":
        return _drafts(directory, data.get("drafts"), weights, card, name or directory.name, repair)
    if kind == "token":
        try:
            return TokenPolicy.from_state_dict(weights, card, name or directory.name)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{weights_path}: not a whole policy by tokens ({first_line(error)}); {repair}") from error
    if kind != "learned":
        raise InputError(f"{card_path}: kind {kind!r} is not learned, token, static or drafts; {repair}")
    return LearnedPolicy(_net(weights, card, weights_path, repair), card, name or directory.name)


def _check_versions(directory: Path, data: dict[str, Any]) -> None:
    versions = (data.get("version"), data["schema"].get("version"))
    if versions != (POLICY_VERSION, SIGNAL_SCHEMA_VERSION):
        raise InputError(
            f"{directory}: policy version {versions[0]} with signal schema {versions[1]}, but this program reads "
            f"{POLICY_VERSION} with {SIGNAL_SCHEMA_VERSION}; train and export the policy again"
        )


def _net(weights: dict[str, Tensor], card: PolicyCard, path: Path, repair: str) -> PrecisionNet:
    num_signals = card.schema.num_global + card.schema.num_per_unit
    try:
        if weights["mean"].shape != (num_signals,):  # before a net of any size is made
            raise RuntimeError(f"{num_signals} signals")
        net = PrecisionNet(card.schema)
        net.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path}: tensors do not fit policy.json's schema; {repair}") from error
    return net


def _card(data: dict[str, Any]) -> PolicyCard:
    """The card in a JSON object; KeyError, TypeError, ValueError or OverflowError where it is none."""
    card = PolicyCard(
        schema=SignalSchema.from_dict(data["schema"]),
        model_fingerprint=data["model_fingerprint"],
        unit_names=tuple(data["unit_names"]),
        dial=tuple(DialPoint(**point) for point in data["dial"]),
        config=data["config"],
    )
    rules = {
        "model_fingerprint is text": isinstance(card.model_fingerprint, str),
        "unit_names are those of all units": len(card.unit_names) == card.schema.num_units
        and all(isinstance(name, str) for name in card.unit_names),
        "the dial's points are finite numbers": all(
            type(number) in (int, float) and math.isfinite(number)
            for point in card.dial
            for number in vars(point).values()
        ),
        "config is an object": isinstance(card.config, dict),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"in a policy card {broken[0]}")
    return card


def _drafts(
    directory: Path, data: Any, tensors: dict[str, Tensor], card: PolicyCard, name: str, repair: str
) -> DeployedDrafts:
    """A policy of drafts, checked against its card."""
    version = drafts_version(data)
    if version != VERIFIED_SCHEMA_VERSION:
        raise InputError(
            f"{directory}: drafts for version {version} of their observation, but this program has "
            f"{VERIFIED_SCHEMA_VERSION}; train and export the policy again"
        )
    try:
        return drafts_from(data, tensors, card, name)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{directory}: not a whole policy of drafts ({error!r}); {repair}") from error


def _static_widths(tensors: dict[str, Tensor], card: PolicyCard, where: str, repair: str) -> Tensor:
    """The widths of a static allocation, `[U]` int64, checked against its card."""
    widths = tensors.get(_STATIC_TENSOR)
    shape = (card.schema.num_units,)
    if tensors.keys() != {_STATIC_TENSOR} or widths is None or widths.dtype != torch.int64 or widths.shape != shape:
        raise InputError(f"{where}: not the widths of {card.schema.num_units} units; {repair}")
    other = set(widths.tolist()) - set(card.schema.bit_widths)
    if other:
        raise InputError(f"{where}: width {min(other)} is not stored, {list(card.schema.bit_widths)} are; {repair}")
    return widths
