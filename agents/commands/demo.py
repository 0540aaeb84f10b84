"""`fq demo`: a real language model from a package to two trained controllers and one table by the clock.

Each phase leaves its output in a directory and is skipped where that is there; what was interrupted goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flexquant_rl.agents.commands.options import DemoOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.config import PPOConfig, TrainConfig, VerifiedConfig
from flexquant_rl.agents.evaluation.draft_rows import DraftRow, read_draft_rows
from flexquant_rl.agents.evaluation.markdown import table_of
from flexquant_rl.agents.evaluation.rows import REPORT_FILE, ROWS_FILE, EvalRow, read_rows
from flexquant_rl.agents.policies.families import PPO, TOKEN
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.phases import evaluate_run, train_run
from flexquant_rl.agents.runs.run import load_run, locked_run, new_run
from flexquant_rl.agents.runs.verified_run import run_verified
from flexquant_rl.engine.checkpoint import load_model, save_checkpoint
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_json, replacing, write_json
from flexquant_rl.engine.packaged_model import MODEL_NAME, cache_folder, packaged_model
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.config import EnvConfig

T = TypeVar("T")

_NESTED, _VERIFIED, _LOSSY, _TABLE_FILE, _MODEL_FILE = "nested", "verified", "lossy", "table.md", "demo.json"
# Small on purpose: a demonstration on two cores. `train.py` has larger defaults, and five seeds say more than one.
_DRAFTS = VerifiedConfig(tokens=1200, widths=(3, 4), depth=5, max_new_tokens=64, live_prompts=2)
_DRAFTS_ENV_STEPS = 60_000
_EPISODES = EnvConfig(prompt_tokens=32, max_new_tokens=32)
_PPO = PPOConfig(num_envs=16, batch_size=256)
_LOSSY_ENV_STEPS = 1024
_BUDGETS = (0.7, 0.8, 0.9)


def demo(options: DemoOptions) -> None:
    """Does what is left and prints the table."""
    began = time.perf_counter()
    for path in options.text:
        if not path.is_file():
            raise InputError(f"{path} is not a file; --text takes text files")
    out = options.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a directory; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    try:
        with locked_run(out):
            _check_same_model(out, options.model or MODEL_NAME)
            source = _phase(seconds, "model", lambda: _source(options.model))
            nested = _phase(seconds, "nesting", lambda: _nested(source, out / _NESTED))
            text = tuple(map(str, options.text))
            _phase(seconds, _VERIFIED, lambda: _run(_verified_config(nested, text), out / _VERIFIED))
            _phase(seconds, _LOSSY, lambda: _run(_lossy_config(nested, text), out / _LOSSY))
            drafts, rows = read_draft_rows(out / _VERIFIED / ROWS_FILE), read_rows(out / _LOSSY / ROWS_FILE)
            table = _table(drafts, rows)
            with replacing(out / _TABLE_FILE) as temporary:
                temporary.write_text(f"{table}\n", encoding="utf-8")
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt("the same command goes on from there") from interruption
    print(table)
    print_result(
        {
            "out": str(out),
            "model": source,
            "nested": str(nested),
            "verified_policy": str(out / _VERIFIED / "policy"),
            "lossy_policy": str(out / _LOSSY / "policy"),
            "seconds": seconds,
            "seconds_in_all": time.perf_counter() - began,
            "rows": [*(row.public() for row in drafts), *map(_shown, rows)],
        }
    )


def _phase(seconds: dict[str, float], name: str, body: Callable[[], T]) -> T:
    say(f"demo: {name}")
    began = time.perf_counter()
    made = body()
    seconds[name] = time.perf_counter() - began
    return made


def _check_same_model(out: Path, model: str) -> None:
    """Raises InputError if the directory has what was made of another model; notes whose it is."""
    path, asked = out / _MODEL_FILE, {"model": model}
    if not path.exists():
        write_json(path, asked)
    elif (kept := read_json(path)) != asked:
        raise InputError(f"{out} has what was made of {kept['model']}, not of {model}; choose another --out")


def _source(model: str | None) -> str:
    return str(packaged_model(cache_folder() / MODEL_NAME)) if model is None else resolve_model(model)


def _nested(source: str, out: Path) -> Path:
    """The model with nested weights, as `fq quantize MODEL OUT` makes it."""
    if not out.exists():
        config = QuantizationConfig()
        model = load_model(source, config, keep_reference=False, progress=track)
        save_checkpoint(model, out)
    return out


def _verified_config(model: Path, text: tuple[str, ...]) -> TrainConfig:
    return TrainConfig(
        task="verified", model=str(model), text=text, seeds=1, env_steps=_DRAFTS_ENV_STEPS, verified=_DRAFTS
    )


def _lossy_config(model: Path, text: tuple[str, ...]) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        text=text,
        seeds=1,
        env_steps=_LOSSY_ENV_STEPS,
        env=_EPISODES,
        ppo=_PPO,
        time_budgets=_BUDGETS,
        baselines=(TOKEN.name,),
        validation_sequences=8,
        test_sequences=8,
        importance_windows=16,
        oracle_samples=0,
        long_tokens=0,
        num_dials=3,
    )


def _run(config: TrainConfig, run_dir: Path) -> Path:
    """Starts a run, goes on with one, or leaves a finished one alone."""
    if (run_dir / "config.json").is_file():
        if load_run(run_dir) != config:
            raise InputError(f"{run_dir} is a run of other options; choose another --out, or remove it")
        if (run_dir / REPORT_FILE).is_file():  # the last thing that a run writes
            return run_dir
        with locked_run(run_dir):
            return _finish(config, run_dir)
    with new_run(config, run_dir):
        return _finish(config, run_dir)


def _finish(config: TrainConfig, run_dir: Path) -> Path:
    if config.task == "verified":
        run_verified(config, run_dir)
    else:
        evaluate_run(config, train_run(config, run_dir), run_dir)
    return run_dir


def _table(drafts: Sequence[DraftRow], rows: Sequence[EvalRow]) -> str:
    """Both modes, the faster by the clock first; each speed is over 8-bit steps of the same run."""
    lines: list[tuple[float, list[str]]] = []
    for draft in drafts:
        if draft.speedup_measured is not None:
            kind = {"learned": "verified, learned", "rule": "verified, tuned rule"}.get(draft.kind, "8 bits")
            loss = "none: the text of 8 bits"
            lines.append(_line(kind, draft.policy, draft.speedup_measured, loss, f"{draft.verify_width:.2f}"))
    for row in rows:
        if row.speedup_measured is not None:
            kind = {PPO.name: "lossy, learned", TOKEN.name: "lossy, looked up"}.get(row.family, f"lossy, {row.family}")
            loss = f"{row.output_kl_nats:.4f}"
            lines.append(_line(kind, row.policy, row.speedup_measured, loss, f"{row.mean_bit_width:.2f}"))
    lines.sort(key=lambda entry: -entry[0])
    header = ["mode", "policy", "speedup, measured", "output KL, nats", "mean bit-width"]
    return table_of(header, [cells for _, cells in lines])


def _line(kind: str, policy: str, speedup: float, loss: str, width: str) -> tuple[float, list[str]]:
    return speedup, [kind, f"`{policy}`", f"{speedup:.2f}x", loss, width]


def _shown(row: EvalRow) -> dict[str, Any]:
    return {
        "policy": row.policy,
        "family": row.family,
        "mean_bit_width": row.mean_bit_width,
        "output_kl_nats": row.output_kl_nats,
        "speedup_measured": row.speedup_measured,
    }
