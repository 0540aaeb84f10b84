"""`fq evaluate`: policies side by side on the test split of some text."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flexquant_rl.agents.commands.contestants import AskedPolicies, check_counts
from flexquant_rl.agents.commands.options import EvaluateOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.config import TrainConfig, check_config
from flexquant_rl.agents.evaluation.comparison import compare_by_both_clocks, families
from flexquant_rl.agents.evaluation.contest import compete
from flexquant_rl.agents.evaluation.equal_time import Rung
from flexquant_rl.agents.evaluation.figures import plot_pareto
from flexquant_rl.agents.evaluation.references import named_in_flight_rows
from flexquant_rl.agents.evaluation.report import PARETO_FILE, console_table, write_report
from flexquant_rl.agents.evaluation.rows import ROWS_FILE, EvalRow, public_dict, write_rows
from flexquant_rl.agents.policies.families import STATIC
from flexquant_rl.agents.preparation import Prepared, prepare
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.files import check_new_directory, new_directory


def evaluate(options: EvaluateOptions) -> None:
    """Prints the table and the rows."""
    config = TrainConfig(
        model=options.model,
        text=tuple(map(str, options.text)),
        text_field=options.text_field,
        env=options.env,
        device=options.device,
        profile=None if options.profile is None else str(options.profile),
        latency=options.latency,
        threads=options.threads,
        test_sequences=options.sequences,
        num_dials=options.dials,
    )
    check_counts(options.sequences, options.dials)
    check_config(config)
    asked = AskedPolicies.read(options.policy, may_choose_in_flight=True)
    if options.out is not None:
        check_new_directory(options.out)
    prepared = prepare(replace(config, quantization=asked.quantization or config.quantization), None, asked.carrying)
    contestants = [one for _, one in asked.bound(prepared, options.dials)]
    in_flight = list(asked.in_flight.values())
    rungs: list[Rung] = []
    rows = compete(
        prepared,
        contestants,
        options.sequences,
        lambda: named_in_flight_rows(prepared, options.sequences, in_flight),
        rungs.extend,
    )
    print(console_table(rows))
    found = [compare_by_both_clocks(rows, family, (STATIC.name,)) for family in families(rows)]
    findings = [comparison.sentence() for by_both in found for comparison in by_both]
    print(*(f"{finding}." for finding in findings), sep="\n", end="\n\n")
    if options.out is not None:
        _write(options.out, prepared, options, rows, rungs, findings)
    print_result(
        {
            "latency_source": prepared.cost.source,
            "reference": reference_name(prepared.model),
            "findings": findings,
            "rows": [public_dict(row) for row in rows],
            "out": None if options.out is None else str(options.out),
        }
    )


def _write(
    out: Path,
    prepared: Prepared,
    options: EvaluateOptions,
    rows: Sequence[EvalRow],
    rungs: Sequence[Rung],
    findings: Sequence[str],
) -> None:
    """Leaves the report, its rows and the picture of both modes."""
    name, text, source = Path(resolve_model(options.model)).name, prepared.windows.source, prepared.cost.source
    tokens = prepared.env.max_new_tokens
    with new_directory(out) as directory:
        write_rows(directory / ROWS_FILE, rows)
        plot_pareto(
            rows,
            directory / PARETO_FILE,
            title="Output KL at equal time",
            caption=f"{name}, {text}; {rows[0].num_sequences} test sequences of {tokens} tokens; KL against the "
            f"{reference_name(prepared.model)} model.",
            source=source,
        )
        facts = {"model": name, "text": text, "profile source": source, "machine": platform.machine()}
        write_report(directory, rows=rows, rungs=rungs, sentences=findings, facts=facts)
