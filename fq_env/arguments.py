"""What a caller hands to an environment: actions, seeds, options of `reset` and keywords, or one line that says no."""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexquant_rl.engine.decoding.sampling_bounds import check_seed
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import shown


def actions_of(given: Any, space: gym.Space[Any], num_rows: int | None = None) -> Tensor:
    """Actions of R rows as a task takes them.

    Args:
        given: An action, or `[num_rows, ...]` of them; integers in any form.
        space: Actions of one row.
        num_rows: Rows; None for an action alone, which becomes a batch of one.

    Returns:
        `[R, ...]` int64.

    Raises:
        InputError: If they are not whole numbers, of another shape, or outside the space.
    """
    try:
        actions = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, or a tensor on another device
        raise InputError(f"action {shown(given)} is not an array ({error}); give one of {shown(space)}") from error
    if actions.dtype.kind not in "iu":
        raise InputError(f"action {shown(given)} is not of 64-bit integers; give one of {shown(space)}")
    shape = (*(() if num_rows is None else (num_rows,)), *(space.shape or ()))
    if actions.shape != shape:
        raise InputError(f"the action has shape {actions.shape}, not {shape}; give one of {shown(space)}")
    low, high = _bounds(space)
    outside = (actions < low) | (actions > high)
    if outside.any():
        place = tuple(np.argwhere(outside)[0].tolist())
        where = f" at {list(place)}" if place else ""
        raise InputError(f"action {actions[place]}{where} is out of range; give one of {shown(space)}")
    batch = torch.as_tensor(actions, dtype=torch.int64)
    return batch[None] if num_rows is None else batch


def seed_of(given: Any) -> int | None:
    """A seed of `reset`, None where there is none.

    Raises:
        InputError: If it is not an integer of 64 bits, or negative.
    """
    if given is None:
        return None
    seed = _integer(given, "seed")
    check_seed(seed)
    return seed


def options_of(given: Any, known: Sequence[str]) -> Mapping[str, Any]:
    """The options of a `reset`; empty where there are none.

    Raises:
        InputError: If they are no dictionary, or one is not known.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"options={shown(given)} is not a dictionary; known options are {', '.join(known)}")
    check_names("reset option", given, known)
    return given


def window_of(given: Any, num_windows: int) -> int:
    """The option `window`: the index of a text; beyond the last one it goes on with the first.

    Raises:
        InputError: If it is not an integer.
    """
    return _integer(given, "window") % num_windows


def number_of(given: Any, name: str) -> float:
    """A real number, of Python or NumPy.

    Raises:
        InputError: If it is anything else.
    """
    if isinstance(given, (bool, np.bool_)) or not isinstance(given, (int, float, np.integer, np.floating)):
        raise InputError(f"{name}={_shown(given)} is not a number; give one")
    try:
        return float(given)
    except OverflowError as error:
        raise InputError(f"{name}={_shown(given)} is too large; give a smaller number") from error


def check_names(what: str, given: Iterable[Any], known: Sequence[str]) -> None:
    """Raises InputError on a name that is not known, with those that are."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"{what} {shown(name)} is not known; {hint}there are {', '.join(known)}")


def check_texts(texts: Any) -> tuple[str, ...]:
    """Text files as a tuple of paths; one path alone is one file.

    Raises:
        InputError: If they are not paths.
    """
    given = (texts,) if isinstance(texts, (str, os.PathLike)) else texts
    if not isinstance(given, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in given):
        raise InputError(f"texts={shown(texts)} must be paths of text files; give a list of them")
    return tuple(map(str, given))


def _integer(given: Any, name: str) -> int:
    if isinstance(given, (bool, np.bool_)):
        raise InputError(f"{name}={_shown(given)} is not an integer; give one")
    try:
        return operator.index(given)
    except TypeError as error:
        raise InputError(f"{name}={_shown(given)} is not an integer; give one") from error


def _bounds(space: gym.Space[Any]) -> tuple[NDArray[Any] | int, NDArray[Any] | int]:
    """The smallest and the largest action, elementwise; the limits of int64 for spaces that have none of their own."""
    if isinstance(space, gym.spaces.Discrete):
        return int(space.start), int(space.start + space.n - 1)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, gym.spaces.MultiBinary):
        return 0, 1
    if isinstance(space, gym.spaces.Box):
        return space.low, space.high
    limits = np.iinfo(np.int64)
    return int(limits.min), int(limits.max)


def _shown(given: Any) -> str:
    """A value as its caller wrote it, not as NumPy prints its own."""
    return shown(given.item() if isinstance(given, np.generic) else given)
