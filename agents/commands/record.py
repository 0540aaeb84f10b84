"""`fq record`: traces of a model, from which policies of drafts are trained and judged without it."""

from __future__ import annotations

import time

from flexquant_rl.agents.commands.options import RecordOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.evaluation.drafting import acceptance
from flexquant_rl.agents.progress import track
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.recording import check_plan
from flexquant_rl.engine.control.recording import record as record_plan
from flexquant_rl.engine.control.traces import RecordingPlan, check_directory, read_traces
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.decoding.options import check_decoder_name, check_num_threads
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.recording_prompts import plan_sequences
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
        progress=lambda items: track(items, "quantising"),
    )
    plan = RecordingPlan(
        fingerprint=nested.fingerprint,
        decoder=default_decoder(nested)[0] if options.decoder == "auto" else options.decoder,
        verify_width=options.verify_width,
        draft_widths=tuple(sorted(set(options.widths))),
        depth=options.depth,
        max_new_tokens=options.max_new_tokens,
        eos_token_ids=tuple(nested.eos_token_ids),
        sequences=(),
    )
    check_plan(plan, nested)
    sequences = plan_sequences(
        nested,
        options.text,
        num_sequences=-(-options.tokens // options.max_new_tokens),
        prompt_tokens=options.prompt_tokens,
        text_field=options.text_field,
    )
    plan = plan.of_sequences(sequences)
    made = record_plan(plan, nested, options.out, num_threads=options.threads, progress=track)
    table = TraceTable(read_traces(options.out), range(len(sequences)))
    mean = acceptance(table).mean_by_level()
    print_result(
        {
            "out": str(options.out),
            "decoder": plan.decoder,
            "num_sequences": len(sequences),
            "num_sequences_made_now": made,
            "num_tokens": int(table.num_tokens.sum()),
            "acceptance_by_width": dict(zip(map(str, plan.draft_widths), mean.tolist(), strict=True)),
            "seconds": time.monotonic() - began,
        }
    )
