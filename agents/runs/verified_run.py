"""A run of --task verified: record, time, tune every rule, train, judge once on test sequences, export the fastest.

config.json -> traces/, costs.json -> rules/<family> -> seeds/<k>/policy -> policy -> eval.jsonl, report.md, drafts.png

What is there already is kept, so a resume does what is left. A seed that was interrupted is trained again.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flexquant_rl.agents.config import TrainConfig, check_config
from flexquant_rl.agents.evaluation.draft_figures import plot_drafts
from flexquant_rl.agents.evaluation.draft_report import (
    DRAFTS_PICTURE,
    console_drafts,
    console_spread,
    write_draft_report,
)
from flexquant_rl.agents.evaluation.draft_rows import (
    CLAIRVOYANT,
    HINDSIGHT,
    DraftRow,
    Kind,
    captured_headroom,
    draft_row,
    findings,
    with_clock,
)
from flexquant_rl.agents.evaluation.drafting import Played, clairvoyant, hindsight, play, play_rule, tuned
from flexquant_rl.agents.evaluation.rows import ROWS_FILE, write_rows
from flexquant_rl.agents.evaluation.wall_clock import measured_time_shares
from flexquant_rl.agents.export import PARITY_OBSERVATIONS, RULES_FOLDER, check_parity
from flexquant_rl.agents.policies.families import PPO
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.verified_ppo import Seen, TrainedDrafts, seen_by, train_drafts
from flexquant_rl.agents.runs.verified_preparation import PreparedDrafts, longest_first, prepare_drafts
from flexquant_rl.engine.control.artefact import CARD_FILE, load_policy, save_policy
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts, DraftsFacts, deploy_net, deploy_rule, may_draft
from flexquant_rl.engine.control.drafting_rules import EVERY_RULE, RULES, DraftingRule, Lookups, Plain, rule_name
from flexquant_rl.engine.control.policy import PolicyCard
from flexquant_rl.engine.control.profile import unmeasured_profile
from flexquant_rl.engine.control.verified_signals import Sees
from flexquant_rl.engine.embedded import DEFAULT_MODEL, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.vec_env import VerifiedVecEnv
from flexquant_rl.fq_env.verified_making import make_rounds


@dataclass(frozen=True)
class Candidate:
    """A policy that can be exported.

    Attributes:
        policy: The policy.
        directory: Where it is kept.
        seed: Training seed of a learned one.
        env_steps_per_s: Of its training, where this process or an earlier one has timed it.
    """

    policy: DeployedDrafts
    directory: Path
    seed: int | None = None
    env_steps_per_s: float | None = None

    @property
    def speedup_validation(self) -> float:
        """What candidates are chosen by."""
        speedup = self.policy.facts.speedup_validation
        assert speedup is not None, "every policy of a run was validated"
        return speedup

    @property
    def name(self) -> str:
        """As it appears in tables: a rule with the width of its level, which says more than its number."""
        rule = self.policy.facts.rule
        if rule is None:
            return PPO.name
        level = getattr(rule, "level", None)
        width = None if level is None else float(self.policy.level_bit_widths[level].double().mean())
        return rule_name(rule) if width is None else rule_name(rule).replace(f"level={level}", f"width={width:g}")

    @property
    def family(self) -> str:
        """As it appears in tables."""
        rule = self.policy.facts.rule
        return PPO.name if rule is None else rule.family


def run_verified(config: TrainConfig, run_dir: Path) -> tuple[str, dict[str, Any]]:
    """Does what is left of a run.

    Returns:
        The tables for a terminal, and the command's JSON.

    Raises:
        InputError: On bad input, before anything is trained.
    """
    check_config(config)
    prepared = prepare_drafts(config, run_dir)
    kinds = EVERY_RULE if prepared.ngram_drafts else [kind for kind in EVERY_RULE if kind is not Lookups]
    rules = [
        _tuned_rule(config, prepared, kind, run_dir / RULES_FOLDER / kind.family)
        for kind in track(kinds, "tuning rules")
    ]
    start = max(rules[-len(RULES) :], key=lambda one: one.speedup_validation)  # a clone of what drafts
    seeds = [
        _trained_seed(config, prepared, config.seed + index, start, run_dir / "seeds" / str(config.seed + index))
        for index in range(config.seeds)
    ]
    candidates = [*rules, *seeds]
    chosen = max(candidates, key=lambda one: one.speedup_validation)
    policy_dir = run_dir / "policy"
    if not policy_dir.exists():
        save_policy(chosen.policy, unmeasured_profile(prepared.model), policy_dir)
    rows = _judge(config, prepared, candidates)
    learned = "" if chosen.seed is None else f" of seed {chosen.seed}"
    words = f"{chosen.name}{learned}, the fastest on validation sequences ({chosen.speedup_validation:.3f})"
    sentences = [*findings(rows, words, pays=chosen.family != Plain.family), *_networks(seeds)]
    _publish(config, prepared, rows, sentences, run_dir)
    widths = prepared.traces.plan.draft_widths
    rates = [one.env_steps_per_s for one in seeds if one.env_steps_per_s]
    tables = f"{console_spread(prepared.test, widths)}\n\n{console_drafts(rows)}"
    return tables, {
        "run_dir": str(run_dir),
        "policy_dir": str(policy_dir),
        "env_steps": config.steps_per_seed * len(config.verified.ppo.sees) * config.seeds,
        "env_steps_per_s": sum(rates) / len(rates) if rates else None,
        "chosen": chosen.name,
        "verify_width": prepared.traces.plan.verify_width,
        "latency_source": prepared.costs.source,
        "costs": prepared.costs.to_dict(),
        "reference": f"{prepared.traces.plan.verify_width}-bit",
        "findings": sentences,
        "rows": [row.public() for row in rows],
        "captured_headroom": captured_headroom(rows),
    }


def _tuned_rule(config: TrainConfig, prepared: PreparedDrafts, kind: type[DraftingRule], directory: Path) -> Candidate:
    """The fastest setting of a family on training and validation sequences, kept as an exported policy."""
    found = _kept(prepared, directory)
    if found is not None:
        return found
    context = prepared.context
    rule = tuned(kind.grid(context.schema), prepared.tuning, context)
    speedup = play_rule(prepared.validation, context, rule).speedup
    facts = DraftsFacts(rule, prepared.costs, tuple(context.known_acceptance().tolist()), speedup)
    levels, verify = prepared.levels, prepared.verify_bit_widths
    ngram_drafts = 0 if isinstance(rule, Plain) else prepared.ngram_drafts
    policy = deploy_rule(rule_name(rule), context.schema, levels, verify, _card(config, prepared), facts, ngram_drafts)
    save_policy(policy, unmeasured_profile(prepared.model), directory)
    return Candidate(policy, directory)


def _trained_seed(
    config: TrainConfig, prepared: PreparedDrafts, seed: int, start: Candidate, directory: Path
) -> Candidate:
    """A network of one training seed, exported with a parity check against what was trained."""
    policy_dir = directory / "policy"
    found = _kept(prepared, policy_dir, seed)
    if found is not None:
        return found
    assert start.policy.facts.rule is not None
    seen = seen_by(prepared.train, prepared.costs, start.policy.facts.rule.bind(prepared.context))
    say(f"PPO seed {seed}: {config.steps_per_seed:,} env steps from a clone of {start.name}")
    networks = [_trained(config, prepared, seed, sees, seen) for sees in config.verified.ppo.sees]
    best = max(networks, key=lambda one: one.best_speedup)
    scores = {
        "sees": best.sees,
        "curves": {one.sees: [list(point) for point in one.curve] for one in networks},
        "env_steps_per_s": best.env_steps_per_s,
    }
    acceptance = tuple(prepared.context.known_acceptance().tolist())
    facts = DraftsFacts(None, prepared.costs, acceptance, best.best_speedup)
    card = _card(config, prepared, scores)
    widths = (prepared.levels, prepared.verify_bit_widths)
    policy = deploy_net(f"ppo seed {seed}", best.net, *widths, card, facts, prepared.ngram_drafts)
    # A resume takes `policy` for finished, so it gets its name only when it has been checked.
    unchecked = directory / "policy.unchecked"
    shutil.rmtree(unchecked, ignore_errors=True)
    save_policy(policy, unmeasured_profile(prepared.model), unchecked)
    recorded = torch.cat([best.observations, seen[0]])[-PARITY_OBSERVATIONS:]
    check_parity(unchecked, recorded, lambda seen: best.ppo.predict(seen, deterministic=True)[0])
    unchecked.rename(policy_dir)
    return Candidate(policy, policy_dir, seed, best.env_steps_per_s)


def _trained(config: TrainConfig, prepared: PreparedDrafts, seed: int, sees: Sees, start: Seen) -> TrainedDrafts:
    """A network that looks at so much and pays for it."""
    drafts = config.verified.ppo
    rounds, task = make_rounds(
        prepared.traces, prepared.costs.charging(sees), num_rows=drafts.num_envs, ngram_drafts=prepared.ngram_drafts
    )
    trained = train_drafts(
        VerifiedVecEnv(rounds, task, seed=seed),
        prepared.validation,
        drafts,
        sees=sees,
        env_steps=config.steps_per_seed,
        seed=seed,
        start=start,
    )
    say(
        f"PPO seed {seed}, {sees}: speed on validation sequences {trained.curve[0][1]:.3f} cloned, "
        f"{trained.best_speedup:.3f} best, {trained.curve[-1][1]:.3f} at the end"
    )
    return trained


def _kept(prepared: PreparedDrafts, directory: Path, seed: int | None = None) -> Candidate | None:
    """The policy that an earlier process has left there, if any."""
    if not (directory / CARD_FILE).exists():
        return None
    repair = f"delete {directory} to have it made again"
    policy = load_policy(directory, model_fingerprint=prepared.model.fingerprint, repair=repair)
    if not isinstance(policy, DeployedDrafts) or policy.facts.speedup_validation is None:
        raise InputError(f"{directory} holds no policy of drafts of this run; {repair}")
    if may_draft(policy) and policy.ngram_drafts != prepared.ngram_drafts:
        raise InputError(
            f"{directory} looks up {policy.ngram_drafts} tokens, but the run {prepared.ngram_drafts} "
            f"(verified.ngram_drafts); {repair}"
        )
    scores = policy.card.config.get("scores")
    rate = scores.get("env_steps_per_s") if isinstance(scores, dict) else None
    return Candidate(policy, directory, seed, rate)


def _card(config: TrainConfig, prepared: PreparedDrafts, scores: dict[str, Any] | None = None) -> PolicyCard:
    recorded = asdict(config) if scores is None else {**asdict(config), "scores": scores}
    return PolicyCard.of_model(prepared.model, recorded)


def _judge(config: TrainConfig, prepared: PreparedDrafts, candidates: Sequence[Candidate]) -> list[DraftRow]:
    """Every policy on test sequences, plain decoding first, what knows drafts last."""
    table, costs, context = prepared.test, prepared.costs, prepared.context
    verify_width, source = prepared.traces.plan.verify_width, costs.source
    rows = []
    for one in candidates:
        rule = one.policy.facts.rule
        if rule is None:
            played = play(table, costs, one.policy.decide, sees=one.policy.sees)
        else:
            played = play_rule(table, context, rule)
        rows.append(
            draft_row(
                played,
                table,
                policy=one.name,
                family=one.family,
                kind="learned" if rule is None else "plain" if isinstance(rule, Plain) else "rule",
                verify_width=verify_width,
                cost_source=source,
                seed=one.seed,
                speedup_validation=one.speedup_validation,
            )
        )
    shares, clocked = _clocked(config, prepared, [one.policy for one in candidates])
    knowing: tuple[tuple[str, Kind, Played], ...] = (
        (HINDSIGHT, "reference", hindsight(table, costs)),
        (CLAIRVOYANT, "bound", clairvoyant(table, costs)),
    )
    for name, kind, played in knowing:
        rows.append(
            draft_row(played, table, policy=name, family=name, kind=kind, verify_width=verify_width, cost_source=source)
        )
    return with_clock(rows, [*shares, *[None] * len(knowing)], clocked)


def _clocked(
    config: TrainConfig, prepared: PreparedDrafts, policies: Sequence[DeployedDrafts]
) -> tuple[list[float] | list[None], list[int]]:
    """Time of each policy by the clock over that of plain decoding, and the test sequences timed: the longest."""
    if not config.verified.live_prompts:
        return [None] * len(policies), []
    say("timing whole continuations")
    table, sequences = prepared.test, prepared.traces
    longest = longest_first(table, config.verified.live_prompts)
    chosen = [table.sequences[index] for index in longest]
    prompts = [sequences.plan.sequences[index].prompt_ids for index in chosen]
    texts = [sequences.sequences[index].token_ids.tolist() for index in chosen]
    prompt_tokens, new_tokens = min(map(len, prompts)), min(len(text) - 1 for text in texts)
    windows = torch.tensor(
        [[*prompt[-prompt_tokens:], *text[: new_tokens + 1]] for prompt, text in zip(prompts, texts, strict=True)]
    )
    clocked = measured_time_shares(
        prepared.model,
        unmeasured_profile(prepared.model),
        windows,
        EnvConfig(prompt_tokens=prompt_tokens, max_new_tokens=new_tokens),
        [(policy, 1.0) for policy in policies],
        num_threads=config.threads,
        progress=lambda rounds: track(rounds, "timing"),
    )
    return list(clocked.shares), list(longest)


def _networks(seeds: Sequence[Candidate]) -> list[str]:
    """What networks gained from what they looked at, in words; nothing where each seed has one network."""
    scores = [one.policy.card.config["scores"] for one in seeds]
    if not all("curves" in own for own in scores):  # seeds of a run that was begun when each had one network
        return []
    best = {
        sees: [max(speedup for _, speedup in own["curves"][sees]) for own in scores] for sees in scores[0]["curves"]
    }
    if len(best) < 2:
        return []
    means = ", ".join(f"{sum(speeds) / len(speeds):.3f} {sees}" for sees, speeds in best.items())
    kept = ", ".join(f"{sum(own['sees'] == sees for own in scores)} of {len(seeds)} {sees}" for sees in best)
    return [f"Speed of networks on validation sequences by what they see, means over seeds: {means}; kept: {kept}."]


def _publish(
    config: TrainConfig, prepared: PreparedDrafts, rows: Sequence[DraftRow], sentences: Sequence[str], run_dir: Path
) -> None:
    """Writes rows, picture and report."""
    plan, costs, table = prepared.traces.plan, prepared.costs, prepared.test
    write_rows(run_dir / ROWS_FILE, rows)
    is_embedded = config.model is None or config.model == DEFAULT_MODEL
    name = Path(resolve_model(config.model)).name + (" (embedded)" if is_embedded else "")
    texts = ", ".join(sorted(set(table.sources)))
    networks = len(config.verified.ppo.sees)
    each = f"{config.steps_per_seed:,} env steps" + (f" for each of {networks} networks" if networks > 1 else "")
    seeds = f"{config.seeds} training seed{'s' if config.seeds > 1 else ''} of {each}"
    plot_drafts(
        rows,
        table,
        plan.draft_widths,
        run_dir / DRAFTS_PICTURE,
        title=f"Drafts, verified at {plan.verify_width} bits",
        caption=f"{name}, {texts}; {table.num_sequences} test sequences, {int(table.num_tokens.sum()):,} tokens, "
        f"greedy; {seeds}. The text is that of {plan.verify_width} bits whatever is drafted"
        + (f". Up to {prepared.ngram_drafts} drafts of a round are found in the text" * bool(prepared.ngram_drafts)),
    )
    facts = {
        "model": name,
        "text": texts,
        "recording": config.traces or "made by this run",
        "draft widths": " ".join(map(str, plan.draft_widths)),
        "verify width": plan.verify_width,
        "drafts of a round at most": plan.depth,
        "drafts found in the text, of a round at most": prepared.ngram_drafts,
        "sequences (training, validation, test)": ", ".join(
            str(own.num_sequences) for own in (prepared.train, prepared.validation, table)
        ),
        "test tokens": int(table.num_tokens.sum()),
        "plain step at the largest width (ms)": costs.full_ms,
        "plain step at the verify width (share of it)": costs.plain_ms / costs.full_ms,
        "draft step by width (shares of it)": _shares(costs.draft_ms, costs.full_ms),
        "end of a round of 1, 2, ... tokens (shares of it)": _shares(costs.verify_ms, costs.full_ms),
        "signals and network, a decision (share of it)": costs.controller_ms / costs.full_ms,
        "confidence, a decision (share of it)": costs.confidence_ms / costs.full_ms,
        "source of these costs": f"{costs.source} by {prepared.timed_by}",
        "decoder": plan.decoder,
        "training seeds": config.seeds,
        "networks of a seed, by what they see": ", ".join(config.verified.ppo.sees),
        "env steps of a network": config.steps_per_seed,
        "machine": f"{platform.machine()}, {prepared.model.device.type}",
    }
    write_draft_report(run_dir, rows=rows, sentences=sentences, facts=facts, table=table, widths=plan.draft_widths)
    say(f"report: {run_dir / 'report.md'}")


def _shares(times_ms: Sequence[float], full_ms: float) -> str:
    return " ".join(f"{ms / full_ms:.2f}" for ms in times_ms)
