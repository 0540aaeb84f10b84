"""`fq quantize`: a model in, a nested checkpoint out, perplexity by width on request."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flexquant_rl.agents.commands.options import QuantizeOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.progress import track
from flexquant_rl.engine.checkpoint import is_nested_checkpoint, save_checkpoint
from flexquant_rl.engine.embedded import DEFAULT_MODEL, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import check_new_directory
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import NestedCausalLM, max_context, nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.quantisation.perplexity import perplexity_by_width
from flexquant_rl.fq_env.prompts import cut_windows, file_documents, load_windows, spread, thinned
from flexquant_rl.fq_env.stdlib_text import stdlib_text
from flexquant_rl.fq_env.text_files import is_jsonl

# Tokens of a calibration window, and windows at most: 16,384 tokens are 23 for each input of the embedded model's
# widest linear.
_CALIBRATION_WINDOW, _CALIBRATION_WINDOWS = 256, 64
_TEXT_WINDOWS = 32


def quantize(options: QuantizeOptions) -> None:
    """Nests the weights and prints what the checkpoint holds."""
    check_new_directory(options.out)
    calibration, text = options.calibration, options.text
    chosen = options.method or ("gptq" if calibration else "rtn")
    config = QuantizationConfig(chosen, options.group_size, options.bit_widths, options.unit, options.quantize_head)
    config.validate()
    if options.text_field is not None and not any(map(is_jsonl, (*calibration, *text))):
        raise InputError(f"--text-field {options.text_field}: no file is a .jsonl file; leave --text-field out")
    path = resolve_model(options.source)
    if is_nested_checkpoint(Path(path)):
        raise InputError(f"{options.source} is a nested checkpoint already; give the model that it was made from")
    calibrated = bool(calibration) or chosen == "gptq"
    if calibrated and not calibration and Path(path).resolve() != Path(resolve_model(DEFAULT_MODEL)).resolve():
        raise InputError("--method gptq fits the weights to text; give it some with --calibration FILE")
    began = time.perf_counter()
    hf_model, tokenizer = load_causal_lm(path)
    tokens = min(_CALIBRATION_WINDOW, max_context(hf_model))
    model = nest(
        hf_model,
        tokenizer,
        config,
        keep_reference=bool(text),  # perplexity is compared with it; nothing else reads it
        calibration=_calibration_windows(tokenizer, options, tokens) if calibrated else None,
        progress=lambda items: track(items, "quantising"),
    )
    windows = _text_windows(model, options) if text else None  # bad text must not leave a checkpoint behind
    result: dict[str, object] = {"out": str(options.out), "bytes": save_checkpoint(model, options.out)}
    result["seconds"] = time.perf_counter() - began
    if model.calibration is not None:
        result["calibration_tokens"] = model.calibration.num_tokens
    if windows is not None:
        result["perplexity_by_width"] = perplexity_by_width(model, windows)
    print_result(result)


def _calibration_windows(tokenizer: PreTrainedTokenizerBase, options: QuantizeOptions, tokens: int) -> Tensor:
    """Windows of the training split of some text, `[n, tokens]` int64; no file stands for the standard library."""
    files = options.calibration
    for path in files:
        if not path.is_file():
            raise InputError(f"{path} is not a file; --calibration takes text files")
    documents = (
        file_documents(files, tokenizer=tokenizer, text_field=_field(files, options))["train"]
        if files
        else list(stdlib_text("policy-train").values())
    )
    chosen = thinned(tokenizer, documents, tokens, tokens - 1, _CALIBRATION_WINDOWS)
    windows, _ = cut_windows(tokenizer, chosen, tokens, tokens - 1)
    if not len(windows):
        raise InputError(
            f"the calibration text's training split ({sum(map(len, documents))} characters) holds no window of "
            f"{tokens} tokens; give more text with --calibration FILE"
        )
    return spread(windows, _CALIBRATION_WINDOWS)


def _field(files: tuple[Path, ...], options: QuantizeOptions) -> str | None:
    """The field of the text in these files: none where they have no rows, as one set of two may."""
    return options.text_field if any(map(is_jsonl, files)) else None


def _text_windows(model: NestedCausalLM, options: QuantizeOptions, tokens: int = 129) -> Tensor:
    """Windows of the test split of some text, `[n, tokens]` int64."""
    return spread(
        load_windows(
            model.tokenizer, min(tokens, model.max_context), options.text, text_field=_field(options.text, options)
        ).test,
        _TEXT_WINDOWS,
    )
