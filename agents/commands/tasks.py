"""`fq tasks`: policies side by side on tasks of lm-evaluation-harness, the same documents for all."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexquant_rl.agents.commands.options import TasksOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.commands.servable import Servable, load_servable
from flexquant_rl.agents.preparation import profile_beside
from flexquant_rl.agents.progress import say
from flexquant_rl.agents.runs.run import locked_run
from flexquant_rl.agents.tasks.clock import Timed, time_policies
from flexquant_rl.agents.tasks.comparison import findings, score_interval
from flexquant_rl.agents.tasks.extra import check_extra, stay_offline
from flexquant_rl.agents.tasks.identity import plain_model_sha256, policy_sha256, timing_sha256
from flexquant_rl.agents.tasks.local_tasks import LOCAL_TASKS, SOURCE, MadeTask, make_task
from flexquant_rl.agents.tasks.reference import FULL_PRECISION, ReferenceEngine
from flexquant_rl.agents.tasks.report import console_table, write_report
from flexquant_rl.agents.tasks.rows import PLAN_FILE, Kind, TaskPlan, TaskRow, TaskTimeRow, claim, read_rows, save_rows
from flexquant_rl.engine.benches.machine import cpu_name
from flexquant_rl.engine.checkpoint import is_nested_model, load_model
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.policy import StaticPolicy
from flexquant_rl.engine.control.token_policy import DialPolicy
from flexquant_rl.engine.decoding.options import check_num_threads
from flexquant_rl.engine.embedded import EMBEDDED_MODEL_NAME, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import check_new_directory, json_sha256, read_json, write_json
from flexquant_rl.engine.loading import local_model

if TYPE_CHECKING:
    from flexquant_rl.agents.tasks.harness import Answering

_TASKS_FOLDER = "tasks"
_PROMPTS_FILE = "timed_prompts.json"
_PROMPTS_OF_A_TASK = 2
_METRICS = ("acc_norm", "acc", "exact_match", "pass@1")
"""What a task is judged by, the first one that it has."""
_FILTER = "flexible-extract"
"""Of several ways to read an answer, the one that is taken where a task has it."""
_DIGEST_CHARS = 12


def tasks(options: TasksOptions) -> None:
    """Asks what is missing, times the policies, prints table and findings, writes the report."""
    check_extra()
    _check(options)
    for name in filter(None, (options.model, options.reference)):
        local_model(resolve_model(name))
    stay_offline()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    out = options.out or Path(f"tasks-{_model_name(options)}")
    run = _TasksRun(options, out)
    # What is bad input leaves nothing behind.
    if options.timed_tokens >= run.model.max_context:
        raise InputError(
            f"--timed-tokens {options.timed_tokens} leaves no room for a prompt in the model's context of "
            f"{run.model.max_context} tokens; give less, {TasksOptions.timed_tokens} is the default"
        )
    made = run.make_tasks()
    digests = {name: "" for name in options.tasks} | {name: task.sha256 for name, task in made.items()}
    plan = TaskPlan(_model_name(options), run.model.fingerprint, options.limit, options.chat, digests)
    if not (out / PLAN_FILE).is_file():
        check_new_directory(out)
        out.mkdir(parents=True, exist_ok=True)
    with _goes_on(), locked_run(out):
        claim(out, plan)
        for task in made.values():
            task.write(out / _TASKS_FOLDER)
        rows, times = run.all_rows()
    found = findings(rows, times)
    print(console_table(rows, times))
    print(*(f"{finding}." for finding in found), sep="\n", end="\n\n")
    asked = {name: LOCAL_TASKS[name].says for name in options.tasks if name in LOCAL_TASKS}
    report = write_report(out, rows, times, found, run.facts(), asked)
    print_result(
        {
            "out": str(out),
            "report": str(report),
            "rows": [row.public() for row in rows],
            "time_share_measured": {row.policy: row.time_share_measured for row in times},
            "findings": found,
        }
    )


def _check(options: TasksOptions) -> None:
    """What can be found out before a model is loaded."""
    for name in ("policy", "tasks"):
        if not getattr(options, name):
            raise InputError(f"--{name} names nothing; leave it out for the default, or name one or more")
        if len(set(getattr(options, name))) < len(getattr(options, name)):
            raise InputError(f"--{name} names something twice; name each once")
    for name, least in (("limit", 2), ("timed_tokens", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if options.threads is not None:
        check_num_threads(options.threads)
    if options.include is not None and not options.include.is_dir():
        raise InputError(f"--include {options.include} is not a directory; name one with tasks as .yaml files")
    model = options.reference or options.model
    if FULL_PRECISION in options.policy and is_nested_model(resolve_model(model)):
        raise InputError(
            f"policy {FULL_PRECISION!r} needs unquantised weights, and {model} is a nested checkpoint; name the model "
            "that it was made from with --reference DIR"
        )
    for task, files, option in (
        ("continuation", options.text, "text"),
        ("line", options.code, "code"),
        ("gsm8k", options.gsm8k, "gsm8k"),
    ):
        if files and task not in options.tasks:
            raise InputError(f"--{option} {files[0]} is for task {task}, which is not asked; add it to --tasks")


def _model_name(options: TasksOptions) -> str:
    path = resolve_model(options.model)
    return EMBEDDED_MODEL_NAME if path == resolve_model(None) else Path(path).name


@contextmanager
def _goes_on() -> Iterator[None]:
    """Tells whoever interrupts the block that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt("the same command goes on with what is missing") from interruption


