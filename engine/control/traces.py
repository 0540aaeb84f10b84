"""Files of recorded traces: a model's own continuations and what every draft width would have proposed on the way.

A recording is a directory: `recording.json` (the plan: what is continued, by which decoder, how far), one safetensors
file per sequence, and the projected embeddings of the tokens that occur. A greedy continuation at the verify width does
not depend on what was drafted, so every policy of drafts can be played from it without the model.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flexquant_rl.engine.control.draft_limits import MOST_PENDING
from flexquant_rl.engine.control.signals import OUTPUT_SIGNALS, check_widths
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import check_new_directory, read_json, read_tensors, write_json, write_tensors
from flexquant_rl.kernels.bitplane import NUM_PLANES

TRACE_VERSION = 1
PLAN_FILE, EMBEDDING_FILE = "recording.json", "embedding.safetensors"
MAX_DEPTH = MOST_PENDING
NO_TOKEN = -1
"""Where nothing was drafted, because the continuation may not be that long."""
SplitName = Literal["train", "validation", "test"]
_FIX = "run the same `fq record` command again, or choose another directory"


@dataclass(frozen=True)
class PlannedSequence:
    """A prompt to be continued.

    Attributes:
        prompt_ids: Its tokens.
        split: What the text may be used for: `train`, `validation` or `test`.
        document: Number of the document that it is cut from, the unit that intervals resample.
        source: Name of the text, e.g. of its file.
    """

    prompt_ids: tuple[int, ...]
    split: SplitName
    document: int
    source: str


@dataclass(frozen=True)
class RecordingPlan:
    """Everything that decides the bytes of a recording.

    Attributes:
        fingerprint: Fingerprint of the nested model.
        decoder: Whose arithmetic it is, `lean` (int8 activations) or `hf` (float32).
        verify_width: Width of the continuations, and of the keys and values that drafts start from.
        draft_widths: The L widths that drafted, ascending: the levels of an environment. A whole one is that width for
            every unit; another one is the mean width of an allocation.
        depth: D, tokens drafted from every position at most.
        max_new_tokens: Tokens of a continuation at most.
        eos_token_ids: Each of these ends a continuation.
        sequences: The prompts.
        mixed: The allocations `[U]`, one for each width that is not whole, in their order.
    """

    fingerprint: str
    decoder: Literal["lean", "hf"]
    verify_width: int
    draft_widths: tuple[float, ...]
    depth: int
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    sequences: tuple[PlannedSequence, ...]
    mixed: tuple[tuple[int, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form. Recordings of whole widths have no word of others, as before there were any."""
        data = asdict(self)
        if not self.mixed:
            del data["mixed"]
        return data

    def digest(self) -> str:
        """Hex digest of all of it; every file of the recording carries it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def levels(self, num_units: int) -> Tensor:
        """The allocations that draft, `[L, U]` int64."""
        mixed = iter(self.mixed)
        rows = [[int(width)] * num_units if is_whole(width) else [*next(mixed)] for width in self.draft_widths]
        return torch.tensor(rows)

    def of_sequences(self, sequences: tuple[PlannedSequence, ...]) -> RecordingPlan:
        """The same plan for other prompts."""
        return replace(self, sequences=sequences)

    def check_model(self, fingerprint: str) -> None:
        """Raises InputError if the recording is of another model."""
        if self.fingerprint != fingerprint:
            raise InputError(
                f"the traces are of model {self.fingerprint[:12]}, but this one is {fingerprint[:12]}; "
                "record this model with `fq record`"
            )

    def draft_depth(self, position: int) -> int:
        """Tokens drafted after `position` tokens: a longer round could not be kept whole."""
        return max(0, min(self.depth, self.max_new_tokens - 1 - position))


@dataclass(frozen=True)
class SequenceTrace:
    """A continuation of N tokens after its first, and the drafts from each of its positions.

    At position p the token `token_ids[p]` is known and not yet read. Reading it at the verify width gives the output
    that `settled_signals[p + 1]` describe and the token `token_ids[p + 1]`.

    Attributes:
        token_ids: `[N + 1]` int32; the first comes from the prompt alone.
        settled_signals: `[N + 1, 5]` float32, `OUTPUT_SIGNALS` of the output that gave each token.
        draft_ids: `[N, L, D]` int32: after p settled tokens, level l's greedy draft of token `p + 1 + i`, having read
            its own drafts before it; `NO_TOKEN` beyond `draft_depth(p)`.
        draft_signals: `[N, L, D, 5]` float32, `OUTPUT_SIGNALS` of the outputs that gave them; 0 beyond.
    """

    token_ids: Tensor
    settled_signals: Tensor
    draft_ids: Tensor
    draft_signals: Tensor

    @property
    def num_tokens(self) -> int:
        """N, the tokens that passes gained."""
        return len(self.draft_ids)


@dataclass(frozen=True)
class Traces:
    """A whole recording.

    Attributes:
        plan: What was recorded.
        sequences: One for each prompt of the plan.
        embedding_ids: `[n]` int64 tokens that occur, ascending.
        embedding: `[n, 32]` float32, their projected embeddings as signals have them.
    """

    plan: RecordingPlan
    sequences: tuple[SequenceTrace, ...]
    embedding_ids: Tensor
    embedding: Tensor

    def of_split(self, split: SplitName) -> list[int]:
        """Indices of the sequences of a split."""
        return [index for index, planned in enumerate(self.plan.sequences) if planned.split == split]


def is_whole(width: float) -> bool:
    """Whether a mean width is one width for every unit."""
    return float(width).is_integer()  # not so of nan and infinity


def sequence_path(directory: Path, index: int) -> Path:
    """The file of a sequence."""
    return directory / f"sequence-{index:05d}.safetensors"


def check_directory(directory: Path) -> None:
    """Raises InputError if a directory holds what is no recording. Worth doing before the work that fills it."""
    if not (directory / PLAN_FILE).is_file():
        check_new_directory(directory)


def start_recording(directory: Path, plan: RecordingPlan) -> None:
    """Writes the plan into a directory that is new, empty, or of the very same plan.

    Raises:
        InputError: If the directory holds anything else.
    """
    check_directory(directory)
    if (directory / PLAN_FILE).is_file():
        found = read_plan(directory)
        if found != plan:
            names = [field.name for field in fields(plan) if getattr(found, field.name) != getattr(plan, field.name)]
            raise InputError(
                f"{directory} holds a recording with other {', '.join(names)}; give the options it was begun with, or "
                "choose another directory"
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / PLAN_FILE, {"version": TRACE_VERSION, **plan.to_dict()})


def read_plan(directory: Path) -> RecordingPlan:
    """The plan of a recording.

    Raises:
        InputError: If there is none that can be read.
    """
    path = directory / PLAN_FILE
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no readable recording ({error}); run `fq record`") from error
    version = data.pop("version", None) if isinstance(data, dict) else None
    if version != TRACE_VERSION:
        raise InputError(f"{path}: traces of version {version}, this is {TRACE_VERSION}; run `fq record`")
    try:
        return _plan_of(data)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a whole plan ({error!r}); {_FIX}") from error


def _plan_of(data: dict[str, Any]) -> RecordingPlan:
    sequences = tuple(
        PlannedSequence(**{**item, "prompt_ids": tuple(item["prompt_ids"])}) for item in data["sequences"]
    )
    lists = {name: tuple(data[name]) for name in ("draft_widths", "eos_token_ids")}
    mixed = tuple(tuple(allocation) for allocation in data.get("mixed", ()))
    plan = RecordingPlan(**{**data, **lists, "sequences": sequences, "mixed": mixed})
    numbers = plan.draft_widths
    check_widths(tuple(filter(is_whole, numbers)) or (1,))
    counts = (plan.verify_width, plan.depth, plan.max_new_tokens, *plan.eos_token_ids)
    counts += tuple(number for planned in sequences for number in (planned.document, *planned.prompt_ids))
    rules = {
        "fingerprint and sources are text": all(
            isinstance(text, str) for text in (plan.fingerprint, *(planned.source for planned in sequences))
        ),
        "decoder is lean or hf": plan.decoder in ("lean", "hf"),
        "splits are known": all(planned.split in get_args(SplitName) for planned in sequences),
        "draft widths ascend": all(type(width) in (int, float) and math.isfinite(width) for width in numbers)
        and sorted(set(numbers)) == [*numbers]
        and bool(numbers),
        "there is an allocation for each width that is not whole": len(mixed)
        == len(numbers) - sum(map(is_whole, numbers))
        and len(set(map(len, mixed))) <= 1
        and all(type(width) is int and 0 < width <= NUM_PLANES for allocation in mixed for width in allocation),
        "numbers are whole": all(type(number) is int and number >= 0 for number in counts),
        "there is a sequence": bool(sequences),
        f"depth is 1 to {MAX_DEPTH}": plan.depth in range(1, MAX_DEPTH + 1),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"in a plan {rule}")
    return plan


def write_sequence(directory: Path, plan: RecordingPlan, index: int, trace: SequenceTrace) -> None:
    """Writes a sequence, atomically."""
    write_tensors(sequence_path(directory, index), dict(vars(trace)), _mark(plan, index))


def read_sequence(directory: Path, plan: RecordingPlan, index: int) -> SequenceTrace:
    """Reads a sequence.

    Raises:
        InputError: If it is missing, damaged, or of another recording.
    """
    path = sequence_path(directory, index)
    tensors, metadata = read_tensors(path, fix=f"delete it, then {_FIX}")
    if metadata != _mark(plan, index):
        raise InputError(f"{path} belongs to another recording or place; delete it, then {_FIX}")
    num_tokens, levels = len(tensors["draft_ids"]) if "draft_ids" in tensors else 0, len(plan.draft_widths)
    expected = {
        "token_ids": ((num_tokens + 1,), torch.int32),
        "settled_signals": ((num_tokens + 1, len(OUTPUT_SIGNALS)), torch.float32),
        "draft_ids": ((num_tokens, levels, plan.depth), torch.int32),
        "draft_signals": ((num_tokens, levels, plan.depth, len(OUTPUT_SIGNALS)), torch.float32),
    }
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != expected or not 1 <= num_tokens <= plan.max_new_tokens:
        raise InputError(f"{path} does not hold a sequence of this recording; delete it, then {_FIX}")
    return SequenceTrace(**tensors)


def write_embedding(directory: Path, plan: RecordingPlan, token_ids: Tensor, embedding: Tensor) -> None:
    """Writes the projected embeddings of the tokens that occur; the recording is whole with it."""
    write_tensors(directory / EMBEDDING_FILE, {"token_ids": token_ids, "embedding": embedding}, _mark(plan, -1))


def read_traces(directory: Path | str) -> Traces:
    """Reads a recording that is whole.

    Raises:
        InputError: If a file is missing, damaged or foreign.
    """
    directory = Path(directory)
    plan = read_plan(directory)
    missing = [i for i in range(len(plan.sequences)) if not sequence_path(directory, i).is_file()]
    path = directory / EMBEDDING_FILE
    if missing or not path.is_file():
        done = len(plan.sequences) - len(missing)
        raise InputError(f"{directory}: {done} of {len(plan.sequences)} sequences are recorded; {_FIX}")
    tensors, metadata = read_tensors(path, fix=f"delete it, then {_FIX}")
    ids, embedding = tensors.get("token_ids"), tensors.get("embedding")
    if metadata != _mark(plan, -1) or ids is None or embedding is None or len(ids) != len(embedding):
        raise InputError(f"{path} belongs to another recording; delete it, then {_FIX}")
    sequences = tuple(read_sequence(directory, plan, index) for index in range(len(plan.sequences)))
    if not torch.equal(ids, occurring_tokens(sequences)):
        raise InputError(f"{path} is not of the tokens that were recorded; delete it, then {_FIX}")
    return Traces(plan, sequences, ids, embedding)


def occurring_tokens(sequences: tuple[SequenceTrace, ...]) -> Tensor:
    """Every token that is read or drafted somewhere, `[n]` int64, ascending."""
    ids = torch.cat([part.flatten() for trace in sequences for part in (trace.token_ids, trace.draft_ids)])
    unique: Tensor = ids[ids != NO_TOKEN].unique().long()
    return unique


def _mark(plan: RecordingPlan, index: int) -> dict[str, str]:
    return {"recording": plan.digest(), "index": str(index)}
