"""`fq record`: traces of a model, from which policies of drafts are trained and judged without it."""

from __future__ import annotations

import time

from flexquant_rl.agents.commands.options import RecordOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.evaluation.drafting import acceptance
from flexquant_rl.agents.policies.draft_levels import mixed_levels
from flexquant_rl.agents.preparation import profile_beside
from flexquant_rl.agents.progress import track
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.recording import record as record_plan
from flexquant_rl.engine.control.traces import check_directory, read_traces
from flexquant_rl.engine.decoding.options import check_decoder_name, check_num_threads
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.recording_prompts import plan_recording
from flexquant_rl.fq_env.trace_table import TraceTable


def record(options: RecordOptions) -> None:
    """Records what is missing and prints how far drafts agree."""
    began = time.monotonic()
    check_decoder_name(options.decoder)
    check_num_threads(options.threads)
    for name in ("tokens", "prompt_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    check_directory(options.out)
    nested = load_model(
        resolve_model(options.model),
        QuantizationConfig(),
        keep_reference=False,
        progress=track,
    )
    plan = plan_recording(
        nested,
        options.text,
        decoder=options.decoder,
        verify_width=options.verify_width,
        widths=options.widths,
        mixed=mixed_levels(nested, options.widths, options.profile or profile_beside(options.model)),
        depth=options.depth,
        tokens=options.tokens,
        prompt_tokens=options.prompt_tokens,
        max_new_tokens=options.max_new_tokens,
        text_field=options.text_field,
    )
    made = record_plan(plan, nested, options.out, num_threads=options.threads, progress=track)
    table = TraceTable(read_traces(options.out), range(len(plan.sequences)))
    mean = acceptance(table).mean_by_level()
    print_result(
        {
            "out": str(options.out),
            "decoder": plan.decoder,
            "num_sequences": len(plan.sequences),
            "num_sequences_made_now": made,
            "num_tokens": int(table.num_tokens.sum()),
            "acceptance_by_width": dict(zip(map(str, plan.draft_widths), mean.tolist(), strict=True)),
            "seconds": time.monotonic() - began,
        }
    )
