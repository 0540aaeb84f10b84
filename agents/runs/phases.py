"""The two phases of a run: training, which never opens test text, and the evaluation, which opens it once.

model -> profile.json -> static_front.safetensors -> importance.safetensors -> seeds/<k>/policy -> policy, by_token
      |  -> eval.jsonl, report.md, PNGs
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexquant_rl.agents.config import TrainConfig, check_config
from flexquant_rl.agents.evaluation.baselines import validation_rehearsal
from flexquant_rl.agents.evaluation.budgets import Contestant
from flexquant_rl.agents.evaluation.comparison import compare_by_both_clocks, steps_unlike_static
from flexquant_rl.agents.evaluation.contest import (
    Settings,
    by_token,
    compete_at_budgets,
    compete_long,
    heuristics,
    learned,
    most_moving,
    read_tokens,
    tune,
    untrained,
)
from flexquant_rl.agents.evaluation.equal_time import Rung
from flexquant_rl.agents.evaluation.figures import plot_bits, plot_pareto
from flexquant_rl.agents.evaluation.learning_curve import plot_learning_curve
from flexquant_rl.agents.evaluation.references import (
    headroom,
    oracle_budget,
    oracle_rows,
    relative_error_rows,
)
from flexquant_rl.agents.evaluation.report import (
    BITS_FILE,
    LEARNING_FILE,
    PARETO_FILE,
    write_report,
)
from flexquant_rl.agents.evaluation.rows import LONG_ROWS_FILE, ROWS_FILE, EvalRow, public_dict, write_rows
from flexquant_rl.agents.evaluation.showcase import MostMoving, Showcase
from flexquant_rl.agents.policies.families import POLICIES, PPO, STATIC, TOKEN, UNTRAINED
from flexquant_rl.agents.policies.relative_error import RelativeError
from flexquant_rl.agents.preparation import Prepared, check_budgets, prepare
from flexquant_rl.agents.progress import say
from flexquant_rl.agents.runs.importance import TOKEN_DIR, Importances, load_importance, token_policy
from flexquant_rl.agents.runs.training import SeedResult, Validation, train_seed, with_dial_table
from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.policy import LearnedPolicy
from flexquant_rl.engine.control.token_policy import TokenPolicy
from flexquant_rl.engine.embedded import DEFAULT_MODEL, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.prompts import load_windows, spread

# A second look, so less of everything: sequences, families and budgets.
_LONG_SEQUENCES = 8


@dataclass(frozen=True)
class TrainedRun:
    """What training leaves for the evaluation.

    Attributes:
        prepared: Model, text, profile and front.
        results: The policy of every seed.
        policy_dir: The exported policy of the seed that validation chose.
        by_token: The policy that looks at the input token alone; None where what tokens need was not learned.
    """

    prepared: Prepared
    results: tuple[SeedResult, ...]
    policy_dir: Path
    by_token: TokenPolicy | None = None

    @property
    def best(self) -> SeedResult:
        """The seed that validation chose."""
        return max(self.results, key=lambda result: result.best_score)


def train_run(config: TrainConfig, run_dir: Path) -> TrainedRun:
    """Trains every seed, or continues, and exports the best policy with its dial's table.

    Raises:
        InputError: On bad input, before anything is trained.
    """
    check_config(config)
    prepared = prepare(config, run_dir)
    check_budgets(config, prepared)
    validation = Validation(prepared, config.validation_sequences)
    importances = load_importance(config, prepared, run_dir, validation)
    results = [
        train_seed(config, prepared, seed, run_dir / "seeds" / str(seed), importances, validation)
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    validation.close()
    return export_best(config, prepared, results, run_dir, importances)


def export_best(
    config: TrainConfig,
    prepared: Prepared,
    results: Sequence[SeedResult],
    run_dir: Path,
    importances: Importances | None,
) -> TrainedRun:
    """Exports the policy of the seed that validation chose and that by tokens, where that is not done."""
    net = None if importances is None else importances.by_token
    by_token = None if net is None else token_policy(net, config, prepared)
    trained = TrainedRun(prepared, tuple(results), run_dir / "policy", by_token)
    best = LearnedPolicy(trained.best.policy.net, trained.best.policy.card, PPO.name)  # no longer that of a seed
    for policy, directory in ((best, trained.policy_dir), (by_token, run_dir / TOKEN_DIR)):
        if policy is None or directory.exists():
            continue
        say(f"measuring what {policy.name} gives at {config.num_dials} settings of its dial")
        told = with_dial_table(policy, prepared, config.validation_sequences, config.num_dials)
        save_policy(told, prepared.profile, directory)
    return trained


def evaluate_run(config: TrainConfig, trained: TrainedRun, run_dir: Path, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Compares every policy on test text, writes rows, pictures and report, and returns the command's JSON.

    Args:
        config: Configuration of the run.
        trained: What training left.
        run_dir: Where rows, pictures and report go.
        notes: Lines for the report, of how the policies came to be chosen.
    """
    prepared, results = trained.prepared, trained.results
    rehearsal = validation_rehearsal(prepared)
    families = [*heuristics(prepared, config.baselines, rehearsal), *learned(prepared, results, rehearsal)]
    if UNTRAINED.name in config.baselines:
        families += untrained(prepared, trained.best, rehearsal)
    if TOKEN.name in config.baselines and config.importance_windows:
        families += by_token(prepared, trained.by_token, rehearsal)
    settings = tune(prepared, families, config.time_budgets, config.validation_sequences)
    moving = MostMoving()

    def references() -> list[EvalRow]:
        found = []
        if config.oracle_samples:
            budget = oracle_budget(prepared, config.time_budgets)
            found += oracle_rows(prepared, config.test_sequences, budget, config.oracle_samples, settings)
        if RelativeError.family.name in config.baselines:
            found += relative_error_rows(prepared, config.test_sequences, config.time_budgets, settings)
        return found

    rungs: list[Rung] = []
    rows = compete_at_budgets(prepared, settings, config.test_sequences, references, moving.consider, rungs.extend)
    share = headroom(rows)
    long_rows = _long_rows(config, trained, settings)
    sentences = [*notes, *_findings(config, trained, rows, share)]
    shown = moving.found or _at_the_middle_of_the_dial(trained, config.test_sequences)
    _publish(config, trained, settings, rows, rungs, sentences, run_dir, long_rows, shown)
    rates = [result.env_steps_per_s for result in results if result.env_steps_per_s]
    return {
        "run_dir": str(run_dir),
        "policy_dir": str(trained.policy_dir),
        "by_token_dir": None if trained.by_token is None else str(run_dir / TOKEN_DIR),
        "env_steps": config.steps_per_seed * config.seeds,
        "env_steps_per_s": sum(rates) / len(rates) if rates else None,
        "validation_reward_over_static": {
            "cloned": [result.cloned_score for result in results],
            "chosen": [result.best_score for result in results],
            "last": [result.last_score for result in results],
        },
        "latency_source": prepared.cost.source,
        "reference": reference_name(prepared.model),
        "findings": sentences,
        "budgets_out_of_reach": list(settings.missed),
        "rows": [public_dict(row) for row in rows],
        "long_rows": [public_dict(row) for row in long_rows],
        "captured_headroom": share,
    }


