"""Rows of an evaluation with a known answer: what the tests of comparisons, tables and pictures have in common."""

from __future__ import annotations

import zlib

import numpy as np

from flexquant_rl.agents.evaluation.rows import EvalRow

NUM_SEQUENCES, NUM_DOCUMENTS = 24, 12
DIFFICULTY = np.random.default_rng(3).lognormal(0, 0.5, NUM_SEQUENCES)
BUDGETS = (0.5, 0.6, 0.7, 0.8)


def row(
    family: str, time_share: float | None, kl: float, *, policy: str = "", noise: float = 0.0, **changes: object
) -> EvalRow:
    """A row at the budget that it takes, whose sequences are as hard as everyone's, with its own noise on top."""
    generator = np.random.default_rng(zlib.crc32(f"{family} {time_share} {kl} {changes}".encode()))
    sequences = np.array(sequence_kl(kl)) * generator.lognormal(0, noise, NUM_SEQUENCES)
    mean = float(sequences.mean())
    values: dict[str, object] = {
        "policy": policy or f"{family}:{time_share}",
        "family": family,
        "seed": None,
        "kl_weight": None,
        "time_budget": time_share,
        "mean_bit_width": 4.5,
        "output_kl_nats": mean,
        "output_kl_low": 0.8 * mean,
        "output_kl_high": 1.3 * mean,
        "output_kl_p99_nats": 9 * mean,
        "perplexity": 2.13,
        "top1_agreement": 0.9512,
        "differs_from_static": None if family == "oracle" else 0.25,
        "time_share_modelled": time_share,
        "time_share_measured": None,
        "time_share_measured_error": None,
        "speedup_modelled": None if time_share is None else 1 / time_share,
        "speedup_measured": None,
        "num_sequences": NUM_SEQUENCES,
        "num_tokens": NUM_SEQUENCES * 100,
        "reference": "unquantised",
        "sequence_kl_nats": tuple(sequences.tolist()),
        "static_kl_nats": None if time_share is None else sequence_kl(static_kl(time_share)),
        "static_kl_nats_measured": None,
        "static_log_error_measured": None,
        "sequence_documents": tuple(index % NUM_DOCUMENTS for index in range(NUM_SEQUENCES)),
    }
    return EvalRow(**(values | changes))  # type: ignore[arg-type]


def sequence_kl(kl: float) -> tuple[float, ...]:
    """KL of every sequence where the mean is `kl`, nats."""
    return tuple((kl * DIFFICULTY / DIFFICULTY.mean()).tolist())


def static_kl(time_share: float) -> float:
    """KL of the static rows, nats."""
    return 1e-3 * (1 + 60 * (1 - time_share))


def evaluation(*, factor: float = 0.9, noise: float = 0.02, seeds: int = 3) -> list[EvalRow]:
    """Static, fixed, random, a learned policy with `factor` times the static KL, and an oracle with half."""
    rows = []
    for budget in BUDGETS:
        for family, worse in (("static", 1.0), ("fixed", 1.2), ("random", 2.0)):
            rows.append(row(family, budget, worse * static_kl(budget)))
        for seed in range(seeds):
            kl = factor * static_kl(budget)
            rows.append(row("ppo", budget, kl, policy="ppo", noise=noise, seed=seed, kl_weight=300.0 * budget + seed))
    return [*rows, row("oracle", 0.65, 0.5 * static_kl(0.65), policy="oracle")]
