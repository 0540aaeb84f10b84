"""`fq profile`: what every unit's width costs in time on this device and in output KL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flexquant_rl.agents.commands.options import ProfileOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.progress import track
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.artefact import PROFILE_FILE
from flexquant_rl.engine.control.cost import CostTable, measured_cost, roofline_cost
from flexquant_rl.engine.control.profile import profile_model
from flexquant_rl.engine.control.step_timer import MAX_PAIRS, StepTimer, measured_controller_ms
from flexquant_rl.engine.decoding.choice import open_session
from flexquant_rl.engine.decoding.options import check_num_threads
from flexquant_rl.engine.embedded import DEFAULT_MODEL, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.prompts import PROFILE_WINDOWS, load_windows, spread


def profile(options: ProfileOptions) -> None:
    """Writes the profile and prints what it says."""
    home = Path() if options.model == DEFAULT_MODEL else Path(options.model)
    if options.out is None and not home.is_dir():
        raise InputError(
            f"{options.model} is not a directory to write {PROFILE_FILE} into; check the name, or give --out FILE"
        )
    if options.threads is not None:
        if options.source == "roofline":
            raise InputError(
                f"--threads {options.threads} is for measured steps and --source roofline times none; leave it out"
            )
        check_num_threads(options.threads)
    target = options.out or home / PROFILE_FILE
    nested = load_model(
        resolve_model(options.model), QuantizationConfig(), progress=lambda items: track(items, "quantising")
    )
    windows = load_windows(
        nested.tokenizer,
        min(EnvConfig().window_tokens, nested.max_context + 1),
        options.text,
        text_field=options.text_field,
    ).train
    profiled = spread(windows, PROFILE_WINDOWS)[:, :-1]
    cost = _measured(nested, windows, options) if options.source == "measured" else roofline_cost(nested)
    result = profile_model(nested, profiled, cost, progress=lambda units: track(units, "profiling"))
    result.save(target)
    by_width = {str(b): float(cost.latency_ms(torch.full((nested.num_units,), b))) for b in nested.bit_widths}
    print_result(
        {
            "profile": str(target),
            "source": options.source,
            "decoder": cost.decoder,
            "num_threads": cost.num_threads,
            "latency_ms_by_width": by_width,
            "table_error_p50": cost.error_p50,
            "table_error_p95": cost.error_p95,
            "controller_ms": cost.controller_ms,
            "sensitivity": result.sensitivity.tolist(),
        }
    )


def _measured(nested: NestedCausalLM, windows: Tensor, options: ProfileOptions) -> CostTable:
    """Latencies of steps on this device, and of a controller beside them."""
    # Halfway through an episode, so that attention costs what it costs on average.
    num_held = max(1, min(windows.shape[1] // 2, nested.max_context - MAX_PAIRS))
    session = open_session(nested, max_length=num_held + MAX_PAIRS, num_threads=options.threads)
    prompt = session.prefill(windows[:1, :num_held])
    timer = StepTimer(session, windows[0, :1])
    cost = measured_cost(nested, timer, num_steps=options.steps, num_threads=options.threads)
    return replace(cost, controller_ms=measured_controller_ms(session, prompt, windows[0, :1]))
