"""Tasks made of files: documents as JSON lines and a description that lm-evaluation-harness reads, without a network.

`continuation` asks which of four passages follows, `line` for the end of a line of code, `gsm8k` for the number that
answers a question of grade-school mathematics. The same files make the same documents. Nothing that a model writes is
ever run, so no task needs a sandbox.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import json_lines, json_sha256, replacing, write_json
from flexquant_rl.fq_env.prompts import stdlib_documents
from flexquant_rl.fq_env.text_files import documents_of

Documents = list[dict[str, Any]]
SOURCE = "source"
"""The field of a document that names what it is a part of; documents of one source are resampled together."""
LEAST_DOCUMENTS = 2
_MOST_DOCUMENTS = 500
_PIECE_CHARS = 4000
_CONTEXT_CHARS = 400
_ANSWER_CHARS = 48
_NUM_CHOICES = 4
_LINE_CHARS = (20, 90)
_LEAST_WORDS = 3
_CODE_CHARS = 800
_LINE_TOKENS = 40
_GSM8K_TOKENS = 200
_GSM8K_SHOTS = 3
_MEAN = {"aggregation": "mean", "higher_is_better": True}


@dataclass(frozen=True)
class LocalTask:
    """One task of ours.

    Attributes:
        name: What `--tasks` calls it.
        says: What it asks, in a sentence of the report.
        documents: Makes its documents of files, or of the held-out standard library where there are none.
        description: What the harness must know of it, but for the files.
        shots: Documents at the beginning that are shown as examples and not asked.
        needs_files: The option that must name files; None where the standard library stands in.
    """

    name: str
    says: str
    documents: Callable[[Sequence[Path]], Documents]
    description: dict[str, Any]
    shots: int = 0
    needs_files: str | None = None


@dataclass(frozen=True)
class MadeTask:
    """A task and the documents that were made for it.

    Attributes:
        task: The task.
        documents: Those that are shown as examples, then those that are asked.
    """

    task: LocalTask
    documents: Documents

    @property
    def sha256(self) -> str:
        """Digest of documents and description, hex."""
        parts = [self.documents, self.task.description, self.task.shots]
        return json_sha256(parts)

    def write(self, directory: Path) -> None:
        """Writes `NAME.jsonl` and `NAME.yaml`, which `lm-eval run --include_path` reads too."""
        task = self.task
        asked = directory / f"{task.name}.jsonl"
        _write_lines(asked, self.documents[task.shots :])
        splits = {"test": str(asked.resolve())}
        more: dict[str, Any] = {}
        if task.shots:
            shown = directory / f"{task.name}-examples.jsonl"
            _write_lines(shown, self.documents[: task.shots])
            splits["train"] = str(shown.resolve())
            more = {"num_fewshot": task.shots, "fewshot_split": "train"}
        source = {"task": task.name, "dataset_path": "json", "dataset_kwargs": {"data_files": splits}}
        # JSON is YAML.
        description = {**source, "test_split": "test", **task.description, **more, "metadata": {"version": 1}}
        write_json(directory / f"{task.name}.yaml", description)


def make_task(task: LocalTask, files: Sequence[Path]) -> MadeTask:
    """Makes a task's documents of files.

    Raises:
        InputError: If files are missing or unreadable, or do not make a single document.
    """
    if task.needs_files is not None and not files:
        raise InputError(f"task {task.name} is made of files; name them with {task.needs_files} FILE")
    documents = task.documents(files)
    if len(documents) < task.shots + LEAST_DOCUMENTS:
        where = ", ".join(map(str, files)) or "the standard library"
        raise InputError(
            f"{where}: {len(documents)} documents for task {task.name} can be made of it, and at least {task.shots} "
            f"examples and {LEAST_DOCUMENTS} to ask are needed; give more text"
        )
    return MadeTask(task, documents)


def _write_lines(path: Path, rows: Documents) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


@dataclass(frozen=True)
class _Text:
    """A text and what it is a part of: passages of one module are not independent."""

    source: str
    text: str


def _texts(files: Sequence[Path]) -> list[list[_Text]]:
    """The documents of each file; without files those of the held-out standard library, long modules in pieces."""
    if files:
        each = [documents_of(path) for path in files]
        return [[_Text(f"{place}", text) for place, text in enumerate(documents)] for documents in each]
    modules = enumerate(stdlib_documents("test"))
    return [[_Text(f"{number}", text) for number, module in modules for text in _pieces(module)]]


def _pieces(text: str) -> list[str]:
    """A text cut at lines' ends into pieces of about 4,000 characters."""
    pieces, begin = [], 0
    while begin < len(text):
        end = text.find("\n", begin + _PIECE_CHARS)
        end = len(text) if end < 0 else end + 1
        pieces.append(text[begin:end])
        begin = end
    return pieces


