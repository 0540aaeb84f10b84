"""Policies of drafts judged on test sequences: one row each, gains with intervals, and the words for them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flexquant_rl.agents.evaluation.drafting import Played, speedup_interval
from flexquant_rl.agents.evaluation.resampling import (
    ENOUGH_SEEDS,
    document_weights,
    mean_over_seeds,
    percentile_interval,
)
from flexquant_rl.engine.control.drafting_rules import Lookups
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import json_lines
from flexquant_rl.fq_env.trace_table import TraceTable

Kind = Literal["plain", "rule", "learned", "reference", "bound"]
FIXED_FAMILY = "fixed"
HINDSIGHT, CLAIRVOYANT = "hindsight", "clairvoyant"
_PRIVATE = ("sequence_time_steps", "sequence_tokens", "sequence_documents")


@dataclass(frozen=True)
class DraftRow:
    """What one policy needed for the test sequences.

    Attributes:
        policy: Name, e.g. `confidence:width=3,threshold=0.4,length=8`, `ppo`, `clairvoyant`.
        family: The rule's (`plain` and `lookups` among them), `ppo`, `hindsight` or `clairvoyant`.
        kind: What it is: plain decoding, a tuned rule, a learned policy, `hindsight` for reference, the bound.
        seed: Training seed of a learned policy, else None.
        speedup_modelled: Tokens per second over those of plain decoding at the largest width, by the cost table.
        speedup_low: Lower end of its bootstrap 95% interval over documents.
        speedup_high: Upper end.
        speedup_measured: The same by the clock, on some of the test prompts; None where not measured.
        speedup_modelled_clocked: By the cost table on the sequences that the clock timed, whole; None where it timed
            none, and of what cannot be timed.
        speedup_validation: By the cost table on validation sequences; None for those that know drafts.
        tokens_per_pass: Settled tokens of a pass of verification.
        drafts_per_token: Drafts for each settled token, made at few bits or found in the text.
        accepted_share: Accepted drafts over drafts; None without drafts.
        verify_width: The width that the text equals.
        output_kl_nats: KL against plain decoding at the verify width: 0, whatever is drafted.
        num_sequences: Test sequences.
        num_tokens: Their tokens.
        cost_source: `measured` or `modelled`: where the cost table comes from.
        sequence_time_steps: Time of each sequence in plain steps at the largest width.
        sequence_tokens: Its tokens.
        sequence_documents: Its document, the unit of the bootstraps.
    """

    policy: str
    family: str
    kind: Kind
    seed: int | None
    speedup_modelled: float
    speedup_low: float
    speedup_high: float
    speedup_measured: float | None
    speedup_validation: float | None
    tokens_per_pass: float
    drafts_per_token: float
    accepted_share: float | None
    verify_width: int
    output_kl_nats: float
    num_sequences: int
    num_tokens: int
    cost_source: str
    sequence_time_steps: tuple[float, ...]
    sequence_tokens: tuple[int, ...]
    sequence_documents: tuple[int, ...]
    speedup_modelled_clocked: float | None = None

    def public(self) -> dict[str, Any]:
        """What the JSON of a command says of it, with the fields that rows of the lossy mode have."""
        shown = {name: value for name, value in asdict(self).items() if name not in _PRIVATE}
        lossy = dict.fromkeys(("kl_weight", "mean_bit_width", "output_kl_p99_nats", "perplexity"))
        return {**shown, **lossy, "top1_agreement": 1.0, "reference": f"{self.verify_width}-bit"}


def draft_row(
    played: Played,
    table: TraceTable,
    *,
    policy: str,
    family: str,
    kind: Kind,
    verify_width: int,
    cost_source: str,
    seed: int | None = None,
    speedup_validation: float | None = None,
) -> DraftRow:
    """The row of what was played on the test sequences; the clock's number is added later."""
    drafted = float(played.num_drafted.sum())
    low, high = speedup_interval(played, table.documents)
    return DraftRow(
        policy=policy,
        family=family,
        kind=kind,
        seed=seed,
        speedup_modelled=played.speedup,
        speedup_low=low,
        speedup_high=high,
        speedup_measured=None,
        speedup_validation=speedup_validation,
        tokens_per_pass=float(played.num_tokens.sum() / played.num_rounds.sum()),
        drafts_per_token=drafted / float(played.num_tokens.sum()),
        accepted_share=float(played.num_accepted.sum()) / drafted if drafted else None,
        verify_width=verify_width,
        output_kl_nats=0.0,
        num_sequences=table.num_sequences,
        num_tokens=int(played.num_tokens.sum()),
        cost_source=cost_source,
        sequence_time_steps=tuple(played.time_steps.tolist()),
        sequence_tokens=tuple(played.num_tokens.astype(int).tolist()),
        sequence_documents=tuple(table.documents.tolist()),
    )


