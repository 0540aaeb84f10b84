"""`fq profile`: what every unit's width costs in time and in output KL, and what drafts and passes take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from flexquant_rl.agents.commands.options import ProfileOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.clock_check import warn_of_clock
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.artefact import PROFILE_FILE
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.draft_timer import check_depth, profiled_drafts
from flexquant_rl.engine.control.draft_times import DraftTimes
from flexquant_rl.engine.control.profile import profile_model
from flexquant_rl.engine.control.step_timer import measured_table
from flexquant_rl.engine.decoding.options import check_num_threads
from flexquant_rl.engine.embedded import DEFAULT_MODEL, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.prompts import load_windows, profile_windows

_DEPTH = 8


def profile(options: ProfileOptions) -> None:
    """Writes the profile and prints what it says."""
    home = Path() if options.model == DEFAULT_MODEL else Path(options.model)
    if options.out is None and not home.is_dir():
        raise InputError(
            f"{options.model} is not a directory to write {PROFILE_FILE} into; check the name, or give --out FILE"
        )
    for name in ("threads", "depth"):
        given = getattr(options, name)
        if given is not None and options.source == "roofline":
            raise InputError(f"--{name} {given} is for measured steps and --source roofline times none; leave it out")
    if options.threads is not None:
        check_num_threads(options.threads)
    depth = _DEPTH if options.depth is None else options.depth
    check_depth(depth)
    target = options.out or home / PROFILE_FILE
    nested = load_model(resolve_model(options.model), QuantizationConfig(), progress=track)
    windows = load_windows(
        nested.tokenizer,
        min(EnvConfig().window_tokens, nested.max_context + 1),
        options.text,
        text_field=options.text_field,
    ).train
    profiled = profile_windows(nested, windows)
    drafts: DraftTimes | None = None
    if options.source == "measured":
        cost = measured_table(nested, windows, num_steps=options.steps, num_threads=options.threads)
        if depth:
            say("timing drafts and passes over several tokens")
            drafts = profiled_drafts(nested, depth=depth, num_threads=options.threads)
    else:
        cost = roofline_cost(nested)
    if drafts is not None:
        warn_of_clock(drafts.costs, "run fq profile again when the machine is quiet")
    result = profile_model(nested, profiled, cost, progress=lambda units: track(units, "profiling"))
    result = replace(result, drafts=drafts)
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
            "drafts": None if drafts is None else drafts.shares(),
            "sensitivity": result.sensitivity.tolist(),
        }
    )
