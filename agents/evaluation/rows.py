"""One evaluated policy: its numbers, and the JSON lines that they are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import json_lines, replacing

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROWS_FILE = "eval.jsonl"
LONG_ROWS_FILE = "eval_long.jsonl"
REPORT_FILE = "report.md"
"""What an evaluation leaves in its directory, whatever was evaluated."""

_PUBLIC = (
    "policy",
    "family",
    "seed",
    "kl_weight",
    "time_budget",
    "mean_bit_width",
    "output_kl_nats",
    "output_kl_p99_nats",
    "perplexity",
    "top1_agreement",
    "differs_from_static",
    "time_share_modelled",
    "time_share_measured",
    "speedup_modelled",
    "speedup_measured",
)


# Rows of before do not have them.
_ADDED = ("time_share_measured_error", "static_log_error_measured")


@dataclass(frozen=True)
class EvalRow:
    """What one policy at one dial scored on the test text.

    Attributes:
        policy: Name, e.g. `fixed:4`, `knapsack:4.5`, `ppo`, `oracle`; `fixed:4+fixed:5` where two share the time.
        family: What draws one line: one of `agents/policies/families.py`, `module:Class` for a class of the user's, or
            `ppo:directory` for an exported policy.
        seed: Training seed of a learned policy, else None.
        kl_weight: The dial, in full-width steps per nat; None for policies without one.
        time_budget: Share of full-width time that the setting was chosen for, on validation text; None without one.
        mean_bit_width: Parameter-weighted mean, bits.
        output_kl_nats: Mean `KL(reference || quantised)` over all tokens, nats.
        output_kl_low: Lower end of its bootstrap 95% interval over documents, nats.
        output_kl_high: Upper end, nats.
        output_kl_p99_nats: 99th percentile over tokens, nats.
        perplexity: `exp(mean negative log-likelihood in nats)`.
        top1_agreement: Share of tokens whose most probable continuation is the reference's, 0 to 1.
        differs_from_static: Share of steps whose widths, of one unit at least, are not those of static in equal time,
            0 to 1: the static allocation of the same budget, or of the time that was taken where there is no budget.
            None where there is no such allocation.
        time_share_modelled: Time of all steps over that at the largest width everywhere, by the latency table and with
            the controller's own: what was attained on test text, which may miss the budget a little.
        time_share_measured: The same by wall clock of batch-1 decoding; None where not measured.
        time_share_measured_error: Standard error of that over rounds; None where not measured or not known.
        speedup_modelled: One over the modelled share.
        speedup_measured: One over the measured share.
        num_sequences: Test sequences.
        num_tokens: Tokens judged, over all sequences.
        reference: `unquantised` or `8-bit`.
        sequence_kl_nats: Mean output KL of each test sequence in order, nats, for paired bootstraps.
        static_kl_nats: The same under the best static allocation that takes the same modelled time, nats; None where
            there is none.
        static_kl_nats_measured: The same under the one that takes the same measured time.
        static_log_error_measured: What the standard error of a measured time is worth in the logarithm of that KL; None
            where it is not known.
        sequence_documents: The document of each test sequence, the unit of the bootstraps.
    """

    policy: str
    family: str
    seed: int | None
    kl_weight: float | None
    time_budget: float | None
    mean_bit_width: float
    output_kl_nats: float
    output_kl_low: float
    output_kl_high: float
    output_kl_p99_nats: float
    perplexity: float
    top1_agreement: float
    differs_from_static: float | None
    time_share_modelled: float | None
    time_share_measured: float | None
    time_share_measured_error: float | None
    speedup_modelled: float | None
    speedup_measured: float | None
    num_sequences: int
    num_tokens: int
    reference: str
    sequence_kl_nats: tuple[float, ...]
    static_kl_nats: tuple[float, ...] | None
    static_kl_nats_measured: tuple[float, ...] | None
    static_log_error_measured: float | None
    sequence_documents: tuple[int, ...]

    @property
    def reward_per_token(self) -> float | None:
        """What training pays at this dial, on this text: share of time saved less priced KL, full-width steps."""
        if self.kl_weight is None or self.time_share_modelled is None:
            return None
        return 1 - self.time_share_modelled - self.kl_weight * self.output_kl_nats


def public_dict(row: EvalRow) -> dict[str, Any]:
    """The fields that commands print, ready for JSON; a number that is not finite becomes None."""
    return {name: _plain(getattr(row, name)) for name in _PUBLIC}


def write_rows(path: Path, rows: Iterable[DataclassInstance]) -> None:
    """Writes one JSON object a line, a dataclass each, atomically; a number that is not finite becomes null."""
    lines = [json.dumps({name: _plain(value) for name, value in asdict(row).items()}, allow_nan=False) for row in rows]
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_rows(path: Path) -> list[EvalRow]:
    """Reads what `write_rows` wrote; null in a field that must be a number becomes NaN.

    Raises:
        InputError: If the file cannot be read, or a line is not a row.
    """
    try:
        lines = json_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as evaluation rows ({error}); give an eval.jsonl") from error
    return [_parse(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _parse(line: str, where: str) -> EvalRow:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}); write it again with fq evaluate") from error
    if isinstance(data, dict):
        data = dict.fromkeys(_ADDED) | data
    expected = {field.name for field in fields(EvalRow)}
    found = data.keys() if isinstance(data, dict) else set()
    if found != expected:
        wrong = ", ".join(sorted(expected ^ found))
        raise InputError(f"{where} is not an evaluation row (missing or unknown: {wrong}); write it with fq evaluate")
    for field in fields(EvalRow):
        if field.type == "float" and data[field.name] is None:
            data[field.name] = math.nan
    for name in ("sequence_kl_nats", "static_kl_nats", "static_kl_nats_measured"):
        if data[name] is not None:
            data[name] = tuple(math.nan if kl is None else kl for kl in data[name])
    data["sequence_documents"] = tuple(data["sequence_documents"])
    return EvalRow(**data)


def _plain(value: Any) -> Any:
    """Turns numbers of any library into Python's; JSON has neither infinities nor NaN."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
