"""TensorBoard's files of one training seed: hyper-parameters once, every tag at most once at every env step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import HParam, KVWriter, Logger, TensorBoardOutputFormat
from torch.utils.tensorboard.writer import SummaryWriter

from flexquant_rl.agents.config import TrainConfig

VALIDATION_TAG = "validation/reward_over_static"
"""The score by which networks are chosen, and the metric that TensorBoard lists beside the hyper-parameters."""

_NOT_A_HYPER_PARAMETER = ("seeds", "seed", "task", "traces")
_OF_ANOTHER_TASK = "verified."

HyperParameters = Mapping[str, bool | int | float | str]


def tensorboard_logger(log_dir: Path, first_step: int) -> Logger:
    """A logger into a directory whose events from `first_step` on, of a part that is now trained again, are replaced.

    The interrupted part stays in its file; TensorBoard and its readers leave it out (`purge_step`).
    """
    return Logger(str(log_dir), [_EventWriter(log_dir, first_step)])


def log_hyper_parameters(logger: Logger, values: HyperParameters) -> None:
    """Hands the hyper-parameters to the next dump."""
    logger.record("hparams", HParam(dict(values), {VALIDATION_TAG: 0.0}))


def hyper_parameters(config: TrainConfig, seed: int) -> HyperParameters:
    """All that decides a policy, by the names of the options (`ppo.learning_rate`), and the training seed."""
    flat = {
        name: _plain(value)
        for name, value in _flattened(asdict(config))
        if name not in _NOT_A_HYPER_PARAMETER and not name.startswith(_OF_ANOTHER_TASK)
    }
    return {**flat, "env_steps": config.steps_per_seed, "seed": seed}


def _flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        inner = isinstance(value, dict)
        found += _flattened(value, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return found


def _plain(value: Any) -> bool | int | float | str:
    """TensorBoard takes numbers, booleans and text."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, bool | int | float | str) else "default" if value is None else str(value)


class _EventWriter(TensorBoardOutputFormat):
    """The base class' format, in a file that takes the place of later events of earlier ones."""

    def __init__(self, folder: Path, first_step: int) -> None:
        KVWriter.__init__(self)  # not the base class' own: it opens a writer that replaces nothing
        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        self._is_closed = False
