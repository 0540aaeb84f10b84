"""`fq analyse`: what quantisation strategies lose, where and when, as a report with pictures and rows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexquant_rl.agents.analysis.peers import check_peers
from flexquant_rl.agents.analysis.report import write_analysis
from flexquant_rl.agents.analysis.rows import PLAN_FILE, Plan, RowStore, StrategyRow, TimeRow, times_by_row
from flexquant_rl.agents.analysis.run import AnalysedText, Analysis, goes_on
from flexquant_rl.agents.analysis.strategies import STORED, default_strategies, parse_strategy
from flexquant_rl.agents.commands.options import AnalyseOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.progress import say
from flexquant_rl.agents.runs.run import locked_run
from flexquant_rl.engine.checkpoint import is_nested_model, load_model
from flexquant_rl.engine.context_length import max_context
from flexquant_rl.engine.decoding.options import check_num_threads
from flexquant_rl.engine.embedded import DEFAULT_MODEL, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import file_sha256, json_sha256
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import NestedCausalLM, make_units
from flexquant_rl.engine.nesting import give_reference
from flexquant_rl.engine.plain_model import check_finite
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.quantisation.rotation import check_rotatable, why_not_rotatable
from flexquant_rl.engine.quantisation.tuning import default_steps
from flexquant_rl.engine.quantisation.unfinished import weights_sha256
from flexquant_rl.fq_env.calibration_text import CalibrationText
from flexquant_rl.fq_env.prompts import load_windows, spread
from flexquant_rl.fq_env.text_files import is_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The first token of a window has no past; its output is not judged.
_FIRST = 1
# Single matrices are many: they are measured at the width that is nearest to this one.
_PART_WIDTH = 4
_LEAST_TOKENS = 8
_STDLIB = "Python standard library"
_PRINTED = (
    "strategy",
    "group_size",
    "bit_width",
    "output_kl_nats",
    "output_kl_p99_nats",
    "perplexity",
    "top1_agreement",
    "bytes_per_weight",
)


def analyse(options: AnalyseOptions) -> None:
    """Measures what is missing, writes report and pictures, prints the main numbers."""
    began = time.perf_counter()
    if options.from_rows is not None:
        given = options.model or _differing(options)
        if given:
            raise InputError(f"--from-rows {options.from_rows} measures nothing; leave {given} out")
        _finish(RowStore(options.from_rows), began)
        return
    _check(options)
    source = _source(options)
    # Before anything is written: what is bad input leaves nothing behind.
    text = _text(options, source)
    plan, fitted_to, names = _plan(options, source, text)
    store = RowStore(options.out or Path(f"analysis-{Path(source.name).name}"))
    _claim(store, plan)
    with goes_on(), locked_run(store.directory):
        examined = _examined(options, names)
        Analysis(store, plan, text, source.path, fitted_to, source.reference, examined, options.peers).run(names)
        _finish(store, began, examined)


def _differing(options: AnalyseOptions) -> str | None:
    """The first option beside --from-rows that says what to measure."""
    fixed = AnalyseOptions(from_rows=options.from_rows)
    differing = (field.name for field in fields(options) if getattr(options, field.name) != getattr(fixed, field.name))
    name = next(differing, None)
    return None if name is None else f"--{name.replace('_', '-')}"


@dataclass(frozen=True, eq=False)
class _Source:
    """A model, as far as it must be known before anything is measured."""

    name: str
    path: str
    is_nested: bool
    reference: str | None
    tokenizer: PreTrainedTokenizerBase
    context: int
    sha256: str
    num_parameters: int
    num_weights: int
    bit_widths: tuple[int, ...]
    rotatable: bool = False


def _check(options: AnalyseOptions) -> None:
    """What can be found out at once."""
    if options.model is None:
        raise InputError("no MODEL is given, and no --from-rows; name a directory, a hub name or default")
    for name, least in (("windows", 1), ("window_tokens", _LEAST_TOKENS)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}")
    if options.tune_steps is not None and options.tune_steps < 1:
        raise InputError(
            f"--tune-steps {options.tune_steps} must be at least 1; leave strategies that tune out instead"
        )
    if options.threads is not None:
        check_num_threads(options.threads)
    if options.peers:
        check_peers()
    QuantizationConfig(bit_widths=options.bit_widths).validate()
    for name in options.strategies:
        parse_strategy(name)
    if options.examine is not None and options.examine != STORED:
        wanted = parse_strategy(options.examine).name
        if options.strategies and wanted not in {parse_strategy(name).name for name in options.strategies}:
            raise InputError(f"--examine {options.examine} is none of --strategies; name it there too")
    CalibrationText(options.calibration, options.calibration_weights).check()
    out = options.out
    if (
        out is not None
        and out.exists()
        and not (out / PLAN_FILE).is_file()
        and (not out.is_dir() or any(out.iterdir()))
    ):
        raise InputError(f"{out} exists and is no analysis; choose another --out")


def _source(options: AnalyseOptions) -> _Source:
    """Loads the model once, to know it; each strategy loads it again."""
    assert options.model is not None, "checked"
    path = resolve_model(options.model)
    name = "tiny-code-llama" if options.model == DEFAULT_MODEL else options.model
    if is_nested_model(path):
        if options.strategies or options.examine not in (None, STORED):
            what = "--strategies" if options.strategies else "--examine"
            raise InputError(
                f"{options.model} is a nested checkpoint, which has one strategy, as it is stored; leave {what} out, "
                "or give the model that it was made from"
            )
        if options.peers and options.reference is None:
            raise InputError(
                f"{options.model} is a nested checkpoint, and --peers quantises unquantised weights; name the model "
                "that it was made from with --reference"
            )
        model = load_model(path)
        if len(model.bit_widths) == 1:
            raise InputError(
                f"{options.model} stores width {model.bit_widths[0]} alone, so there is nothing to compare; "
                "quantise it with more --bit-widths"
            )
        return _nested_source(name, path, model, options.reference)
    if options.reference is not None:
        raise InputError(f"{options.model} is no nested checkpoint and is judged against itself; leave --reference out")
    hf_model, tokenizer = load_causal_lm(path)
    if any(parse_strategy(name).rotated for name in options.strategies):
        check_rotatable(hf_model.config)
    for parameter_name, parameter in hf_model.named_parameters():
        check_finite(parameter_name, parameter)
    weights = sum(unit.num_weights for unit in make_units(hf_model, QuantizationConfig()))
    parameters = hf_model.num_parameters()
    digest, rotatable = weights_sha256(hf_model), why_not_rotatable(hf_model.config) is None
    context, widths = max_context(hf_model), options.bit_widths
    return _Source(name, path, False, None, tokenizer, context, digest, parameters, weights, widths, rotatable)


def _nested_source(name: str, path: str, model: NestedCausalLM, reference: str | None) -> _Source:
    """A nested checkpoint, judged against its own 8 bits or against the model that it was made from."""
    weights, digest = int(model.unit_weights.sum()), model.fingerprint
    if reference is not None:
        reference = resolve_model(reference)
        if is_nested_model(reference):
            raise InputError(
                f"--reference {reference} is a nested checkpoint; give the model that {name} was made from"
            )
        hf_model, _ = load_causal_lm(reference)
        digest = json_sha256([digest, weights_sha256(hf_model)])
        give_reference(model, hf_model)  # refuses another model before anything is written
    return _Source(
        name, path, True, reference, model.tokenizer, model.max_context, digest, weights, weights, model.bit_widths
    )


def _text(options: AnalyseOptions, source: _Source) -> AnalysedText:
    """Windows of the test split, as many from each file."""
    length = min(options.window_tokens, source.context) + 1
    if options.text_field is not None and not any(map(is_jsonl, (*options.text, *options.calibration))):
        raise InputError(f"--text-field {options.text_field}: no file is a .jsonl file; leave --text-field out")
    files: Sequence[tuple[Path, ...]] = [(path,) for path in options.text] or [()]
    if options.windows < len(files):
        raise InputError(f"--windows {options.windows} leaves some of {len(files)} files unread; give one for each")
    parts: list[Tensor] = []
    sources: list[str] = []
    documents: list[int] = []
    for index, group in enumerate(files):
        field = options.text_field if any(map(is_jsonl, group)) else None
        loaded = load_windows(
            source.tokenizer, length, group, text_field=field, shorter="shorter windows with --window-tokens"
        )
        count = options.windows // len(files) + (index < options.windows % len(files))
        chosen = spread(loaded.test, count)
        before = max(documents, default=-1) + 1
        documents += [before + document for document in spread(loaded.documents("test"), count).tolist()]
        sources += [group[0].name if group else _STDLIB] * len(chosen)
        parts.append(chosen)
    return AnalysedText(torch.cat(parts), tuple(sources), tuple(documents))


def _plan(
    options: AnalyseOptions, source: _Source, text: AnalysedText
) -> tuple[Plan, CalibrationText, tuple[str, ...]]:
    """What results depend on, what strategies are fitted to, and their names."""
    given = options.strategies or default_strategies(source.num_weights, rotatable=source.rotatable)
    names = (STORED,) if source.is_nested else tuple(parse_strategy(name).name for name in given)
    strategies = [] if source.is_nested else [parse_strategy(name) for name in names]
    fitted_to = CalibrationText(options.calibration or options.text, options.calibration_weights, options.text_field)
    fitted_to.check()
    tune_steps = options.tune_steps or default_steps(source.num_parameters)
    if any(one.calibrated for one in strategies):  # found out now, not after the strategies before
        fitted_to.fitting_windows(source.tokenizer, source.context, tune_steps)
    if any(one.tuned for one in strategies):
        fitted_to.held_out_windows(source.tokenizer, source.context)
    plan = Plan(
        model=source.name,
        model_sha256=source.sha256,
        num_weights=source.num_weights,
        nested=source.is_nested,
        reference=f"{max(source.bit_widths)}-bit" if source.is_nested and source.reference is None else "unquantised",
        bit_widths=source.bit_widths,
        text=tuple(path.name for path in options.text),
        windows_sha256=hashlib.sha256(text.windows.numpy().tobytes()).hexdigest(),
        num_windows=len(text.windows),
        window_tokens=text.windows.shape[1] - 1,
        first=_FIRST,
        calibration=tuple(path.name for path in fitted_to.files),
        calibration_sha256=_content_sha256(fitted_to),
        calibration_weights=options.calibration_weights,
        tune_steps=tune_steps,
        threads=options.threads,
        part_width=min(source.bit_widths, key=lambda width: abs(width - _PART_WIDTH)),
    )
    return plan, fitted_to, names


def _content_sha256(fitted_to: CalibrationText) -> str:
    """Digest of what strategies are fitted to: a file may have got another content under its old name."""
    content = [[file_sha256(path) for path in fitted_to.files], fitted_to.text_field]
    return json_sha256(content)


def _examined(options: AnalyseOptions, names: tuple[str, ...]) -> str:
    return names[-1] if options.examine in (None, STORED) else parse_strategy(str(options.examine)).name


def _claim(store: RowStore, plan: Plan) -> None:
    """Makes the directory, or finds the same plan there."""
    if not (store.directory / PLAN_FILE).is_file():
        store.directory.mkdir(parents=True, exist_ok=True)
        store.write_plan(plan)
        return
    there = asdict(store.read_plan(to_continue=True))
    for name, value in asdict(plan).items():
        if there[name] != value:
            raise InputError(
                f"{store.directory} holds an analysis with {name} {_short(there[name])}, but this one has "
                f"{_short(value)}; give the same options, or another --out"
            )
    say(f"{store.directory} is there already; what it has is not measured again")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _finish(store: RowStore, began: float, examined: str | None = None) -> None:
    written = write_analysis(store, examined)
    found = store.read(StrategyRow)
    clock = {key: row.measured_ms for key, row in times_by_row(found, store.read(TimeRow)).items()}
    rows = [
        {
            **{name: getattr(row, name) for name in _PRINTED},
            "measured_ms": clock.get((row.strategy, row.bit_width)),
        }
        for row in found
    ]
    print_result(
        {
            "out": str(store.directory),
            "report": str(written),
            "seconds": time.perf_counter() - began,
            "rows": rows,
        }
    )