def every_other(time_budgets: Sequence[float]) -> list[float]:
    """The budgets of the comparison on long texts: every other one from the second smallest on, or the only one."""
    ordered = sorted(time_budgets)
    return ordered[1::2] or ordered


def _long_rows(config: TrainConfig, trained: TrainedRun, settings: Settings) -> list[EvalRow]:
    """Learned and static policies on continuations beyond the horizon of training; none where nothing is longer."""
    prepared = trained.prepared
    max_new_tokens = min(config.long_tokens, prepared.model.max_context - prepared.env.prompt_tokens)
    if max_new_tokens <= prepared.env.max_new_tokens:
        return []
    length = prepared.env.prompt_tokens + max_new_tokens + 1
    texts = [Path(text) for text in config.text]
    try:
        windows = load_windows(prepared.model.tokenizer, length, texts, text_field=config.text_field)
        tokens, documents = windows.test, windows.documents("test")
    except InputError as error:
        say(f"no comparison on {max_new_tokens} tokens: {error}")
        return []
    count = min(config.test_sequences, _LONG_SEQUENCES)
    entries = tuple(
        entry
        for entry in settings.entries
        if entry.family in (STATIC.name, PPO.name, TOKEN.name)
        and entry.time_budget in every_other(config.time_budgets)
        and entry.first.seed in (None, trained.best.seed)
    )
    chosen = Settings(entries, ())
    return compete_long(prepared, chosen, spread(tokens, count), spread(documents, count).tolist(), max_new_tokens)