def _in_turns(of_files: Sequence[Documents]) -> Documents:
    """At most 500 documents in the order of their digests, the files in turns: any beginning is a fair sample."""
    share = max(1, _MOST_DOCUMENTS // max(1, len(of_files)))
    kept = [sorted(documents, key=lambda document: _digest(document["context"]))[:share] for documents in of_files]
    longest = max(map(len, kept), default=0)
    return [documents[index] for index in range(longest) for documents in kept if index < len(documents)]


def continuation_documents(files: Sequence[Path]) -> Documents:
    """A passage of each document, its true continuation and three that follow passages of other ones of the same file.

    All are cut between words and about equally long. Where the true one stands is decided by a digest of the passage.
    """
    return _in_turns([_continuations(texts) for texts in _texts(files)])


def _continuations(texts: Sequence[_Text]) -> Documents:
    cut = [(*found, text.source) for text in texts if (found := _passage(text.text)) is not None]
    stride = _stride(len(cut))
    made: Documents = []
    for index, (context, answer, source) in enumerate(cut):
        following = (cut[(index + step * stride) % len(cut)][1] for step in range(1, len(cut)))
        distinct: dict[str, None] = {}
        for other in following:  # no further than needed: there may be many documents
            if other != answer:
                distinct[other] = None
            if len(distinct) == _NUM_CHOICES - 1:
                break
        others = list(distinct)
        if len(others) < _NUM_CHOICES - 1:
            return []
        gold = _digest(context) % _NUM_CHOICES
        choices = [*others[:gold], answer, *others[gold:]]
        made.append({"context": context, "choices": choices, "gold": gold, SOURCE: source})
    return made


def _passage(text: str) -> tuple[str, str] | None:
    """About 400 characters from a document's beginning and the 48 behind them, cut between words; None if shorter."""
    end = text.find(" ", _CONTEXT_CHARS)
    if end < 0:
        return None
    rest = text[end + 1 :]
    stop = rest.find(" ", _ANSWER_CHARS)
    answer = rest[:stop] if stop >= 0 else ""
    context = text[:end]
    is_clean = answer.strip() == answer and context.rstrip() == context
    return (context, answer) if answer and is_clean else None


def _stride(count: int) -> int:
    """Steps that lead from one document to others that are far from it, and through all before one comes again."""
    stride = max(1, count * 2 // 5)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def line_documents(files: Sequence[Path]) -> Documents:
    """A line of each document of code without the second half of its words, behind what stands before it."""
    return _in_turns([[made for text in texts if (made := _line(text)) is not None] for texts in _texts(files)])


def _line(asked: _Text) -> dict[str, str] | None:
    """The line that a digest of the document chooses; None where no line is worth asking for."""
    text = asked.text
    lines = text.split("\n")
    begins = [0, *itertools.accumulate(len(line) + 1 for line in lines)]
    fitting = [index for index, line in enumerate(lines) if begins[index] >= _CODE_CHARS // 2 and _is_asked(line)]
    if not fitting:
        return None
    index = fitting[_digest(text) % len(fitting)]
    line, begin = lines[index], begins[index]
    words = line.strip().split(" ")
    answer = " ".join(words[(len(words) + 1) // 2 :])
    before = text[max(0, begin - _CODE_CHARS) : begin]
    if begin > _CODE_CHARS:  # not in the middle of a line
        before = before[before.index("\n") + 1 :]
    return {"context": before + line.rstrip().removesuffix(answer).rstrip(), "answer": answer, SOURCE: asked.source}


def _is_asked(line: str) -> bool:
    """Whether a line is code of some words, as far as its letters tell: an assignment, a call, no comment or text."""
    bare = line.strip()
    low, high = _LINE_CHARS
    is_code = any(mark in bare for mark in "=(") and bare[0] not in "#\"'/*"
    return low <= len(bare) <= high and len(bare.split()) >= _LEAST_WORDS and is_code and "  " not in bare


def gsm8k_documents(files: Sequence[Path]) -> Documents:
    """Rows with `question` and `answer`, as GSM8K publishes them; the answer ends with `#### NUMBER`."""
    made: Documents = []
    for path in files:
        for number, row in enumerate(_json_rows(path), start=1):
            question, answer = (row.get(name) if isinstance(row, dict) else None for name in ("question", "answer"))
            if not isinstance(question, str) or not isinstance(answer, str) or "#### " not in answer:
                raise InputError(
                    f"{path}:{number} is no row of GSM8K; give lines with question and answer, which ends in #### 42"
                )
            target = answer.rsplit("#### ", 1)[1].strip().replace(",", "")
            made.append({"question": question, "answer": answer, "number": target})
    return made[: _MOST_DOCUMENTS + _GSM8K_SHOTS]


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        for _, line in json_lines(path):
            if line.strip():
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON lines ({error}); give GSM8K's .jsonl file") from error


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


LOCAL_TASKS = {
    task.name: task
    for task in (
        LocalTask(
            "continuation",
            "which of four passages of about 48 characters follows some 400 characters of a text; the three wrong ones "
            "follow passages of other documents of the same file, so subject helps as much as sense (accuracy by "
            "likelihood per byte)",
            continuation_documents,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{context}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{gold}}",
                "target_delimiter": " ",
                "metric_list": [{"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}],
            },
        ),
        LocalTask(
            "line",
            "the second half of a line of source code behind its first half and some 800 characters, to the letter "
            "(exact match, greedy); other right ways to go on count as wrong, and no code is run",
            line_documents,
            {
                "output_type": "generate_until",
                "doc_to_text": "{{context}}",
                "doc_to_target": "{{answer}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": _LINE_TOKENS, "do_sample": False},
                "filter_list": [
                    {
                        "name": "stripped",
                        "filter": [
                            {"function": "regex", "regex_pattern": "^\\s*(.*?)\\s*$"},
                            {"function": "take_first"},
                        ],
                    }
                ],
                "metric_list": [{"metric": "exact_match", **_MEAN}],
            },
        ),
        LocalTask(
            "gsm8k",
            f"grade-school mathematics behind {_GSM8K_SHOTS} worked examples; the last number of the answer must be "
            "the right one (exact match, greedy)",
            gsm8k_documents,
            {
                "output_type": "generate_until",
                "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_target": "{{number}}",
                "fewshot_config": {"sampler": "first_n", "doc_to_target": "{{answer}}"},
                "generation_kwargs": {"until": ["Question:"], "max_gen_toks": _GSM8K_TOKENS, "do_sample": False},
                "filter_list": [
                    {
                        "name": "last-number",
                        "filter": [
                            {
                                "function": "regex",
                                "group_select": -1,
                                "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)",
                            },
                            {"function": "take_first"},
                        ],
                    }
                ],
                "metric_list": [{"metric": "exact_match", **_MEAN, "regexes_to_ignore": [",", "\\$", "\\.$"]}],
            },
            shots=_GSM8K_SHOTS,
            needs_files="--gsm8k",
        ),
    )
}
"""Tasks by name."""