@dataclass(frozen=True)
class _Asked:
    """A policy as it is run.

    Attributes:
        name: As it appears in tables.
        kind: What it is.
        sha256: Digest of what it is.
        kl_weight: Its dial; None without one.
        servable: What runs; None for full precision.
    """

    name: str
    kind: Kind
    sha256: str
    kl_weight: float | None
    servable: Servable | None

    @property
    def verify_width(self) -> int | None:
        """Of drafts: the width whose answers theirs equal."""
        policy = None if self.servable is None else self.servable.policy
        return policy.verify_width if isinstance(policy, DeployedDrafts) else None


class _TasksRun:
    """One call of the command: the model and the policies are loaded when they are needed, and once.

    Args:
        options: The command's.
        out: The directory of the rows.
    """

    def __init__(self, options: TasksOptions, out: Path) -> None:
        self._options = options
        self._out = out
        self._prompts: dict[str, list[str]] = {}

    @cached_property
    def asked(self) -> list[_Asked]:
        """The policies, each at every setting of the dial that is asked for."""
        found: list[_Asked] = []
        model = None
        for named in self._options.policy:
            if named == FULL_PRECISION:
                source = resolve_model(self._options.reference or self._options.model)
                found.append(_Asked(named, "full", plain_model_sha256(local_model(source)), None, None))
                continue
            threads, profile = self._options.threads, None if Path(named).is_dir() else self._options.profile
            servable = load_servable(self._options.model, named, profile=profile, threads=threads, loaded=model)
            model = model or servable.model
            if servable.model.fingerprint != model.fingerprint:
                raise InputError(
                    f"{named} is for weights that are nested in another way than those of the policies before it; nest "
                    "them once with fq quantize and name the checkpoint, or ask for them one at a time"
                )
            found += self._at_settings(named, replace(servable, model=model))
        return found

    def _at_settings(self, named: str, servable: Servable) -> list[_Asked]:
        policy = servable.policy
        kind: Kind = "drafts" if isinstance(policy, DeployedDrafts) else "learned"
        if isinstance(policy, StaticPolicy | StaticAllocation):
            kind = "static"
        sha256 = policy_sha256(named, servable)
        if servable.rung is not None or not isinstance(policy, DialPolicy) or not self._options.speeds:
            setting = servable.setting()
            return [_Asked(named, kind, sha256, None if setting is None else setting.kl_weight, servable)]
        settings = {speed: servable.setting(speed=speed) for speed in self._options.speeds}
        return [
            _Asked(f"{named} at {speed:g}x", kind, sha256, None if setting is None else setting.kl_weight, servable)
            for speed, setting in settings.items()
        ]

    @cached_property
    def model(self) -> Any:
        """The model whose widths are chosen; the unquantised one where nothing else is asked for."""
        found = next((one.servable.model for one in self.asked if one.servable is not None), None)
        return self._reference if found is None else found

    @cached_property
    def _reference(self) -> Any:
        say("loading the unquantised model")
        return load_model(self._options.reference or self._options.model)

    def make_tasks(self) -> dict[str, MadeTask]:
        """The documents of our own tasks, by name; InputError on a task that there is none of."""
        options = self._options
        files = {"continuation": options.text, "line": options.code, "gsm8k": options.gsm8k}
        others = [name for name in options.tasks if name not in LOCAL_TASKS]
        unknown = [name for name in others if name not in self._manager.all_tasks]
        if unknown:
            raise InputError(
                f"task {unknown[0]!r} is not known; choose from {', '.join(LOCAL_TASKS)}, those that lm-eval ls tasks "
                "lists, or your own with --include DIR"
            )
        self.__dict__.pop("_manager", None)  # made again once our own are written
        return {name: make_task(LOCAL_TASKS[name], files[name]) for name in options.tasks if name in LOCAL_TASKS}

    @cached_property
    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        include = [str(path) for path in (self._out / _TASKS_FOLDER, self._options.include) if path and path.is_dir()]
        is_local = self._options.include is None and all(name in LOCAL_TASKS for name in self._options.tasks)
        return TaskManager(include_path=include, include_defaults=not is_local)

    def all_rows(self) -> tuple[list[TaskRow], list[TaskTimeRow]]:
        """Asks and times what is not in the directory yet; the rows of what was asked for, in its order."""
        kept = {_key(row): row for row in read_rows(self._out, TaskRow)}
        prompts_path = self._out / _PROMPTS_FILE
        self._prompts = _kept_prompts(prompts_path)
        for one in self.asked:
            # Without its prompts a row came of a version that wrote them later, and was killed in between.
            missing = [
                task for task in self._options.tasks if self._wanted(one, task) not in kept or task not in self._prompts
            ]
            if not missing:
                say(f"{one.name}: done before")
                continue
            others = [row for row in kept.values() if (row.policy, row.kl_weight) == (one.name, one.kl_weight)]
            if anew := [row.task for row in others if row.task in missing]:
                say(f"{one.name}: asked anew on {anew[0]}, {self._reason(one, others, anew[0])}")
            with closing(self._engine(one)) as engine:
                for task in missing:
                    row = self._ask(one, engine, task)
                    kept[_key(row)] = row
                    write_json(prompts_path, self._prompts)
                    save_rows(self._out, list(kept.values()), TaskRow)
        wanted = [self._wanted(one, task) for task in self._options.tasks for one in self.asked]
        return [kept[key] for key in wanted], self._times()

    def _reason(self, one: _Asked, others: Sequence[TaskRow], task: str) -> str:
        """Why the row of a task that is there does not do."""
        *_, newest = (row for row in others if row.task == task)
        if _key(newest) == self._wanted(one, task):
            return "the prompts of the row that is there are missing"
        return f"the row that is there is of {_other(newest, one)}"

    def _wanted(self, one: _Asked, task: str) -> _Key:
        return one.name, one.sha256, one.kl_weight, self._threads(one), task

    def _threads(self, one: _Asked) -> int | None:
        """Threads of its steps; full precision is torch's, which --threads does not change."""
        return None if one.servable is None else self._options.threads

    def _engine(self, one: _Asked) -> Answering:
        from flexquant_rl.agents.tasks.harness import engine_of

        if one.servable is None:
            if self._reference.vocab_size != self.model.vocab_size:
                raise InputError(f"--reference {self._options.reference} has another vocabulary than the model")
            return ReferenceEngine(self._reference)
        return engine_of(one.servable, num_threads=self._options.threads)

    def _ask(self, one: _Asked, engine: Answering, task: str) -> TaskRow:
        import lm_eval

        from flexquant_rl.agents.tasks.harness import FlexQuantLM

        say(f"{one.name}: {task}")
        began = time.process_time()
        lm = FlexQuantLM.around(engine, kl_weight=1.0 if one.kl_weight is None else one.kl_weight)
        try:
            results = lm_eval.simple_evaluate(
                lm,
                tasks=[task],
                task_manager=self._manager,
                limit=self._options.limit,
                apply_chat_template=self._options.chat,
                bootstrap_iters=0,
                log_samples=True,
            )
        except InputError as error:
            raise InputError(f"task {task}: {error}") from error
        except ValueError as error:
            if "unsafe" not in str(error):
                raise
            raise InputError(
                f"task {task} runs what the model writes, which fq tasks never does; use `lm-eval run --model "
                "flexquant` in a sandbox of yours"
            ) from error
        samples = results["samples"][task]
        self._prompts[task] = [sample["arguments"][0][0] for sample in samples[:_PROMPTS_OF_A_TASK]]
        return _row(one, task, samples, time.process_time() - began, self._threads(one))

    def _times(self) -> list[TaskTimeRow]:
        policies = {
            one.name: Timed(one.servable, one.kl_weight, one.sha256) for one in self.asked if one.servable is not None
        }
        num_tokens, threads = self._options.timed_tokens, self._options.threads
        if not num_tokens or not policies:
            return []
        room = self.model.max_context - num_tokens
        texts = [text for task in self._options.tasks for text in self._prompts[task]]
        encoded = [self.model.token_text.encode(text)[-room:] for text in texts]
        prompts = [torch.tensor(ids) for ids in encoded if ids]
        if not prompts:
            say("no policy is timed: every prompt of these tasks is empty")
            return []
        digest = timing_sha256(
            self._options.profile or profile_beside(self._options.model), threads, prompts, num_tokens
        )
        kept = {_time_key(row): row for row in read_rows(self._out, TaskTimeRow)}
        wanted = [(name, timed.policy_sha256, timed.kl_weight, digest) for name, timed in policies.items()]
        if not all(key in kept for key in wanted):  # shares are of one run, in which all took turns
            if kept:
                say("timing anew: policies, prompts, profile, --threads or --timed-tokens are others than before")
            rows = time_policies(
                policies, prompts, max_new_tokens=num_tokens + 1, num_threads=threads, timing_sha256=digest
            )
            save_rows(self._out, rows, TaskTimeRow)
            return rows
        return [kept[key] for key in wanted]

    def facts(self) -> dict[str, object]:
        """What was run, for the report."""
        options = self._options
        return {
            "model": _model_name(options),
            "documents of a task at most": "all" if options.limit is None else options.limit,
            "chat template": options.chat,
            "text": [path.name for path in options.text] or "held-out standard library",
            "code": [path.name for path in options.code] or "held-out standard library",
            "GSM8K": [path.name for path in options.gsm8k] or "not asked",
            "threads": options.threads or "the decoder's choice",
            "processor": cpu_name(),
        }


