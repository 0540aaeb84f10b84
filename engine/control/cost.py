"""Latency of a decode step as a function of the bit-widths: fixed + the sum over units of a table entry.

Two sources that are never mixed in one column: `roofline` counts the bytes that a step must read, `measured` times
whole steps on this device. A table belongs to one model, device and thread count and refuses any other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexquant_rl.engine.control.signals import check_widths
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.model import NestedCausalLM

NOMINAL_BANDWIDTH_GB_S = 16.0
"""Default of the roofline: one core's DRAM reads on a server. Every speedup of a pure roofline is independent of it."""

_FOLDS = 5
_STRENGTHS = (1e-6, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
"""Strengths of the ridge on deviations; the first is none."""


@dataclass(frozen=True)
class CostTable:
    """`latency_ms = fixed_ms + sum over units of unit_ms[unit, width]`.

    Attributes:
        source: `roofline` (modelled) or `measured`.
        fixed_ms: Part of a step that no bit-width changes.
        unit_ms: `[U, W]` float64.
        bit_widths: The W widths, ascending.
        fingerprint: Fingerprint of the model.
        device: `cpu` or `cuda`.
        num_threads: Threads of the decoder, which matter on a CPU; None for a roofline, which knows none.
        decoder: Whose steps were timed, `lean` or `hf`; None for a roofline.
        error_p50: Median relative error on held-out whole steps; None for a roofline.
        error_p95: 95th percentile of the same.
        controller_ms: What signals and a policy that looks at them add to a step, whatever its widths; 0 for a
            roofline, which counts bytes. Fixed widths do not pay it.
    """

    source: Literal["roofline", "measured"]
    fixed_ms: float
    unit_ms: Tensor
    bit_widths: tuple[int, ...]
    fingerprint: str
    device: str
    num_threads: int | None
    decoder: Literal["lean", "hf"] | None = None
    error_p50: float | None = None
    error_p95: float | None = None
    controller_ms: float = 0.0

    def full_width(self) -> Tensor:
        """`[U]`: the largest width everywhere, which time shares are of."""
        return torch.full((len(self.unit_ms),), max(self.bit_widths))

    def latency_ms(self, bit_widths: Tensor) -> Tensor:
        """Latency of steps `[..., U]` -> `[...]` float64.

        Raises:
            InputError: If a width is not in the table; the unquantised reference (0) has no latency.
        """
        stored, widths = torch.tensor(self.bit_widths), bit_widths.cpu().long().contiguous()
        columns = torch.searchsorted(stored, widths).clamp_max(len(stored) - 1)
        unknown = widths[stored[columns] != widths]
        if len(unknown):
            raise InputError(
                f"bit-width {int(unknown[0])} has no latency; the table holds {', '.join(map(str, self.bit_widths))}: "
                "choose one of them"
            )
        units = torch.arange(len(self.unit_ms))
        return self.fixed_ms + self.unit_ms[units, columns].sum(-1)

    def time_share(self, bit_widths: Tensor) -> Tensor:
        """Latency at `[..., U]` over latency at the largest width everywhere, `[...]` float64."""
        return self.latency_ms(bit_widths) / self.latency_ms(self.full_width())

    @property
    def controller_share(self) -> float:
        """`controller_ms` over the latency at the largest width everywhere: what looking costs a step."""
        return self.controller_ms / float(self.latency_ms(self.full_width()))

    def check(self, model: NestedCausalLM, num_threads: int | None = None) -> None:
        """Raises InputError if the table is of another model or, where measured, of steps that are timed otherwise.

        Args:
            model: What it is to be used for; device and decoder must be those that were measured.
            num_threads: Threads of its steps, as given to `open_session`.
        """
        if self.fingerprint != model.fingerprint:
            raise InputError(
                f"the profile is of model {self.fingerprint[:12]}, but this one is {model.fingerprint[:12]}; "
                "run `fq profile` on this model"
            )
        if self.source == "measured":
            there = (self.device, self.decoder, self.num_threads)
            here = (model.device.type, *default_decoder(model, num_threads))
            if there != here:
                way_out = f"give --threads {self.num_threads} or " if there[:2] == here[:2] else ""
                raise InputError(
                    f"the profile was measured on {self.device} with the {self.decoder} decoder and {self.num_threads} "
                    f"threads, but this is {here[0]} with {here[1]} and {here[2]}; {way_out}run `fq profile` again"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "source": self.source,
            "fixed_ms": self.fixed_ms,
            "unit_ms": self.unit_ms.tolist(),
            "bit_widths": list(self.bit_widths),
            "fingerprint": self.fingerprint,
            "device": self.device,
            "num_threads": self.num_threads,
            "decoder": self.decoder,
            "error_p50": self.error_p50,
            "error_p95": self.error_p95,
            "controller_ms": self.controller_ms,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> CostTable:
        """Reads the JSON form.

        Raises:
            KeyError, TypeError, ValueError, OverflowError, RuntimeError: If it is not what `to_dict` writes.
        """
        unit_ms = torch.tensor(data["unit_ms"], dtype=torch.float64)
        table = CostTable(**{**data, "unit_ms": unit_ms, "bit_widths": tuple(data["bit_widths"])})
        check_widths(table.bit_widths)
        errors = [error for error in (table.error_p50, table.error_p95) if error is not None]
        numbers = [table.fixed_ms, table.controller_ms, *errors]
        rules = {
            "source is roofline or measured": table.source in ("roofline", "measured"),
            "fingerprint and device are text": all(isinstance(text, str) for text in (table.fingerprint, table.device)),
            "decoder is lean, hf or null": table.decoder in ("lean", "hf", None),
            "num_threads of a measured one is a positive integer": table.source != "measured"
            or (type(table.num_threads) is int and table.num_threads > 0),
            "fixed_ms, controller_ms and errors are finite numbers": all(
                type(number) in (int, float) and math.isfinite(number) for number in numbers
            ),
            "unit_ms is finite, a row per unit and a column per width": bool(unit_ms.isfinite().all())
            and unit_ms.dim() == 2
            and unit_ms.shape[1] == len(table.bit_widths) > 0,
        }
        # Only then can it be added up.
        broken = [rule for rule, holds in rules.items() if not holds]
        if not broken and table.fixed_ms + float(unit_ms.amin(1).sum()) <= 0:
            broken = ["every step takes longer than 0 ms"]
        if broken:
            raise ValueError(f"in a latency table {broken[0]}")
        return table


def roofline_cost(model: NestedCausalLM, *, bandwidth_gb_s: float = NOMINAL_BANDWIDTH_GB_S) -> CostTable:
    """Models a step that reads every weight byte once at a given bandwidth and does nothing else.

    `fixed_ms` is what is read whatever the widths: norms, biases and, where the head is not a unit, the head. Python
    and launch overhead, attention and arithmetic are not in it; `measured` is the source that knows them.
    """
    per_ms = bandwidth_gb_s * 1e6
    unit_bytes = [[model.weight_bytes(unit, b) for b in model.bit_widths] for unit in range(model.num_units)]
    other = 0
    for module in model.tree.modules():
        if isinstance(module, nn.Embedding):
            continue  # a step reads one row of it; a head tied to it is a module of its own
        other += sum(tensor.nbytes for tensor in module.parameters(recurse=False))
        if isinstance(module, NestedLinear) and isinstance(module.bias, Tensor):
            other += module.bias.nbytes
    return CostTable(
        source="roofline",
        fixed_ms=other / per_ms,
        unit_ms=torch.tensor(unit_bytes, dtype=torch.float64) / per_ms,
        bit_widths=model.bit_widths,
        fingerprint=model.fingerprint,
        device=model.device.type,
        num_threads=None,
    )


def measured_cost(
    model: NestedCausalLM,
    time_step: Callable[[Tensor], float],
    *,
    num_steps: int = 300,
    num_threads: int | None = None,
    seed: int = 0,
) -> CostTable:
    """Fits the table to whole steps at random widths by least squares; a quarter of them is held out for its error.

    Args:
        model: The model that `time_step` runs.
        time_step: Runs one step of `open_session`'s decoder at `[U]` widths and returns its milliseconds.
        num_steps: Whole steps to time, in random order so that drift of the machine hits all widths alike; raised to
        two per table entry where there are many.
        num_threads: Threads of the steps, as given to `open_session`.
        seed: Seed of the widths.

    Raises:
        InputError: If there are no steps, or the times are too noisy to fit a table.
    """
    if num_steps < 1:
        raise InputError(f"steps={num_steps} but a table is fitted to timed steps; give e.g. --steps 300")
    generator = torch.Generator().manual_seed(seed)
    widths = torch.tensor(model.bit_widths)
    num_steps = max(num_steps, 2 * model.num_units * len(widths))
    choices = torch.randint(len(widths), (num_steps, model.num_units), generator=generator)
    # A third of the steps uniform at one width: the other end of what a policy may choose. Every third is uniform and
    # every fourth held out, so that both kinds are fitted and both are held out.
    choices[::3] = choices[::3, :1].expand(-1, model.num_units)
    times = torch.tensor([time_step(widths[choice]) for choice in choices], dtype=torch.float64)
    held_out = torch.arange(num_steps) % 4 == 3
    fixed, unit_ms = _fit(choices[~held_out], times[~held_out], model.unit_weights, len(widths))
    fastest = fixed + float(unit_ms.amin(1).sum())
    if fastest <= 0:
        raise InputError(
            f"{num_steps} timed steps say that the fastest one takes {fastest:.3g} ms, which cannot be: the machine is "
            "too busy to time this model; run again with more --steps, or take --source roofline"
        )
    decoder, threads = default_decoder(model, num_threads)
    table = replace(
        roofline_cost(model),
        source="measured",
        fixed_ms=fixed,
        unit_ms=unit_ms,
        num_threads=threads,
        decoder=decoder,
    )
    error = (table.latency_ms(widths[choices[held_out]]) / times[held_out] - 1).abs()
    return replace(table, error_p50=float(error.quantile(0.5)), error_p95=float(error.quantile(0.95)))


def _fit(choices: Tensor, times: Tensor, sizes: Tensor, num_widths: int) -> tuple[float, Tensor]:
    """Fits a fixed time and what each unit saves at each width, relative to the widest.

    Steps tell well what a width saves in the whole model and badly what it saves in one of many units. Left alone, such
    entries are noise that a knapsack would choose by. So a unit saves what its share of the weights says, and deviates
    from that only as far as it predicts steps that were left out (ridge, its strength by cross-validation).

    Args:
        choices: `[n, U]` int64 columns of widths.
        times: `[n]` float64 ms.
        sizes: `[U]` weights of the units.
        num_widths: W.

    Returns:
        `fixed_ms` and `[U, W]` float64, 0 at the widest: only sums over units are identified, so the whole intercept
        stays in the former.
    """
    one_hot = torch.nn.functional.one_hot(choices, num_widths).to(torch.float64)
    sizes = sizes.double() / sizes.double().mean()
    own = one_hot[..., :-1] * sizes[:, None]  # [n, U, W - 1]
    design = torch.cat([torch.ones(len(times), 1, dtype=torch.float64), own.sum(1), own.flatten(1)], dim=1)
    num_shared = design.shape[1] - own[0].numel()
    fold = torch.arange(len(times)) % _FOLDS

    def error(strength: float) -> float:
        """Mean absolute residual of steps left out, without the largest tenth."""
        residuals = torch.empty_like(times)
        for index in range(_FOLDS):
            left_out = fold == index
            solution = _least_squares(design[~left_out], times[~left_out], num_shared, strength)
            residuals[left_out] = (times[left_out] - design[left_out] @ solution).abs()
        return float(residuals[residuals <= residuals.quantile(0.9)].mean())

    errors = [error(strength) for strength in _STRENGTHS]
    # Of those that predict as well, the strongest.
    strength = max(s for s, value in zip(_STRENGTHS, errors, strict=True) if value <= 1.01 * min(errors))
    solution = _least_squares(design, times, num_shared, strength)
    shared, deviations = solution[1:num_shared], solution[num_shared:].view(own.shape[1:])
    saved = sizes[:, None] * (shared + deviations)
    return float(solution[0]), torch.cat([saved, torch.zeros(len(saved), 1, dtype=torch.float64)], dim=1)


def _least_squares(design: Tensor, times: Tensor, num_shared: int, strength: float) -> Tensor:
    """Ridge on all columns but the first few, robust to the slowest tenth (preempted steps)."""
    ridge = torch.full((design.shape[1],), strength, dtype=torch.float64)
    ridge[:num_shared] = _STRENGTHS[0]
    kept = torch.ones(len(times), dtype=torch.bool)
    for _ in range(3):
        a, b = design[kept], times[kept]
        solution: Tensor = torch.linalg.solve(a.T @ a + ridge.diag(), a.T @ b)
        residual = times - design @ solution
        kept = residual <= residual.quantile(0.9)
    return solution


def clock_ms(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock milliseconds of a call, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