def with_clock(
    rows: Sequence[DraftRow], time_shares: Sequence[float | None], sequences: Sequence[int]
) -> list[DraftRow]:
    """The rows with what the clock says, where it was asked, and with what the cost table says of the same sequences.

    Args:
        rows: All rows.
        time_shares: Time of each over that of plain decoding; None where it was not measured.
        sequences: Places, among the test sequences, of those that the clock timed.
    """
    return [
        row
        if share is None
        else replace(
            row,
            speedup_measured=1 / share,
            speedup_modelled_clocked=sum(row.sequence_tokens[index] for index in sequences)
            / sum(row.sequence_time_steps[index] for index in sequences),
        )
        for row, share in zip(rows, time_shares, strict=True)
    ]


def read_draft_rows(path: Path) -> list[DraftRow]:
    """Reads what `write_rows` wrote of them.

    Raises:
        InputError: If the file cannot be read, or a line is not such a row.
    """
    names = {field.name for field in fields(DraftRow)}
    older = names - {"speedup_modelled_clocked"}
    rows = []
    try:
        for _, line in json_lines(path):
            data = json.loads(line)
            if not isinstance(data, dict) or not older <= data.keys() <= names:
                raise ValueError(f"a row has {', '.join(sorted(names))}")
            rows.append(DraftRow(**data))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as rows of drafts ({error}); write it again with train.py") from error
    return rows


@dataclass(frozen=True)
class Gain:
    """How much faster one policy, or the seeds of one, are than another on the same sequences.

    Attributes:
        value: Speed over speed, the geometric mean over seeds.
        low: Lower end of its 95% interval; None where one document gives none.
        high: Upper end.
        by_seed: Speed over speed of each training seed, or of the one policy.
    """

    value: float
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.low is None or self.high is None:
            return "cannot be told apart from"
        return "beats" if self.low > 1 else "loses to" if self.high < 1 else "cannot be told apart from"

    def words(self) -> str:
        """E.g. `4.2% faster (95% interval over documents 1.0% faster to 7.3% faster)`."""
        if self.low is None or self.high is None:
            return f"{_faster(self.value)} (one document gives no interval)"
        is_two_way = len(self.by_seed) >= ENOUGH_SEEDS
        over = "documents and training seeds" if is_two_way else "documents"
        ends = f"95% interval over {over} {_faster(self.low)} to {_faster(self.high)}"
        seeds = f"; the seeds {_faster(min(self.by_seed))} to {_faster(max(self.by_seed))}" if is_two_way else ""
        return f"{_faster(self.value)} ({ends}{seeds})"


def gain(rows: Sequence[DraftRow], base: DraftRow) -> Gain:
    """Of one policy's seeds over another policy, paired by document; `interval_method` says what it covers."""
    weights = document_weights(base.sequence_documents)
    base_time = weights @ np.array(base.sequence_time_steps)
    # [S, 1 + R]: column 0 is the text itself.
    logs = np.stack([np.log(base_time / (weights @ np.array(row.sequence_time_steps))) for row in rows])
    value, by_seed = math.exp(float(logs[:, 0].mean())), tuple(np.exp(logs[:, 0]).tolist())
    if len(set(base.sequence_documents)) < 2:
        return Gain(value, None, None, by_seed)
    low, high = percentile_interval(mean_over_seeds(logs)[1:])
    return Gain(value, math.exp(low), math.exp(high), by_seed)


