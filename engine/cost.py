"""Latency of a decode step as a function of the bit-widths: fixed + the sum over units of a table entry.

Two sources that are never mixed in one column: `roofline` counts the bytes that a step must read, `measured` times
whole steps on this device. A table belongs to one model, device and thread count and refuses any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.lean import default_decoder
from flexquant_rl.engine.linear import NestedLinear
from flexquant_rl.engine.model import NestedCausalLM

NOMINAL_BANDWIDTH_GB_S = 16.0
"""Default of the roofline: one core's DRAM reads on a server. Every speedup of a pure roofline is independent of it."""


@dataclass(frozen=True)
class CostTable:
    """`latency_ms = fixed_ms + sum over units of unit_ms[unit, width]`.

    Attributes:
        source: `roofline` (modelled) or `measured`.
        fixed_ms: Part of a step that no bit-width changes.
        unit_ms: `[U, W]` float64.
        bit_widths: The W widths, ascending.
        fingerprint: Of the model.
        device: `cpu` or `cuda`.
        num_threads: Of the decoder, which matter on a CPU.
        decoder: Whose steps were timed, `lean` or `hf`; None for a roofline.
        error_p50: Median relative error on held-out whole steps; None for a roofline.
        error_p95: 95th percentile of the same.
    """

    source: Literal["roofline", "measured"]
    fixed_ms: float
    unit_ms: Tensor
    bit_widths: tuple[int, ...]
    fingerprint: str
    device: str
    num_threads: int
    decoder: Literal["lean", "hf"] | None = None
    error_p50: float | None = None
    error_p95: float | None = None

    def full_width(self) -> Tensor:
        """`[U]`: the largest width everywhere, the baseline of every speedup."""
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

    def speedup(self, bit_widths: Tensor) -> Tensor:
        """Latency at the largest width everywhere over latency at `[..., U]`."""
        return self.latency_ms(self.full_width()) / self.latency_ms(bit_widths)

    def check(self, model: NestedCausalLM) -> None:
        """Raises InputError if the table is of another model, device or thread count."""
        if self.fingerprint != model.fingerprint:
            raise InputError(
                f"the profile is of model {self.fingerprint[:12]}, but this one is {model.fingerprint[:12]}; "
                "run `fq profile` on this model"
            )
        if self.source == "measured":
            here = (model.device.type, *default_decoder(model))
            if (self.device, self.decoder, self.num_threads) != here:
                raise InputError(
                    f"the profile was measured on {self.device} with the {self.decoder} decoder and {self.num_threads} "
                    f"threads, but this is {here[0]} with {here[1]} and {here[2]}; run `fq profile` again"
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
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> CostTable:
        """Reads the JSON form."""
        return CostTable(
            **{
                **data,
                "unit_ms": torch.tensor(data["unit_ms"], dtype=torch.float64),
                "bit_widths": tuple(data["bit_widths"]),
            }
        )


def roofline_cost(model: NestedCausalLM, *, bandwidth_gb_s: float = NOMINAL_BANDWIDTH_GB_S) -> CostTable:
    """Models a step that reads every weight byte once at a given bandwidth and does nothing else.

    `fixed_ms` is what is read whatever the widths: norms, biases and, where the head is not a unit, the head. Python
    and launch overhead, attention and arithmetic are not in it; `measured` is the source that knows them.
    """
    per_ms = bandwidth_gb_s * 1e6
    unit_bytes = [[model.weight_bytes(unit, b) for b in model.bit_widths] for unit in range(model.num_units)]
    other = 0
    for module in model.hf_model.modules():
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
        num_threads=torch.get_num_threads(),
    )


def measured_cost(
    model: NestedCausalLM, time_step: Callable[[Tensor], float], *, num_steps: int = 300, seed: int = 0
) -> CostTable:
    """Fits the table to whole steps at random widths by least squares; a quarter of them is held out for its error.

    Args:
        model: The model that `time_step` runs.
        time_step: Runs one step of `open_session`'s decoder at `[U]` widths and returns its milliseconds.
        num_steps: Whole steps to time, in random order so that drift of the machine hits all widths alike; raised to
        four per table entry where there are many.
        seed: Of the widths.

    Raises:
        InputError: If the times are too noisy to fit a table.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = torch.tensor(model.bit_widths)
    num_steps = max(num_steps, 4 * model.num_units * len(widths))
    choices = torch.randint(len(widths), (num_steps, model.num_units), generator=generator)
    # A third of the steps uniform at one width: the other end of what a policy may choose. Every third is uniform and
    # every fourth held out, so that both kinds are fitted and both are held out.
    choices[::3] = choices[::3, :1].expand(-1, model.num_units)
    times = torch.tensor([time_step(widths[choice]) for choice in choices], dtype=torch.float64)
    held_out = torch.arange(num_steps) % 4 == 3
    fixed, unit_ms = _fit(choices[~held_out], times[~held_out], len(widths))
    fastest = fixed + float(unit_ms.amin(1).sum())
    if fastest <= 0:
        raise InputError(
            f"{num_steps} timed steps say that the fastest one takes {fastest:.3g} ms, which cannot be: the machine is "
            "too busy to time this model; run again with more --steps, or take --source roofline"
        )
    decoder, num_threads = default_decoder(model)
    table = replace(
        roofline_cost(model),
        source="measured",
        fixed_ms=fixed,
        unit_ms=unit_ms,
        num_threads=num_threads,
        decoder=decoder,
    )
    error = (table.latency_ms(widths[choices[held_out]]) / times[held_out] - 1).abs()
    return replace(table, error_p50=float(error.quantile(0.5)), error_p95=float(error.quantile(0.95)))


def _fit(choices: Tensor, times: Tensor, num_widths: int) -> tuple[float, Tensor]:
    """Least squares with the widest entry of each unit as its base, robust to the slowest tenth (preempted steps)."""
    one_hot = torch.nn.functional.one_hot(choices, num_widths).to(torch.float64)
    relative = one_hot[..., :-1].flatten(1)
    design = torch.cat([torch.ones(len(times), 1, dtype=torch.float64), relative], dim=1)
    ridge = 1e-6 * torch.eye(design.shape[1], dtype=torch.float64)
    kept = torch.ones(len(times), dtype=torch.bool)
    for _ in range(3):
        a, b = design[kept], times[kept]
        solution = torch.linalg.solve(a.T @ a + ridge, a.T @ b)
        residual = times - design @ solution
        kept = residual <= residual.quantile(0.9)
    saved = solution[1:].view(choices.shape[1], num_widths - 1)
    # Only sums over units are identified: keep the whole intercept in `fixed_ms` and make entries relative to the
    # widest.
    return float(solution[0]), torch.cat([saved, torch.zeros(len(saved), 1, dtype=torch.float64)], dim=1)


def clock_ms(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock milliseconds of a call, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
