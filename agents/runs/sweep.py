"""A sweep: seeds times configurations, one run for each, one preparation for all, one evaluation of the chosen one.

    config.json (with what is swept), profile.json, static_front.safetensors, importance.safetensors
      -> trials/<configuration>-seed<k> (a run each) -> policy, by_token -> eval.jsonl, report.md, PNGs

What is swept decides how a policy is trained, never what validation text measures: the scores of all trials compare.
"""

from __future__ import annotations

import difflib
import itertools
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from flexquant_rl.agents.config import PPOConfig, TrainConfig, check_config
from flexquant_rl.agents.preparation import FRONT_FILE, Prepared
from flexquant_rl.agents.runs.importance import IMPORTANCE_FILE, Importances
from flexquant_rl.agents.runs.run import CONFIG_FILE, Swept, write_config
from flexquant_rl.agents.runs.training import SeedResult, train_seed
from flexquant_rl.engine.control.artefact import PROFILE_FILE
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import replacing

SWEPT_FIELDS: Mapping[str, type] = {
    "env_steps": int,
    **{f"ppo.{field.name}": get_type_hints(PPOConfig)[field.name] for field in fields(PPOConfig)},
}
"""What a sweep may vary, and its type."""

Settings = Mapping[str, int | float]


@dataclass(frozen=True)
class Trial:
    """One configuration with one training seed: a run of one seed.

    Attributes:
        settings: The swept options of the configuration.
        config: Its whole configuration, `seeds` being 1.
        directory: The run.
    """

    settings: Settings
    config: TrainConfig
    directory: Path

    @property
    def name(self) -> str:
        """In messages and reports."""
        return f"{described(self.settings)}, seed {self.config.seed}"

    @property
    def seed_dir(self) -> Path:
        """Checkpoint, policy and TensorBoard's files."""
        return self.directory / "seeds" / str(self.config.seed)

    @property
    def is_finished(self) -> bool:
        """Whether its policy is there; it is checked before it gets its name."""
        return (self.seed_dir / "policy" / "policy.json").exists()


@dataclass(frozen=True)
class Scored:
    """A configuration whose every seed has finished.

    Attributes:
        settings: The swept options.
        config: Its configuration, with all seeds.
        results: The policy of every seed.
    """

    settings: Settings
    config: TrainConfig
    results: tuple[SeedResult, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds of the validation score, full-width steps per token over static."""
        return float(np.mean([result.best_score for result in self.results]))

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds; None of one."""
        scores = [result.best_score for result in self.results]
        return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def parse_settings(texts: Sequence[str]) -> dict[str, list[int | float]]:
    """Reads `KEY=VALUE,VALUE,...`, one for each option that is swept.

    Raises:
        InputError: If a key is unknown or twice there, or a value is no number of its type or twice there.
    """
    swept: dict[str, list[int | float]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or not values.strip():
            raise InputError(f"--set {text!r} has no values; write KEY=VALUE,VALUE, e.g. ppo.learning_rate=1e-4,3e-4")
        if name not in SWEPT_FIELDS:
            raise InputError(f"--set {key.strip()}: {_unknown(name)}")
        if name in swept:
            raise InputError(f"--set {name} is given twice; give all its values at once, {name}=VALUE,VALUE")
        swept[name] = [_number(name, value) for value in values.split(",")]
        if len(set(swept[name])) < len(swept[name]):
            raise InputError(f"--set {text} has a value twice; give each once")
    return swept


def _unknown(name: str) -> str:
    known = {field.name for field in fields(TrainConfig)} | {"env", "quantization"}
    if name.split(".")[0] in known - {"ppo", "env_steps"}:
        return (
            f"it is the same in all trials, or their validation scores could not be compared; give "
            f"--{name.replace('_', '-')} once, or start a sweep for each value"
        )
    near = difflib.get_close_matches(name, SWEPT_FIELDS, 1, cutoff=0.5) or [
        field for field in SWEPT_FIELDS if field.removeprefix("ppo.") == name
    ]
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(SWEPT_FIELDS)}"
    return f"no option of that name can be swept; {hint}"


def _number(name: str, text: str) -> int | float:
    kind = SWEPT_FIELDS[name]
    try:
        value: int | float = kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"--set {name}: {text.strip()!r} is not {what}; give e.g. {name}=VALUE,VALUE") from error
    return value


