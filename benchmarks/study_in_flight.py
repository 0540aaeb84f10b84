"""What choosing in flight would bring: how well a token's need for bits is predicted, and what that earns.

A unit's width may be chosen by what is known before the token (the signals of today) or in flight, by the hidden state
of this very token where it enters the unit. For each (token, unit) the influence of its quantisation errors on the KL
of the whole sequence is measured. Networks predict its logarithm from either, and each predictor becomes an allocation
with a Lagrange multiplier, which is run on test text and compared with static in equal modelled time. Choosing takes no
time here: what is found is the most that choosing in flight can bring.

    python benchmarks/study_in_flight.py --out runs/study

What was measured is kept in the directory, and a second call goes on from there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from _known_text import (
    IN_FLIGHT,
    TODAY,
    Build,
    Multiples,
    Predictor,
    Text,
    explained,
    feature_sets,
    fit,
    log_influence,
    read_text,
    token_log_kl,
    unit_inputs,
)
from torch import Tensor

from flexquant_rl.agents.commands.process import command
from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.evaluation.baselines import tuned_baselines
from flexquant_rl.agents.evaluation.comparison import LogRatio, compare
from flexquant_rl.agents.evaluation.contest import test_windows, tune
from flexquant_rl.agents.evaluation.equal_time import (
    VALIDATION_SEQUENCES,
    beside_static,
    missing_rungs,
    static_entries,
)
from flexquant_rl.agents.evaluation.evaluate import Evaluator, Trace, summarise
from flexquant_rl.agents.evaluation.in_flight import Choose, trace_in_flight
from flexquant_rl.agents.evaluation.lagrange import Lagrange, centred
from flexquant_rl.agents.evaluation.rows import EvalRow, write_rows
from flexquant_rl.agents.policies.regressor import Regressor
from flexquant_rl.agents.preparation import Prepared, policy_context, prepare
from flexquant_rl.agents.progress import say, track
from flexquant_rl.engine.control.output_kl import reference_name, reference_width

_EXPONENTS = (0.5, 0.75, 1.0)
_EXPONENT_BUDGET = 0.6
_EXPONENT_ROWS = 24
_BOUND = "measured influence (bound)"
_CONTROL = "nothing"


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Predicts influences and turns the predictions into allocations."""

    out: Path
    """Directory of what is measured; a profile and a static front of a run in it are used."""
    model: str | None = None
    """As for `fq train`."""
    text: tuple[str, ...] = ()
    """As for `fq train`."""
    train_windows: int = 288
    """Sequences that predictors learn from."""
    judged_windows: int = 64
    """Sequences of validation text and of test text."""
    samples: int = 16
    """Backward passes for each sequence."""
    bit_width: int = 4
    """Whose errors are looked at."""
    time_budgets: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    """Shares of full-width time."""


def predicted(
    prepared: Prepared, builds: dict[str, Build], train: Text, validation: Text, options: StudyOptions
) -> tuple[dict[str, Multiples], list[str]]:
    """What turns features into multiples, and the tables of what they explain."""
    units = range(prepared.model.num_units)
    every = slice(None)
    nets: dict[str, list[Predictor]] = {}
    lines = _table_head("R2 of log influence", [unit.name for unit in prepared.model.units])
    targets, judged = log_influence(train), log_influence(validation)

    def score(name: str, unit: int, inputs: Tensor) -> float:
        return explained(nets[name][unit](builds[name](validation, every, unit, inputs)), judged[..., unit])

    for name, build in track(builds.items(), "predictors"):
        nets[name] = [fit(build(train, every, unit, train.inputs[unit]), targets[..., unit]) for unit in units]
        lines.append(_table_line(name, [score(name, unit, validation.inputs[unit]) for unit in units]))
    noise = float(torch.polygamma(1, torch.tensor(options.samples / 2)))
    lines.append(_table_line("(noise of the target)", [noise / float(judged[..., unit].var()) for unit in units]))
    for bit_width in (min(prepared.model.bit_widths), reference_width(prepared.model)):
        inputs = unit_inputs(prepared, validation.windows, bit_width)
        scores = [score(IN_FLIGHT, unit, inputs[unit]) for unit in units]
        lines.append(_table_line(f"({IN_FLIGHT}, read in a stream of {bit_width or 'no'} bits)", scores))
    lines += _token_table(prepared, builds, train, validation, options)

    def multiples(name: str) -> Multiples:
        return lambda text, rows, unit, inputs: nets[name][unit](builds[name](text, rows, unit, inputs))

    found: dict[str, Multiples] = {_CONTROL: lambda text, rows, unit, inputs: torch.zeros(inputs.shape[:2])}
    found |= {name: multiples(name) for name in builds}
    found[_BOUND] = lambda text, rows, unit, inputs: log_influence(text)[rows][..., unit]
    return found, lines


