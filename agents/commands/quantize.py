"""`fq quantize`: a model in, a nested checkpoint out; with text fitted to it, perplexity by width on request."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from flexquant_rl.agents.commands.options import QuantizeOptions
from flexquant_rl.agents.commands.process import peak_memory_bytes, print_result
from flexquant_rl.agents.config import check_device
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.run import locked_run
from flexquant_rl.engine.checkpoint import is_nested_model, save_checkpoint
from flexquant_rl.engine.context_length import max_context
from flexquant_rl.engine.embedded import DEFAULT_MODEL, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import check_new_directory
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig, TuningConfig
from flexquant_rl.engine.quantisation.perplexity import perplexity_by_width
from flexquant_rl.engine.quantisation.rotation import why_not_rotatable
from flexquant_rl.engine.quantisation.tuning import default_learning_rate, default_steps, tune_pairs
from flexquant_rl.engine.quantisation.unfinished import (
    STATE_FILE,
    nested_start,
    removed_when_over,
    unfinished_directory,
)
from flexquant_rl.fq_env.calibration_text import CalibrationText
from flexquant_rl.fq_env.prompts import load_windows, spread
from flexquant_rl.fq_env.text_files import is_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT_WINDOWS = 32


def quantize(options: QuantizeOptions) -> None:
    """Nests the weights and prints what the checkpoint holds."""
    check_new_directory(options.out)
    check_device(options.device)
    calibration, text = options.calibration, options.text
    fitted_to = CalibrationText(calibration, options.calibration_weights, options.text_field)
    fitted_to.check()
    config = _config(options)
    chosen = config.method
    if options.text_field is not None and not any(map(is_jsonl, (*calibration, *text))):
        raise InputError(f"--text-field {options.text_field}: no file is a .jsonl file; leave --text-field out")
    path = resolve_model(options.source)
    if is_nested_model(path):
        raise InputError(f"{options.source} is a nested checkpoint already; give the model that it was made from")
    steps = options.tune_steps
    if steps is not None and steps < 0:
        raise InputError(f"--tune-steps {steps} must be 0 or more; 0 tunes nothing")
    calibrated = bool(calibration) or chosen == "gptq" or bool(steps)
    if calibrated and not calibration and Path(path).resolve() != Path(resolve_model(DEFAULT_MODEL)).resolve():
        what = "--method gptq fits the weights" if chosen == "gptq" else f"--tune-steps {steps} fits scales"
        raise InputError(f"{what} to text; give it some with --calibration FILE")
    began = time.perf_counter()
    hf_model, tokenizer = load_causal_lm(path)
    if options.rotate == "auto" and chosen == "gptq":
        reason = why_not_rotatable(hf_model.config, nests_head=config.quantize_head)
        config = replace(config, rotate=reason is None)
        if reason is not None:
            say(f"not rotated: {reason}")
    hf_model.to(options.device)  # type: ignore[arg-type]
    num_weights = hf_model.num_parameters()
    if steps is None:
        steps = default_steps(num_weights) if calibrated else 0
    context = max_context(hf_model)
    # All text is read before anything takes long: what is wrong with it should not be found out after an hour.
    judged = _text_windows(tokenizer, context, options) if text else None
    fitted, windows = fitted_to.fitting_windows(tokenizer, context, steps) if calibrated else (None, None)
    if not steps:
        model = nest(
            hf_model,
            tokenizer,
            config,
            keep_reference=bool(text),  # perplexity is compared with it; nothing else reads it
            calibration=fitted,
            progress=track,
        )
        _finish(model, options, fitted_to, judged, began, {})
        return
    assert windows is not None, "tuning is calibrated"
    held_out = fitted_to.held_out_windows(tokenizer, context)
    directory = unfinished_directory(options.out)
    with locked_run(directory), removed_when_over(directory):
        fitted = fitted if calibration or chosen == "gptq" else None  # rtn without a file stays data-free
        model = nested_start(directory, hf_model, tokenizer, config, fitted, progress=track)
        state_file = directory / STATE_FILE
        tuning = TuningConfig(steps, default_learning_rate(num_weights))
        tuning_s = tune_pairs(model, windows, held_out, tuning, state_file=state_file, report=say)
        _finish(model, options, fitted_to, judged, began, {"tuning_seconds": tuning_s})


def _config(options: QuantizeOptions) -> QuantizationConfig:
    """What is asked for; whether a model is rotated by itself is known once it is loaded."""
    config = QuantizationConfig(
        options.method or ("gptq" if options.calibration else "rtn"),
        options.group_size,
        options.bit_widths,
        options.unit,
        options.quantize_head,
        options.width_weights,
        options.rotate == "yes",
    )
    config.validate()
    return config


def _finish(
    model: NestedCausalLM,
    options: QuantizeOptions,
    fitted_to: CalibrationText,
    judged: Tensor | None,
    began: float,
    facts: dict[str, object],
) -> None:
    """Writes the checkpoint and prints what it holds, what it cost and what that gained.

    `judged`, `[n, T]`, is what perplexity is measured on. The checkpoint is written last, for it ends the command.
    """
    perplexity = None if judged is None else perplexity_by_width(model, judged)
    if model.calibration is not None:
        model.calibration = fitted_to.facts(model.calibration)
    result: dict[str, object] = {"out": str(options.out), "bytes": save_checkpoint(model, options.out)}
    result["seconds"] = time.perf_counter() - began
    result["peak_memory_bytes"] = peak_memory_bytes()
    if model.calibration is not None:
        result["calibration_tokens"] = model.calibration.num_tokens
    if model.tuning is not None:
        result["tuning_steps"] = model.tuning.steps
        result |= facts
        result["output_kl_nats_before_tuning"] = model.tuning.output_kl_before
        result["output_kl_nats"] = model.tuning.output_kl_after
    if perplexity is not None:
        result["perplexity_by_width"] = perplexity
    print_result(result)


def _text_windows(
    tokenizer: PreTrainedTokenizerBase, context: int, options: QuantizeOptions, tokens: int = 129
) -> Tensor:
    """Windows of the test split of some text, `[n, tokens]` int64."""
    field = options.text_field if any(map(is_jsonl, options.text)) else None  # the calibration's, where these have none
    windows = load_windows(tokenizer, min(tokens, context), options.text, text_field=field)
    return spread(windows.test, _TEXT_WINDOWS)
