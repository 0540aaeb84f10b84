"""A whole run: the directory, the phases in order, the tables, pictures and the JSON that the command ends with."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from flexquant_rl.agents.evaluation.comparison import compare_at_equal_speed
from flexquant_rl.agents.evaluation.contest import (
    compete,
    headroom,
    heuristics,
    learned,
    oracle_row,
    showcase,
)
from flexquant_rl.agents.evaluation.figures import plot_bits, plot_pareto
from flexquant_rl.agents.evaluation.oracle import OracleConfig
from flexquant_rl.agents.evaluation.report import write_report
from flexquant_rl.agents.evaluation.rows import EvalRow, public_dict, write_rows
from flexquant_rl.agents.progress import say
from flexquant_rl.agents.runs.training import Prepared, SeedResult, TrainConfig, prepare, train_seed, with_dial_table
from flexquant_rl.engine.control.policy import PROFILE_FILE
from flexquant_rl.engine.control.profile import Profile, reference_name
from flexquant_rl.engine.decoding.choice import check_num_threads
from flexquant_rl.engine.embedded import DEFAULT_MODEL, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import write_json

RUN_VERSION = 1
CONFIG_FILE = "config.json"


@contextmanager
def new_run(config: TrainConfig, run_dir: Path | None) -> Iterator[Path]:
    """Makes the directory of a new run, writes its configuration (and the profile it names) and yields it.

    Where the block fails on what it was given, or on the disk, before any phase left a result, all of it is taken away
    again: the corrected command may use the same name. After an interruption it stays, to be resumed.

    Args:
        config: Of the run.
        run_dir: The directory; default: `runs/<model>-<time>`.

    Raises:
        InputError: If the directory exists already, or the configuration's profile cannot be read.
    """
    name = Path(resolve_model(config.model)).name
    run_dir = run_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (run_dir / CONFIG_FILE).exists():
        raise InputError(f"{run_dir} holds a run already; continue it with --resume {run_dir}, or choose another --run")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(f"{run_dir} exists and is not a run; choose another --run directory")
    created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        write_json(run_dir / CONFIG_FILE, {"version": RUN_VERSION, "config": asdict(config)})
        if config.profile is not None:  # kept, whatever becomes of the file: a resume must find the same one
            Profile.load(Path(config.profile)).save(run_dir / PROFILE_FILE)
        yield run_dir
    except (InputError, OSError):
        begun = {CONFIG_FILE} if config.profile is None else {CONFIG_FILE, PROFILE_FILE}
        if run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= begun:
            for file in begun:
                (run_dir / file).unlink(missing_ok=True)
            for folder in created:
                with suppress(OSError):  # another run may have come to use a parent
                    folder.rmdir()
        raise


def load_run(run_dir: Path) -> TrainConfig:
    """Reads the configuration of a run.

    Raises:
        InputError: If the directory is not a run of this version.
    """
    path = run_dir / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != RUN_VERSION:
            raise InputError(f"{path}: run version {data['version']}, this is {RUN_VERSION}; start a new run")
        config: TrainConfig = _from_dict(TrainConfig, data["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{run_dir} is not a run (no readable config.json: {error}); pass a directory of train.py"
        ) from error
    return config


def _from_dict(kind: Any, data: dict[str, Any]) -> Any:
    """Rebuilds a nested dataclass from JSON; lists become tuples. Unknown and missing fields raise."""
    hints = get_type_hints(kind)
    unknown = set(data) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]}")
    values = {}
    for name, value in data.items():
        if is_dataclass(hints[name]):
            values[name] = _from_dict(hints[name], value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def train_run(config: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """Runs or continues every phase and returns the command's JSON.

    Raises:
        InputError: On bad input, before anything is trained.
    """
    check_config(config)
    prepared = prepare(config, run_dir)
    results = [
        train_seed(config, prepared, config.seed + index, run_dir / "seeds" / str(config.seed + index))
        for index in range(config.seeds)
    ]
    best = max(results, key=lambda result: result.best_score)
    policy_dir = run_dir / "policy"
    if not policy_dir.exists():
        policy = with_dial_table(best.policy, prepared, config.validation_sequences, config.num_dials)
        policy.save(policy_dir, prepared.profile)
    rows = compete(
        prepared, [*heuristics(prepared), *learned(prepared, results, config.num_dials, best)], config.test_sequences
    )
    if config.oracle_masks:
        rows.append(oracle_row(prepared, config.test_sequences, OracleConfig(num_masks=config.oracle_masks)))
    share = headroom(rows)
    sentences = _publish(config, prepared, results, best, rows, share, run_dir)
    rates = [result.env_steps_per_s for result in results if result.env_steps_per_s]
    return {
        "run_dir": str(run_dir),
        "policy_dir": str(policy_dir),
        "env_steps": config.env_steps * config.seeds,
        "env_steps_per_s": sum(rates) / len(rates) if rates else None,
        "validation_reward_over_static": {
            "cloned": [result.cloned_score for result in results],
            "trained": [result.best_score for result in results],
        },
        "latency_source": prepared.cost.source,
        "reference": reference_name(prepared.model),
        "findings": sentences,
        "rows": [public_dict(row) for row in rows],
        "captured_headroom": share,
    }


def check_device(device: str) -> None:
    """Raises InputError unless a model can be put there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda, but torch sees no CUDA device; use --device cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device={device!r} is unknown; use cpu or cuda")