def _token_table(
    prepared: Prepared, builds: dict[str, Build], train: Text, validation: Text, options: StudyOptions
) -> list[str]:
    """How well the logarithm of a token's own KL at one width is predicted at some depths."""
    num_layers = prepared.model.num_layers
    places = [unit.layer_idx for unit in prepared.model.units]
    depths = [places.index(num_layers * quarter // 4) for quarter in range(4)] + [len(places) - 1]
    names = [prepared.model.units[unit].name for unit in depths]
    lines = _table_head(f"R2 of log KL of the token, {options.bit_width} bits everywhere", names)
    target, judged = token_log_kl(train), token_log_kl(validation)
    for name, build in track(builds.items(), "predictors of the token's KL"):
        scores = []
        for unit in depths:
            net = fit(build(train, slice(None), unit, train.inputs[unit]), target)
            scores.append(explained(net(build(validation, slice(None), unit, validation.inputs[unit])), judged))
        lines.append(_table_line(name, scores))
    return lines


def _table_head(title: str, columns: Sequence[str]) -> list[str]:
    return ["", f"| {title} | {' | '.join([*columns, 'mean'])} |", "|---" * (len(columns) + 2) + "|"]


def _table_line(name: str, values: Sequence[float]) -> str:
    return f"| {name} | {' | '.join(f'{value:.2f}' for value in [*values, sum(values) / len(values)])} |"


def powered(predict: Multiples, text: Text, exponent: float) -> Multiples:
    """To a power, so that a unit's mean multiple is 1 on the text."""
    every = slice(None)
    shifts = []
    for unit, inputs in enumerate(text.inputs):
        logs = exponent * predict(text, every, unit, inputs)
        shifts.append((centred(logs) - logs).mean())
    return lambda given, rows, unit, inputs: exponent * predict(given, rows, unit, inputs) + shifts[unit]


def run(prepared: Prepared, lagrange: Lagrange, text: Text, multiples: Multiples, multiplier: float) -> Trace:
    """Runs an allocation on a text in flight."""

    def choose_for(rows: slice) -> Choose:
        return lambda unit, inputs: lagrange.widths(unit, multiples(text, rows, unit, inputs), multiplier)

    return trace_in_flight(prepared, text.windows, choose_for)


def multiplier_for(lagrange: Lagrange, text: Text, multiples: Multiples, budget: float) -> float:
    """The multiplier that meets a budget on the recorded inputs of a text."""
    every = slice(None)
    logs = [multiples(text, every, unit, inputs) for unit, inputs in enumerate(text.inputs)]
    return lagrange.meet(logs, budget)


def allocations(
    prepared: Prepared, predictors: dict[str, Multiples], validation: Text, test: Text, options: StudyOptions
) -> list[EvalRow]:
    """Rows of test text: exponent and multiplier of each predictor and budget are found on validation text."""
    lagrange = Lagrange.of(prepared)
    _, documents = test_windows(prepared, len(test.windows))
    rows = []
    for name, predict in track(predictors.items(), "allocations"):
        is_given = name in (_CONTROL, _BOUND)
        exponent = 1.0 if is_given else best_exponent(prepared, lagrange, validation, predict)
        multiples = powered(predict, validation, exponent)
        for budget in options.time_budgets:
            trace = run(prepared, lagrange, test, multiples, multiplier_for(lagrange, validation, multiples, budget))
            row = summarise(
                trace,
                policy=f"{name} ^ {exponent:g}",
                family=name,
                reference=reference_name(prepared.model),
                time_budget=budget,
                documents=documents,
            )
            say(f"{row.policy} at {budget:g}: time {1 / trace.speedup:.3f}, KL {row.output_kl_nats:.4g}")
            rows.append(row)
    rows += regressor_rows(prepared, test, options)
    static = static_entries(prepared, missing_rungs(rows, None))
    return beside_static(prepared, rows, test.windows, prepared.env, None, static)[0]


def regressor_rows(prepared: Prepared, test: Text, options: StudyOptions) -> list[EvalRow]:
    """The tuned `regressor`, which a decoder can serve, decoding the same text step by step."""
    families = tuned_baselines(prepared, policy_context(prepared), (Regressor.family.name,))
    settings = tune(prepared, families, options.time_budgets, VALIDATION_SEQUENCES)
    _, documents = test_windows(prepared, len(test.windows))
    evaluator = Evaluator(prepared.model, prepared.profile, test.windows, prepared.env, cost=prepared.cost)
    rows = [
        summarise(
            evaluator.run(entry.first.policy),
            policy=entry.name,
            family=entry.family,
            reference=reference_name(prepared.model),
            time_budget=entry.time_budget,
            documents=documents,
        )
        for entry in track(settings.entries, "regressor")
    ]
    evaluator.close()
    return rows


def best_exponent(prepared: Prepared, lagrange: Lagrange, validation: Text, predict: Multiples) -> float:
    """The power of a predictor that leaves least KL of validation text in equal time."""
    front = prepared.front
    kl, time = front.output_kl_nats[[0, -2]].log(), front.time_share[[0, -2]]
    slope = float((kl[1] - kl[0]) / (time[1] - time[0]))
    part = validation.first(_EXPONENT_ROWS)
    found = []
    for exponent in _EXPONENTS:
        multiples = powered(predict, validation, exponent)
        multiplier = multiplier_for(lagrange, validation, multiples, _EXPONENT_BUDGET)
        trace = run(prepared, lagrange, part, multiples, multiplier)
        # What takes longer is better for that alone.
        log_kl = math.log(float(trace.output_kl_nats.double().mean()))
        found.append((log_kl - slope * (1 / trace.speedup - _EXPONENT_BUDGET), exponent))
    return min(found)[1]


def earned(rows: Sequence[EvalRow]) -> list[str]:
    """The table of output KL against static in equal modelled time, and against the signals of today."""
    budgets = [f"at {row.time_budget:g}" for row in rows if row.family == rows[0].family]
    lines = ["", f"| output KL against static, % (95% interval) | {' | '.join([*budgets, 'all', 'against today'])} |"]
    lines.append("|---" * (len(budgets) + 3) + "|")
    for family in dict.fromkeys(row.family for row in rows):
        static, today = compare(rows, family), compare(rows, family, TODAY)
        assert static is not None
        assert today is not None
        ratios = [ratio for _, ratio in static.by_setting] + [static.overall, today.overall]
        lines.append(f"| {family} | {' | '.join(map(_percent, ratios))} |")
    return lines


def _percent(ratio: LogRatio) -> str:
    """E.g. `-3.1 (-5.0 to -1.2)`."""
    found = [value for value in (ratio.value, ratio.low, ratio.high) if value is not None]
    value, *ends = (f"{100 * math.expm1(one):+.1f}" for one in found)
    return f"{value} ({' to '.join(ends)})" if ends else value


def study(options: StudyOptions) -> None:
    """Measures, predicts, allocates, prints both tables."""
    options.out.mkdir(parents=True, exist_ok=True)
    prepared = prepare(TrainConfig(model=options.model, text=options.text), options.out)
    train, validation, test = (
        read_text(prepared, options.out, split, count, bit_width=options.bit_width, samples=options.samples)
        for split, count in (
            ("train", options.train_windows),
            ("validation", options.judged_windows),
            ("test", options.judged_windows),
        )
    )
    builds = feature_sets(prepared, train, options.bit_width)
    predictors, table = predicted(prepared, builds, train, validation, options)
    for line in table:
        print(line)
    rows = allocations(prepared, predictors, validation, test, options)
    write_rows(options.out / "rows.jsonl", rows)
    for line in earned(rows):
        print(line)


if __name__ == "__main__":
    options = tyro.cli(StudyOptions)
    sys.exit(command(lambda: study(options)))
