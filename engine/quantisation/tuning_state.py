"""What is tuned of one width as flat tensors with Adam's moments, and the file that an interrupted run goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_tensors, write_tensors

_BETAS = (0.9, 0.98)


class WidthState:
    """The steps of all linears at one width, one after the other in one tensor, and their optimiser.

    Args:
        steps: Parameters by linear; they become views of the one tensor, and so do their gradients.
    """

    def __init__(self, steps: Mapping[str, nn.Parameter]) -> None:
        first = next(iter(steps.values()))
        count = sum(parameter.numel() for parameter in steps.values())
        self.flat = nn.Parameter(torch.zeros(count, device=first.device))
        self.gradient = torch.zeros_like(self.flat)
        self.best = torch.zeros_like(self.flat)
        self.flat.grad = self.gradient
        start = 0
        for parameter in steps.values():
            part = slice(start, start + parameter.numel())
            parameter.data = self.flat.data[part].view_as(parameter)
            parameter.grad = self.gradient[part].view_as(parameter)
            start = part.stop
        self._adam = torch.optim.Adam([self.flat], betas=_BETAS, eps=1e-12)

    def step(self, learning_rate: float) -> None:
        """Moves against the gradient and forgets it."""
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        self.gradient.zero_()

    def keep(self) -> None:
        """Remembers these steps as the best so far."""
        self.best.copy_(self.flat.detach())

    def restore_best(self) -> None:
        """Goes back to the best steps, without the direction that led away from them."""
        self.flat.data.copy_(self.best)
        moments = self._adam.state.get(self.flat)
        if moments:
            moments["exp_avg"].zero_()

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name; empty moments before the first step."""
        moments = self._adam.state.get(self.flat) or {}
        return {
            "steps": self.flat.detach(),
            "best": self.best,
            **{name: torch.as_tensor(value) for name, value in moments.items()},
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `tensors` gave."""
        self.flat.data.copy_(tensors["steps"])
        self.best.copy_(tensors["best"])
        device = self.flat.device
        moments = {name: value.clone() for name, value in tensors.items() if name not in ("steps", "best")}
        self._adam.state[self.flat] = {
            name: value if name == "step" else value.to(device) for name, value in moments.items()
        }


def write_states(file: Path, key: str, states: Mapping[int, WidthState], progress: dict[str, Any]) -> None:
    """Writes all widths and the progress of a run, atomically.

    Args:
        file: Where to.
        key: What the run depends on; `read_states` wants the same.
        states: By width.
        progress: JSON.
    """
    tensors = {f"{width}.{name}": value for width, state in states.items() for name, value in state.tensors().items()}
    write_tensors(file, tensors, {"key": key, "progress": json.dumps(progress)})


def read_states(file: Path, key: str, states: Mapping[int, WidthState]) -> dict[str, Any] | None:
    """Loads what `write_states` wrote into the states of a run; None, and nothing loaded, where it is of another run.

    Raises:
        InputError: If the file is damaged.
    """
    tensors, metadata = read_tensors(file, fix="run the command again, which begins anew")
    if metadata.get("key") != key:
        return None
    try:
        for width, state in states.items():
            prefix = f"{width}."
            state.load({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        progress = json.loads(metadata["progress"])
        if not isinstance(progress, dict):
            raise TypeError("its progress is no object")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{file}: damaged ({error!r}); run the command again, which begins anew") from error
    return progress
