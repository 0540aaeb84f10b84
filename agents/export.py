"""Exported policies: made with a proof that they choose what was trained, and read with all that they carry."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexquant_rl.agents.onnx_policy import ONNX_FILE, check_extra, check_onnx, write_onnx
from flexquant_rl.engine.control.artefact import (
    CARD_FILE,
    PROFILE_FILE,
    WEIGHTS_FILE,
    DeployedPolicy,
    load_policy,
    policy_directory,
)
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import check_field_types, shown
from flexquant_rl.engine.files import file_sha256, new_directory, read_json
from flexquant_rl.engine.quantisation.config import QuantizationConfig

PARITY_OBSERVATIONS = 1000
RULES_FOLDER = "rules"
"""Where a run of drafts keeps the rules that it has tuned, each an exported policy."""


def check_parity(
    exported: Path, observations: Tensor, predict: Callable[[NDArray[np.float32]], NDArray[np.int64]]
) -> None:
    """Compares an exported policy with the one that was trained.

    Args:
        exported: Directory of the artefact.
        observations: `[n, dim]` float32, recorded from an environment.
        predict: SB3's deterministic prediction: observations -> indices of widths `[n, U]`; of drafts actions `[n]`.

    Raises:
        RuntimeError: If a single width or action differs.
    """
    policy, predicted = load_policy(exported), torch.as_tensor(predict(observations.numpy()))
    if isinstance(policy, DeployedDrafts):
        ours, theirs = torch.as_tensor(policy.decide(observations.numpy())), predicted
    else:
        ours, theirs = policy(observations).bit_widths, torch.tensor(policy.card.schema.bit_widths)[predicted]
    differing = int((ours != theirs).sum())
    if differing:
        what = "actions" if isinstance(policy, DeployedDrafts) else "widths"
        raise RuntimeError(
            f"{exported}: {differing} of {ours.numel()} {what} differ from the trained policy's on recorded "
            "observations"
        )


def export_again(source: Path, out: Path, repair: str = "export it again with `fq export`") -> DeployedPolicy:
    """Copies an exported policy to a new directory, read back before it gets its name.

    Args:
        source: Its directory, as that of a rule that a run of drafts has tuned.
        out: New directory.
        repair: What to do about damaged or missing files, as the error says it.

    Raises:
        InputError: If its files are damaged, or if `out` is not empty.
    """
    load_policy(source, repair=repair)
    with new_directory(out) as directory:
        _copy(source, directory)
        return load_policy(directory, name=out.name)


def export_drafts_run(run_dir: Path, out: Path) -> DeployedPolicy:
    """`export_again` for the policy that a finished run of drafts has chosen.

    Raises:
        InputError: If the run has no policy yet, or as `export_again`.
    """
    source = run_dir / "policy"
    again = f"python train.py --resume {run_dir}"
    if not (source / CARD_FILE).is_file():
        raise InputError(f"{run_dir} holds no finished policy; finish it with: {again}")
    return export_again(source, out, f"delete {source} and have it made again with: {again}")


def _copy(source: Path, directory: Path) -> None:
    for name in (WEIGHTS_FILE, PROFILE_FILE, CARD_FILE):
        shutil.copyfile(source / name, directory / name)
        if (directory / name).read_bytes() != (source / name).read_bytes():
            raise RuntimeError(f"{directory / name} does not hold what was copied from {source / name}")


def export_run(run_dir: Path, out: Path, *, onnx: bool = False) -> LearnedPolicy:
    """Copies the policy of a finished run to a new directory, read back and compared before it gets its name.

    What it is compared with is the policy of a training seed, which was compared with SB3 itself when it was trained.

    Args:
        run_dir: The run.
        out: The new directory.
        onnx: Whether to write the network as an ONNX graph too, compared on the same signals.

    Raises:
        InputError: If the run has no policy yet, if its files are damaged, if `out` is not empty, or if the extra
            `onnx` is wanted and not installed.
    """
    if onnx:
        check_extra()
    source = run_dir / "policy"
    again = f"python train.py --resume {run_dir}"
    if not (source / CARD_FILE).is_file():
        raise InputError(f"{run_dir} holds no finished policy; finish it with: {again}")
    repair = f"delete {source} and have it made again with: {again}"
    load_policy(source, repair=repair)
    checked = _checked_seed(run_dir, source, repair)
    with new_directory(out) as directory:
        _copy(source, directory)
        policy = _learned(load_policy(directory, name=out.name), directory, repair)
        generator = torch.Generator().manual_seed(0)
        signals = 2 * torch.randn(PARITY_OBSERVATIONS, checked.card.schema.dim, generator=generator)
        differing = int((policy(signals).bit_widths != checked(signals).bit_widths).sum())
        if differing:
            raise RuntimeError(f"{source}: {differing} widths differ from the checked policy's on random signals")
        if onnx:
            write_onnx(policy, directory / ONNX_FILE)
            check_onnx(directory / ONNX_FILE, policy, signals)
    return policy


def _checked_seed(run_dir: Path, source: Path, repair: str) -> LearnedPolicy:
    """The policy of the training seed that a run's policy has its weights from."""
    for directory in sorted(run_dir.glob("seeds/*/policy")):
        weights = directory / WEIGHTS_FILE
        if weights.is_file() and weights.read_bytes() == (source / WEIGHTS_FILE).read_bytes():
            return _learned(load_policy(directory, repair=f"delete {directory} and {repair}"), directory, repair)
    raise InputError(f"{source}: its weights are those of no training seed in {run_dir / 'seeds'}; {repair}")


