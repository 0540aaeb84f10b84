"""Profile of a model: what each unit's width costs in output KL and in time. The input of every static allocation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.engine.control.allocation_kl import affordable_windows
from flexquant_rl.engine.control.cost import CostTable, roofline_cost
from flexquant_rl.engine.control.draft_times import DraftTimes
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.sensitivity import part_allocations, sensitivity, single_units
from flexquant_rl.engine.control.signals import check_widths
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_json, write_json
from flexquant_rl.engine.model import NestedCausalLM

PROFILE_VERSION = 3
_WITHOUT_DRAFTS = 2
"""The version before: the same but for the times of drafts, which it does not have."""
_MOST_WINDOWS = 12


@dataclass(frozen=True)
class Profile:
    """Sensitivities and latencies of one model.

    Attributes:
        cost: Latency table.
        sensitivity: `[U, W]` float32, mean output KL in nats with only that unit at that width and the rest at the
            reference, keys and values included.
        bit_widths: The W widths, ascending.
        fingerprint: Fingerprint of the model.
        num_tokens: Tokens that the means are over.
        reference: `unquantised`, or `8-bit` where no other copy exists.
        drafts: Times of drafts and passes over several tokens, with the decoder and the threads of a measured `cost`;
            None where nobody has timed them.
    """

    cost: CostTable
    sensitivity: Tensor
    bit_widths: tuple[int, ...]
    fingerprint: str
    num_tokens: int
    reference: str
    drafts: DraftTimes | None = None

    def check(self, model: NestedCausalLM, num_threads: int | None = None) -> None:
        """Raises InputError if the profile is of another model or not whole, or as `CostTable.check`."""
        self.cost.check(model, num_threads)
        wanted = (model.fingerprint, model.bit_widths, (model.num_units, len(model.bit_widths)))
        for fingerprint, bit_widths, table in (
            (self.fingerprint, self.bit_widths, self.sensitivity),
            (self.cost.fingerprint, self.cost.bit_widths, self.cost.unit_ms),
        ):
            if (fingerprint, bit_widths, tuple(table.shape)) != wanted or not bool(table.isfinite().all()):
                raise InputError(
                    f"the profile's tables are not finite ones of {model.num_units} units at widths "
                    f"{list(model.bit_widths)}, as model {model.fingerprint[:12]} has them; run `fq profile` again"
                )

    def draft_times(self, model: NestedCausalLM, decoder: str, num_threads: int | None = None) -> DraftTimes:
        """The times of drafts, where they are those of a model, a decoder and a number of threads.

        Raises:
            InputError: If there are none, or as `check`.
        """
        self.check(model, num_threads)
        if self.drafts is None or self.cost.source != "measured":
            raise InputError("the profile has no times of drafts; run `fq profile` again, without --source roofline")
        if self.cost.decoder != decoder:
            raise InputError(
                f"the profile is of the {self.cost.decoder} decoder, and the recording of the {decoder} one; record "
                f"with `fq record --decoder {self.cost.decoder}`"
            )
        return self.drafts

    def save(self, path: Path) -> None:
        """Writes JSON, atomically."""
        write_json(
            path,
            {
                "version": PROFILE_VERSION,
                "cost": self.cost.to_dict(),
                "sensitivity": self.sensitivity.tolist(),
                "bit_widths": list(self.bit_widths),
                "fingerprint": self.fingerprint,
                "num_tokens": self.num_tokens,
                "reference": self.reference,
                "drafts": None if self.drafts is None else self.drafts.to_dict(),
            },
        )

    @staticmethod
    def load(path: Path | str) -> Profile:
        """Reads JSON, that of the version before too: it has no times of drafts.

        Raises:
            InputError: If the file is missing, unreadable or of another version.
        """
        try:
            data: Any = read_json(Path(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: no readable profile ({error}); run `fq profile`") from error
        version = data.get("version") if isinstance(data, dict) else None
        if version not in (PROFILE_VERSION, _WITHOUT_DRAFTS):
            raise InputError(f"{path}: profile version {version}, this is {PROFILE_VERSION}; run `fq profile`")
        try:
            drafts = data["drafts"] if version == PROFILE_VERSION else None
            profile = Profile(
                cost=CostTable.from_dict(data["cost"]),
                sensitivity=torch.tensor(data["sensitivity"], dtype=torch.float32),
                bit_widths=tuple(data["bit_widths"]),
                fingerprint=data["fingerprint"],
                num_tokens=data["num_tokens"],
                reference=data["reference"],
                drafts=None if drafts is None else DraftTimes.from_dict(drafts),
            )
            check_widths(profile.bit_widths)
            for name, kind in (("fingerprint", str), ("num_tokens", int), ("reference", str)):
                if type(data[name]) is not kind:
                    raise ValueError(f"{name} is no {kind.__name__}")
            return profile
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(f"{path}: not a whole profile ({error!r}); run `fq profile`") from error


def unmeasured_profile(model: NestedCausalLM) -> Profile:
    """The profile of a model that nothing was measured of, for policies that weigh nothing: roofline and zeros."""
    zeros = torch.zeros(model.num_units, len(model.bit_widths))
    return Profile(roofline_cost(model), zeros, model.bit_widths, model.fingerprint, 0, reference_name(model))


def num_profile_windows(model: NestedCausalLM, length: int) -> int:
    """How many windows of `length` tokens a profile reads: 12, and fewer of a large model, down to 3."""
    allocations, _, _ = part_allocations(model, single_units(model), model.bit_widths)
    return affordable_windows(model, allocations, length, _MOST_WINDOWS)


def profile_model(
    model: NestedCausalLM,
    windows: Tensor,
    cost: CostTable,
    *,
    first: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Profile:
    """Measures the sensitivity of every unit at every width on text.

    Args:
        model: The model.
        windows: `[n, T]` int64 token windows; text that no evaluation uses.
        cost: Latency table to put beside the sensitivities.
        first: Positions before this one are context only.
        progress: Wraps the loop over layers, the head last.
    """
    return Profile(
        cost=cost,
        sensitivity=sensitivity(model, windows, single_units(model), model.bit_widths, first=first, progress=progress),
        bit_widths=model.bit_widths,
        fingerprint=model.fingerprint,
        num_tokens=windows.shape[0] * (windows.shape[1] - first),
        reference=reference_name(model),
    )
