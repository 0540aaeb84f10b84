"""Export ends with a proof: the artefact, read back, chooses what SB3 chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.policy import PROFILE_FILE, LearnedPolicy, load_policy
from flexquant_rl.engine.profile import Profile

PARITY_OBSERVATIONS = 1000


def check_parity(
    exported: Path, observations: Tensor, predict: Callable[[NDArray[np.float32]], NDArray[np.int64]]
) -> None:
    """Compares an exported policy with the one that was trained.

    Args:
        exported: Directory of the artefact.
        observations: `[n, dim]` float32, recorded from an environment.
        predict: SB3's deterministic prediction: observations -> indices of widths `[n, U]`.

    Raises:
        RuntimeError: If a single width differs.
    """
    policy = load_policy(exported)
    ours = policy(observations)
    theirs = torch.tensor(policy.card.schema.bit_widths)[torch.as_tensor(predict(observations.numpy()))]
    differing = int((ours != theirs).sum())
    if differing:
        raise RuntimeError(
            f"{exported}: {differing} of {ours.numel()} widths differ from the trained policy's on recorded "
            "observations"
        )


def export_run(run_dir: Path, out: Path) -> LearnedPolicy:
    """Copies the policy of a finished run to a new directory, read back before it counts.

    Raises:
        InputError: If the run has no policy yet or `out` is not empty.
    """
    source = run_dir / "policy"
    if not (source / "policy.json").is_file():
        raise InputError(f"{run_dir} holds no finished policy; finish it with: python train.py --resume {run_dir}")
    load_policy(source).save(out, Profile.load(source / PROFILE_FILE))
    return load_policy(out)