def _learned(policy: DeployedPolicy, directory: Path, repair: str) -> LearnedPolicy:
    if not isinstance(policy, LearnedPolicy):
        raise InputError(f"{directory} holds no learned policy, which a run has there; {repair}")
    return policy


@dataclass(frozen=True)
class ExportedPolicy:
    """An exported policy with what it carries.

    Attributes:
        directory: Where it is.
        policy: The policy.
        profile: The one that it was trained with.
        quantization: How it was trained to have a plain model nested.
    """

    directory: Path
    policy: DeployedPolicy
    profile: Profile
    quantization: QuantizationConfig

    @property
    def card(self) -> PolicyCard:
        """The policy's."""
        return self.policy.card


def exports_drafts(path: Path) -> bool:
    """Whether a directory, or the run that it is, holds a policy of drafts. What is wrong with it loading will say."""
    try:
        data = read_json(policy_directory(path) / CARD_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("kind") == "drafts"


def load_exported(directory: Path, name: str | None = None) -> ExportedPolicy:
    """Loads an exported policy and the profile beside it.

    Args:
        directory: Where they are, or the run that has them.
        name: As it appears in tables; default: as for `load_policy`.

    Raises:
        InputError: If files are missing or damaged, or do not belong together.
    """
    directory = policy_directory(directory)
    policy = load_policy(directory, name=name)
    card, profile = policy.card, Profile.load(directory / PROFILE_FILE)
    schema = card.schema
    wanted = (card.model_fingerprint, schema.bit_widths, (schema.num_units, len(schema.bit_widths)))
    for fingerprint, bit_widths, table in (
        (profile.fingerprint, profile.bit_widths, profile.sensitivity),
        (profile.cost.fingerprint, profile.cost.bit_widths, profile.cost.unit_ms),
    ):
        if (fingerprint, bit_widths, tuple(table.shape)) != wanted:
            raise InputError(
                f"{directory / PROFILE_FILE}: of model {fingerprint[:12]} with {len(table)} units at widths "
                f"{list(bit_widths)}, but the policy is for {wanted[0][:12]} with {schema.num_units} at "
                f"{list(schema.bit_widths)}; export it again with `fq export`"
            )
    return ExportedPolicy(directory, policy, profile, _quantization(card, directory))


def load_exported_together(
    directories: Mapping[str, Path], loaded: Mapping[str, ExportedPolicy] | None = None
) -> dict[str, ExportedPolicy]:
    """Loads exported policies, by the names that tables give them, that are to be compared with one profile.

    Args:
        directories: Where they are.
        loaded: Those of them that are loaded already.

    Raises:
        InputError: As `load_exported`, or if their profiles differ.
    """
    known = loaded or {}
    exported = {name: known.get(name) or load_exported(directory, name) for name, directory in directories.items()}
    hashes = {name: file_sha256(policy.directory / PROFILE_FILE) for name, policy in exported.items()}
    # That of a policy of drafts says nothing: it looks at no sensitivities.
    hashes = {name: sha256 for name, sha256 in hashes.items() if exported[name].profile.num_tokens}
    first = next(iter(hashes), "")
    for name, sha256 in hashes.items():
        if sha256 != hashes[first]:
            raise InputError(
                f"{name} carries another {PROFILE_FILE} than {first}, and each policy reads its own; evaluate them "
                "one at a time"
            )
    return exported


def _quantization(card: PolicyCard, directory: Path) -> QuantizationConfig:
    """How a policy's training nested a plain model; the default where its card does not say."""
    stored = card.config.get("quantization")
    if stored is None:
        return QuantizationConfig()
    try:
        lists = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
        config = QuantizationConfig(**{**stored, **lists, "bit_widths": tuple(stored["bit_widths"])})
        check_field_types(config)
        config.validate()
    except (KeyError, TypeError, InputError) as error:
        raise InputError(
            f"{directory / CARD_FILE}: quantization={shown(stored)} cannot be used ({error}); export the policy again "
            "with `fq export`"
        ) from error
    return config
