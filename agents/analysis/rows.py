"""What an analysis measured, as JSON lines: from these files alone report and pictures are made.

One file for each kind of row, written whole. A strategy is finished when `strategies.jsonl` has it: its tokens are
written before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from flexquant_rl.agents.analysis.strategies import is_peer
from flexquant_rl.agents.evaluation.rows import write_rows
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import check_field_types
from flexquant_rl.engine.files import json_lines, read_json, write_json

PLAN_FILE = "analysis.json"
PLAN_VERSION = 4
_READABLE = (2, 3)  # whose rows of times do not say what took turns with ours, and whose recipes were others


@dataclass(frozen=True)
class Plan:
    """What results depend on; rows of two plans are never in one directory.

    Attributes:
        model: Name of the model.
        model_sha256: Digest of its weights.
        num_weights: Weights that are nested.
        nested: Whether it is a nested checkpoint, analysed as it is stored.
        reference: `unquantised`, or `8-bit` of a nested checkpoint.
        bit_widths: The widths.
        text: Names of the files that are analysed; none: the held-out standard library.
        windows_sha256: Digest of the windows.
        num_windows: Windows of text.
        window_tokens: Tokens that are read of each; the one after them is predicted only.
        first: Tokens at the beginning of each that are context only.
        calibration: Names of the files that strategies are fitted to, their training split.
        calibration_sha256: Digest of their content, and of the field of JSON rows that is read.
        calibration_weights: Their shares; none: as long as they are.
        tune_steps: Steps of the strategies that tune.
        threads: Threads of a timed step; None is the decoder's own choice.
        part_width: The width at which every single matrix is measured.
    """

    model: str
    model_sha256: str
    num_weights: int
    nested: bool
    reference: str
    bit_widths: tuple[int, ...]
    text: tuple[str, ...]
    windows_sha256: str
    num_windows: int
    window_tokens: int
    first: int
    calibration: tuple[str, ...]
    calibration_sha256: str
    calibration_weights: tuple[float, ...]
    tune_steps: int
    threads: int | None
    part_width: int


@dataclass(frozen=True)
class WindowRow:
    """One window of the text, and what the reference says of its T judged tokens.

    Attributes:
        window: Its number.
        source: The file that it is of.
        document: Its document, the unit of all intervals.
        context: The text of the tokens before the first judged one.
        tokens: The text of each judged token, which is read before its output is judged.
        token_ids: Their ids.
        token_entropy_nats: Entropy of the reference's output after each.
        top1_probability: Probability of its likeliest next token.
        top1_tokens: The text of that token.
        token_nll_nats: Negative log-likelihood of the next token of the text.
    """

    window: int
    source: str
    document: int
    context: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    token_entropy_nats: tuple[float, ...]
    top1_probability: tuple[float, ...]
    top1_tokens: tuple[str, ...]
    token_nll_nats: tuple[float, ...]


@dataclass(frozen=True)
class StrategyRow:
    """One strategy at one width on all the text.

    Attributes:
        strategy: Its name; of another library's format the library, a colon and the format.
        group_size: Inputs that share a scale: with the width, all that the time of a step of ours depends on.
        bit_width: The width of every unit; of another library's format the bits in its name.
        output_kl_nats: Mean output KL over tokens.
        output_kl_low: Lower end of its bootstrap 95% interval over documents.
        output_kl_high: Upper end.
        output_kl_p99_nats: 99th percentile over tokens.
        perplexity: `exp` of the mean negative log-likelihood in nats.
        reference_perplexity: That of the reference.
        top1_agreement: Share of tokens whose likeliest next token is the reference's.
        bytes_per_weight: Bytes of planes, scales and offsets that a step reads for each nested weight; of another
            library all that it stores of these matrices.
        quantising_seconds: Wall-clock seconds from the weights to the nested model, calibration and tuning with them.
        num_tokens: Tokens judged.
    """

    strategy: str
    group_size: int
    bit_width: int
    output_kl_nats: float
    output_kl_low: float
    output_kl_high: float
    output_kl_p99_nats: float
    perplexity: float
    reference_perplexity: float
    top1_agreement: float
    bytes_per_weight: float
    quantising_seconds: float
    num_tokens: int


@dataclass(frozen=True)
class TimeRow:
    """The measured time of a decode step in one format. Ours take turns, alone or with one of another library.

    Attributes:
        group_size: Inputs that share a scale.
        bit_width: The width of every unit.
        measured_ms: Wall-clock milliseconds, the median over rounds.
        measured_low: Lower quartile over rounds.
        measured_high: Upper quartile.
        num_threads: Threads of the lean decoder, and of the other library.
        cpu: The machine's processor.
        strategy: The format of another library; None: ours, of every strategy with this group size.
        beside: The format of another library in these turns; None: ours alone.
    """

    group_size: int
    bit_width: int
    measured_ms: float
    measured_low: float
    measured_high: float
    num_threads: int
    cpu: str
    strategy: str | None = None
    beside: str | None = None


@dataclass(frozen=True)
class TokensRow:
    """One strategy at one width, token by token of one window.

    Attributes:
        strategy: Its name.
        bit_width: The width of every unit.
        window: The window's number.
        output_kl_nats: KL(reference || quantised) after each judged token.
        token_nll_nats: Negative log-likelihood of the next token of the text.
        top1_tokens: The text of the likeliest next token.
    """

    strategy: str
    bit_width: int
    window: int
    output_kl_nats: tuple[float, ...]
    token_nll_nats: tuple[float, ...]
    top1_tokens: tuple[str, ...]


@dataclass(frozen=True)
class PartRow:
    """The sensitivity of one part of the model: only it is at the width, all else at the reference.

    Attributes:
        strategy: How it is quantised.
        kind: `unit`, `matrices` (all of one kind) or `matrix`.
        part: Its name, e.g. `layer.3`, `down` or `layer.3.down`.
        bit_width: Its width.
        output_kl_nats: Mean output KL.
        num_weights: Weights in it.
        num_windows: Windows that the mean is over.
        num_tokens: Tokens that the mean is over.
    """

    strategy: str
    kind: str
    part: str
    bit_width: int
    output_kl_nats: float
    num_weights: int
    num_windows: int
    num_tokens: int


@dataclass(frozen=True)
class PastRow:
    """Where the KL of some tokens of one window comes from.

    Attributes:
        strategy: How the model is quantised.
        bit_width: The width.
        window: The window's number.
        places: Which of its judged tokens, from 0.
        own_step: KL after each of them that is read at the width behind a past of the reference.
        past: The same of one that the reference reads behind a past of the width.
    """

    strategy: str
    bit_width: int
    window: int
    places: tuple[int, ...]
    own_step: tuple[float, ...]
    past: tuple[float, ...]


_FILES: dict[type[Any], str] = {
    WindowRow: "text.jsonl",
    StrategyRow: "strategies.jsonl",
    TimeRow: "times.jsonl",
    TokensRow: "tokens.jsonl",
    PartRow: "sensitivity.jsonl",
    PastRow: "past.jsonl",
}
_Row = TypeVar("_Row")
_DIGITS = 5


def times_by_row(
    rows: Iterable[StrategyRow], times: Iterable[TimeRow], beside: str | None = None
) -> dict[tuple[str, int], TimeRow]:
    """The measured time of strategies by their name and width, where there is one: of ours, that of one run of turns.

    Args:
        rows: The strategies.
        times: All that was measured.
        beside: The format of another library in those turns; None: ours alone.
    """
    chosen = [row for row in times if row.strategy is not None or row.beside == beside]
    known = {(row.strategy, row.group_size, row.bit_width): row for row in chosen}
    found: dict[tuple[str, int], TimeRow] = {}
    for row in rows:
        form = row.group_size, row.bit_width
        # The formats of other libraries have times of their own; a strategy of ours has its group size's.
        timed = known.get((row.strategy, *form)) or (None if is_peer(row.strategy) else known.get((None, *form)))
        if timed is not None:
            found[row.strategy, row.bit_width] = timed
    return found


class RowStore:
    """The files of an analysis.

    Args:
        directory: Where they are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, kind: type[_Row]) -> list[_Row]:
        """All rows of a kind, none where there is no file yet.

        Raises:
            InputError: If the file is damaged.
        """
        path = self.directory / _FILES[kind]
        if not path.exists():
            return []
        try:
            lines = json_lines(path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}); remove it and run fq analyse again") from error
        return [_parsed(line, kind, f"{path}:{number}") for number, line in lines]

    def replace(self, rows: Sequence[_Row], kind: type[_Row], strategies: Iterable[str] | None = None) -> None:
        """Writes rows in place of those of the same strategies, or of all.

        Args:
            rows: The new ones.
            kind: Their kind.
            strategies: Whose rows go; None: all.
        """
        gone = None if strategies is None else set(strategies)
        kept = [] if gone is None else [row for row in self.read(kind) if getattr(row, "strategy") not in gone]  # noqa: B009
        write_rows(self.directory / _FILES[kind], [*kept, *rows])  # type: ignore[list-item]

    def add(self, rows: Sequence[Any]) -> None:
        """Adds rows of one kind after those that are there."""
        if rows:
            self.replace([*self.read(type(rows[0])), *rows], type(rows[0]))

    def write_plan(self, plan: Plan) -> None:
        """Writes what the rows depend on."""
        write_json(self.directory / PLAN_FILE, {"version": PLAN_VERSION, **asdict(plan)})

    def read_plan(self, *, to_continue: bool = False) -> Plan:
        """Reads it.

        Args:
            to_continue: Whether rows are to be added: recipes have changed since older versions.

        Raises:
            InputError: If the directory has none of this version, or of one that can still be read.
        """
        path = self.directory / PLAN_FILE
        try:
            data = read_json(path)
            version = data.pop("version")
            if version == PLAN_VERSION or (version in _READABLE and not to_continue):
                return _checked(Plan, data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.directory} is not an analysis (no readable {PLAN_FILE}: {error}); give a directory that "
                "fq analyse wrote"
            ) from error
        raise InputError(f"{path}: version {version}, this is {PLAN_VERSION}; analyse again into another directory")


def rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Numbers of tokens to the digits that are worth their place."""
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)


def _parsed(line: str, kind: type[_Row], where: str) -> _Row:
    try:
        return _checked(kind, json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{where} is no row of an analysis ({error}); remove the file and run fq analyse again"
        ) from error


def _checked(kind: type[_Row], data: dict[str, Any]) -> _Row:
    """Rebuilds a dataclass from JSON: lists become tuples, null becomes NaN where a number must be."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    known = {field.name for field in fields(kind) if field.default is not MISSING}  # type: ignore[arg-type]
    if not names - known <= data.keys() <= names:
        raise ValueError(f"missing or unknown: {', '.join(sorted(names ^ data.keys()))}")
    hints = get_type_hints(kind)
    number: Callable[[Any], Any] = lambda value: math.nan if value is None else value  # noqa: E731
    values = {
        name: tuple(map(number, value)) if isinstance(value, list) else number(value) if hints[name] is float else value
        for name, value in data.items()
    }
    row = kind(**values)
    check_field_types(row)
    return row