_Key = tuple[str, str, float | None, int | None, str]


def _key(row: TaskRow) -> _Key:
    return row.policy, row.policy_sha256, row.kl_weight, row.threads, row.task


def _time_key(row: TaskTimeRow) -> tuple[str, str, float | None, str]:
    return row.policy, row.policy_sha256, row.kl_weight, row.timing_sha256


def _other(row: TaskRow, one: _Asked) -> str:
    """In what a row of the same name and dial is not the one that is asked for."""
    if row.policy_sha256 == one.sha256:
        return "other --threads"
    return "another --reference" if one.kind == "full" else "a policy that was another one then"


def _kept_prompts(path: Path) -> dict[str, list[str]]:
    """The prompts of each task that has been asked; InputError if the file is damaged."""
    try:
        kept = read_json(path) if path.is_file() else {}
        if not all(isinstance(text, str) for texts in kept.values() for text in texts):
            raise TypeError("a prompt is no text")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and run fq tasks again") from error
    return dict(kept)


def _row(one: _Asked, task: str, samples: Sequence[dict[str, Any]], cpu_seconds: float, threads: int | None) -> TaskRow:
    """What the harness logged of every document as a row."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    chosen = _FILTER if _FILTER in filters else filters[0]
    samples = [sample for sample in samples if sample["filter"] == chosen]
    numbers = [name for name in samples[0]["metrics"] if isinstance(samples[0][name], int | float)]
    if not numbers:
        raise InputError(f"task {task} gives no number for each document, so policies cannot be compared on it")
    metric = next((name for name in _METRICS if name in numbers), numbers[0])
    scores = tuple(float(sample[metric]) for sample in samples)
    sources = [str(sample["doc"].get(SOURCE, place)) for place, sample in enumerate(samples)]
    groups = tuple(map([*dict.fromkeys(sources)].index, sources))
    low, high = score_interval(scores, groups)
    return TaskRow(
        policy=one.name,
        kind=one.kind,
        policy_sha256=one.sha256,
        kl_weight=one.kl_weight,
        threads=threads,
        verify_width=one.verify_width,
        task=task,
        metric=metric,
        score=sum(scores) / len(scores),
        score_low=low,
        score_high=high,
        document_ids=tuple(str(sample["doc_hash"])[:_DIGEST_CHARS] for sample in samples),
        document_groups=groups,
        document_scores=scores,
        answers=tuple(_digest(sample["resps"]) for sample in samples),
        cpu_seconds=cpu_seconds,
    )


def _digest(answer: Any) -> str:
    return json_sha256(answer)[:_DIGEST_CHARS]