def _publish(
    config: TrainConfig,
    trained: TrainedRun,
    settings: Settings,
    rows: list[EvalRow],
    rungs: list[Rung],
    sentences: list[str],
    run_dir: Path,
    long_rows: list[EvalRow],
    shown: Showcase,
) -> None:
    """Writes rows, pictures and report."""
    prepared = trained.prepared
    write_rows(run_dir / ROWS_FILE, rows)
    if long_rows:
        write_rows(run_dir / LONG_ROWS_FILE, long_rows)
    is_embedded = config.model is None or config.model == DEFAULT_MODEL
    name = Path(resolve_model(config.model)).name + (" (embedded)" if is_embedded else "")
    where, source = f"{name}, {prepared.windows.source}", prepared.cost.source
    seeds = f"{config.seeds} training seed{'s' if config.seeds > 1 else ''} of {config.steps_per_seed:,} env steps"
    conditions = (
        f"{where}; {rows[0].num_sequences} test sequences of {prepared.env.max_new_tokens} tokens, {seeds}; "
        f"KL against the {reference_name(prepared.model)} model."
    )
    plot_pareto(rows, run_dir / PARETO_FILE, title="Output KL at equal time", caption=conditions, source=source)
    plot_learning_curve(
        {result.seed: result.curve for result in trained.results},
        run_dir / LEARNING_FILE,
        title="Learning curve",
        caption=f"{where}; {seeds}. Scores are of validation text, {config.validation_sequences} sequences at most.",
    )
    plot_bits(
        shown.bit_widths.numpy(),
        read_tokens(prepared, config.test_sequences, shown.sequence_idx),
        [unit.name for unit in prepared.model.units],
        run_dir / BITS_FILE,
        title=f"Where the policy moves most: {shown.title()}",
        subtitle=shown.words(),
        output_kl_nats=shown.output_kl_nats.numpy(),
        bit_widths=prepared.model.bit_widths,
    )
    facts = {
        "model": name,
        "text": prepared.windows.source,
        "profile source": source,
        "training seeds": config.seeds,
        "env steps per seed": config.steps_per_seed,
        "machine": f"{platform.machine()}, {prepared.model.device.type}",
        "threads": torch.get_num_threads(),
    }
    write_report(
        run_dir,
        rows=rows,
        rungs=rungs,
        sentences=sentences,
        facts=facts,
        long_rows=long_rows,
        showcase=f"{shown.title()}: {shown.words()}",
        notes=_missed(settings),
    )
    say(f"report: {run_dir / 'report.md'}")


def _findings(config: TrainConfig, trained: TrainedRun, rows: list[EvalRow], share: float | None) -> list[str]:
    others = (*(policy.family.name for policy in POLICIES), RelativeError.family.name, UNTRAINED.name, TOKEN.name)
    comparisons = [
        *compare_by_both_clocks(rows, PPO.name, (STATIC.name, *others), budgets=config.time_budgets),
        *compare_by_both_clocks(rows, TOKEN.name, (STATIC.name,), budgets=config.time_budgets),
    ]
    sentences = [comparison.sentence() for comparison in comparisons]
    sentences += [sentence for sentence in (steps_unlike_static(rows, PPO.name),) if sentence is not None]
    sentences += [comparison.setting_sentence() for comparison in comparisons if comparison.family_b == STATIC.name]
    cloned, chosen, last = (
        ", ".join(f"{getattr(result, name):+.4f}" for result in trained.results)
        for name in ("cloned_score", "best_score", "last_score")
    )
    sentences.append(
        f"validation reward per token over the static allocation, in full-width steps, by seed: {cloned} cloned, "
        f"{chosen} of the network that validation chose, {last} of the last one"
    )
    if share is not None:
        sentences.append(
            f"captured headroom at the oracles' time budget: {share:.0%} of the way from static to the stronger oracle"
        )
    return sentences


def _missed(settings: Settings) -> list[str]:
    """What was out of reach, in the words of a report."""
    return [f"Out of reach: {reason}." for reason in settings.missed]


def _at_the_middle_of_the_dial(trained: TrainedRun, num_sequences: int) -> Showcase:
    """What the best seed does at the middle of the dial: where no budget is in reach, no setting was run."""
    dials = trained.prepared.dials(3).tolist()
    one = Contestant(PPO.name, trained.best.policy, dials[len(dials) // 2], trained.best.seed)
    found = most_moving(trained.prepared, one, num_sequences).found
    assert found is not None, "a learned policy was run"
    return found