def check_config(config: TrainConfig) -> None:
    """Raises InputError on numbers that make no run."""
    for name in ("seeds", "env_steps", "validation_sequences", "test_sequences", "num_dials"):
        value = getattr(config, name)
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1; give --{name.replace('_', '-')} 1 or more")
    if not 0 <= config.seed <= 2**32 - config.seeds:
        raise InputError(f"seed={config.seed} is not one that NumPy takes; use 0 to {2**32 - config.seeds}")
    if config.oracle_masks < 0 or config.oracle_masks == 1:
        raise InputError(f"oracle_masks={config.oracle_masks} must be at least 2; 0 leaves the oracle out")
    if config.env.source != "replay" or config.env.action != "bit_widths":
        raise InputError(
            f"env.source={config.env.source} with env.action={config.env.action} is for agents of your own; "
            "train.py needs env.source=replay and env.action=bit_widths"
        )
    check_device(config.device)
    if config.threads is not None:
        check_num_threads(config.threads)
    config.quantization.validate()
    config.env.validate()
    config.ppo.validate()


def _publish(
    config: TrainConfig,
    prepared: Prepared,
    results: Sequence[SeedResult],
    best: SeedResult,
    rows: list[EvalRow],
    share: float | None,
    run_dir: Path,
) -> list[str]:
    """Writes rows, pictures and report; returns the findings in words."""
    write_rows(run_dir / "eval.jsonl", rows)
    comparisons = [compare_at_equal_speed(rows, "ppo", other) for other in ("knapsack", "fixed", "random", "entropy")]
    sentences = [comparison.sentence() for comparison in comparisons if comparison is not None]
    cloned = ", ".join(f"{result.cloned_score:+.4f}" for result in results)
    trained = ", ".join(f"{result.best_score:+.4f}" for result in results)
    sentences.append(
        f"validation reward per token over the static allocation: {cloned} cloned, {trained} after PPO, by seed"
    )
    if share is not None:
        sentences.append(f"captured headroom at the oracle's speed: {share:.0%} of the way from static to oracle")
    is_embedded = config.model is None or config.model == DEFAULT_MODEL
    name = Path(resolve_model(config.model)).name + (" (embedded)" if is_embedded else "")
    threads = torch.get_num_threads()
    conditions = (
        f"{name}, {prepared.windows.source}; {rows[0].num_sequences} test sequences of "
        f"{prepared.env.max_new_tokens} tokens, {config.seeds} training seeds of {config.env_steps} env steps; "
        f"KL against the {reference_name(prepared.model)} model."
    )
    plot_pareto(
        rows,
        run_dir / "pareto.png",
        title="Output KL against speed",
        caption=conditions,
        source=prepared.cost.source,
    )
    dial = float(prepared.dials(3)[len(prepared.dials(3)) // 2])
    trace, tokens = showcase(prepared, best.policy, dial)
    plot_bits(
        trace.bit_widths[0].numpy(),
        tokens,
        [unit.name for unit in prepared.model.units],
        run_dir / "bits.png",
        title=f"Bit-widths chosen for one test sequence (KL weight {dial:.3g}, {trace.speedup:.2f}x modelled)",
        output_kl_nats=trace.output_kl_nats[0].numpy(),
        bit_widths=prepared.model.bit_widths,
    )
    write_report(
        run_dir,
        rows=rows,
        sentences=sentences,
        facts={
            "model": name,
            "text": prepared.windows.source,
            "profile source": prepared.cost.source,
            "training seeds": config.seeds,
            "env steps per seed": config.env_steps,
            "machine": f"{platform.machine()}, {prepared.model.device.type}",
            "threads": threads,
        },
    )
    say(f"report: {run_dir / 'report.md'}")
    return sentences