def findings(rows: Sequence[DraftRow], chosen: str, *, pays: bool) -> list[str]:
    """The results in words, without full stops.

    Args:
        rows: All rows.
        chosen: What validation chose to be exported, in words.
        pays: Whether it drafts.
    """
    learned = [row for row in rows if row.kind == "learned"]
    fixed, rule, plain = best_fixed(rows), best_rule(rows), plain_decoding(rows)

    def compared(against: Gain, own: Sequence[DraftRow], base: DraftRow) -> str:
        beaten = all(gain(one, plain).value < 1 for one in (own, [base]))
        return against.words() + ("; plain decoding is faster than both" if beaten else "")

    seeds = f"{len(learned)} training seed{'s' if len(learned) > 1 else ''}"
    found = []
    for base, what in ((fixed, "the best fixed rounds"), (rule, "the best tuned rule")):
        against = gain(learned, base)
        found.append(
            f"by the cost table the learned policy ({seeds}) {against.verdict} {what}, {base.policy}: "
            f"{compared(against, learned, base)}"
        )
    rule_over_fixed = gain([rule], fixed)
    if rule is not fixed:
        words = compared(rule_over_fixed, [rule], fixed)
        found.append(f"the best tuned rule {rule_over_fixed.verdict} the best fixed rounds: {words}")
    hindsight, clairvoyant = (known_by_name(rows, name).speedup_modelled for name in (HINDSIGHT, CLAIRVOYANT))
    alone = next((row for row in rows if row.family == Lookups.family), None)
    lookups = "" if alone is None else f"{alone.speedup_modelled:.3f} of what is found in the text alone, "
    if alone is not None:
        against = gain(learned, alone)
        found.append(
            f"by the cost table the learned policy {against.verdict} what is found in the text alone: "
            f"{compared(against, learned, alone)}"
        )
    found.append(
        f"speed over plain decoding at the largest width by the cost table: {fixed.speedup_modelled:.3f} fixed, "
        f"{rule.speedup_modelled:.3f} tuned rule, {', '.join(f'{row.speedup_modelled:.3f}' for row in learned)} "
        f"learned, {lookups}{hindsight:.3f} of rounds that end behind the first wrong draft, as if that were known, "
        f"{clairvoyant:.3f} of a bound that knows every draft before"
    )
    clocked = [row for row in rows if row.speedup_measured is not None and row.kind != "plain"]
    if clocked:
        by_clock = ", ".join(f"{row.speedup_measured:.3f} {_short(row)}" for row in clocked)
        found.append(f"by the clock, on some of the test prompts: {by_clock}")
    if not pays:
        found.append(
            "drafts do not pay: on validation sequences nothing that drafts is faster than plain decoding of this "
            "model on this device"
        )
    return [*found, f"exported is {chosen}"]


def known_by_name(rows: Sequence[DraftRow], name: str) -> DraftRow:
    """The row of a reference or bound."""
    return next(row for row in rows if row.policy == name)


def plain_decoding(rows: Sequence[DraftRow]) -> DraftRow:
    """The row of what never drafts."""
    return next(row for row in rows if row.kind == "plain")


def captured_headroom(rows: Sequence[DraftRow]) -> float | None:
    """How far learned policies come from the faster of the best fixed rounds and plain decoding towards the bound.

    Returns:
        Mean over seeds, a share of the way in speed; None where the bound is no faster than that base.
    """
    learned = [row.speedup_modelled for row in rows if row.kind == "learned"]
    base = max(best_fixed(rows).speedup_modelled, plain_decoding(rows).speedup_modelled)
    bound = known_by_name(rows, CLAIRVOYANT).speedup_modelled
    return (sum(learned) / len(learned) - base) / (bound - base) if bound > base else None


def best_fixed(rows: Sequence[DraftRow]) -> DraftRow:
    """The tuned fixed rounds: whatever is decided must beat a length that never changes."""
    return next(row for row in rows if row.family == FIXED_FAMILY)


def best_rule(rows: Sequence[DraftRow]) -> DraftRow:
    """The tuned rule that is fastest on validation sequences; test sequences choose nothing."""
    return max((row for row in rows if row.kind == "rule"), key=lambda row: row.speedup_validation or 0.0)


def _short(row: DraftRow) -> str:
    return row.family if row.seed is None else f"{row.family} (seed {row.seed})"


def _faster(ratio: float) -> str:
    return f"{100 * abs(ratio - 1):.1f}% {'faster' if ratio >= 1 else 'slower'}"