def configurations(config: TrainConfig, swept: Swept) -> list[tuple[Settings, TrainConfig]]:
    """The grid: every combination of the values, in order, with its configuration.

    Raises:
        InputError: If one of them makes no run.
    """
    found: list[tuple[Settings, TrainConfig]] = []
    for values in itertools.product(*swept.values()):
        settings: Settings = dict(zip(swept, values, strict=True))
        ppo: dict[str, Any] = {
            name.removeprefix("ppo."): value for name, value in settings.items() if name.startswith("ppo.")
        }
        plain: dict[str, Any] = {name: value for name, value in settings.items() if not name.startswith("ppo.")}
        one = replace(config, ppo=replace(config.ppo, **ppo), **plain)
        check_config(one)
        found.append((settings, one))
    return found


def check_swept(config: TrainConfig, swept: Swept) -> None:
    """Raises InputError unless every configuration of the grid makes a run; also of what a file says is swept."""
    again = parse_settings([f"{name}={','.join(map(repr, values))}" for name, values in swept.items()])
    configurations(config, again)


def trials(config: TrainConfig, swept: Swept, sweep_dir: Path) -> list[Trial]:
    """Every configuration with every seed."""
    return [
        Trial(settings, replace(one, seeds=1, seed=seed), (sweep_dir / "trials" / f"{index}-seed{seed}").absolute())
        for index, (settings, one) in enumerate(configurations(config, swept))
        for seed in range(config.seed, config.seed + config.seeds)
    ]


def make_trial(trial: Trial, sweep_dir: Path) -> None:
    """Makes the run of a trial: its configuration and what the sweep has prepared for all."""
    trial.directory.mkdir(parents=True, exist_ok=True)
    for name in (PROFILE_FILE, FRONT_FILE, IMPORTANCE_FILE):
        source, target = sweep_dir / name, trial.directory / name
        if source.exists() and not target.exists():
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
    if not (trial.directory / CONFIG_FILE).exists():
        write_config(trial.config, trial.directory)


def scored(
    config: TrainConfig,
    swept: Swept,
    sweep_dir: Path,
    prepared: Prepared,
    importances: Importances | None,
) -> list[Scored]:
    """The configurations whose every seed has finished, best mean validation score first."""
    grouped: dict[str, list[Trial]] = {}
    for trial in trials(config, swept, sweep_dir):
        grouped.setdefault(described(trial.settings), []).append(trial)
    found = []
    for group in grouped.values():
        if not all(trial.is_finished for trial in group):
            continue
        results = [train_seed(one.config, prepared, one.config.seed, one.seed_dir, importances) for one in group]
        whole = replace(group[0].config, seeds=config.seeds, seed=config.seed)
        found.append(Scored(group[0].settings, whole, tuple(results)))
    return sorted(found, key=lambda one: one.mean if math.isfinite(one.mean) else -math.inf, reverse=True)


def described(settings: Settings) -> str:
    """A configuration in words."""
    return ", ".join(f"{name}={value:g}" for name, value in settings.items()) or "as configured"


def notes(found: Sequence[Scored], failed: Mapping[str, str]) -> list[str]:
    """What a sweep has to say in its report: the scores that chose, and what failed."""
    lines = []
    for index, one in enumerate(found):
        spread = "" if one.sd is None else f" ± {one.sd:.4f}, mean of {len(one.results)} seeds"
        verdict = "chosen" if index == 0 else "not chosen"
        lines.append(f"swept, {verdict}: {described(one.settings)} scored {one.mean:+.4f}{spread} on validation text")
    return [*lines, *(f"failed, and its configuration left out: {name} ({error})" for name, error in failed.items())]
