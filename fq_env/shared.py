"""Models, texts and profiles that environments share: made once in a process, however many environments there are.

What is kept is what decides the result: of a directory or file its resolved path and the size and time of its files, so
that a model that is written anew is read anew. The last few are kept, a nested model for as long as it is among them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.output_kl import reference_name
from flexquant_rl.engine.control.profile import Profile, profile_model
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.prompts import PromptWindows, load_windows, profile_windows

T = TypeVar("T")


class Shelf(Generic[T]):
    """Keeps the results that were asked for last; several threads may ask for one at once, and it is made once.

    Args:
        max_entries: Results kept.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result under a key, made now if it is not there. Nothing is kept of a failure."""
        with self._lock:  # also while it is made: who asks for the same waits for it
            if key not in self._entries:
                self._entries[key] = make()
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
            return self._entries[key]

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()


_MODELS: Shelf[NestedCausalLM] = Shelf(
    2
)  # about 5 bytes per weight with the reference, and up to 2 GiB of decoded matrices
_WINDOWS: Shelf[PromptWindows] = Shelf(4)  # up to 20 MB each
_PROFILES: Shelf[Profile] = Shelf(8)  # a few kilobytes each


def shared_model(model: str | None) -> NestedCausalLM:
    """The nested model of a directory or hub name, default quantisation; the embedded one for None. Do not change it.

    Raises:
        InputError: If there is no such model, or it cannot be nested.
    """
    path, config = resolve_model(model), QuantizationConfig()
    return _MODELS.get((path, _identity(Path(path)), config), lambda: load_model(path, config))


def shared_windows(
    model: NestedCausalLM, length: int, texts: Sequence[Path], text_field: str | None = None
) -> PromptWindows:
    """The windows of `length` tokens of some texts, as `load_windows` cuts them.

    Raises:
        InputError: If a text cannot be read or holds no window.
    """
    key = (model.tokenizer, length, tuple(_identity(path) or path for path in texts), text_field)
    return _WINDOWS.get(key, lambda: load_windows(model.tokenizer, length, texts, text_field=text_field))


def shared_profile(model: NestedCausalLM, windows: PromptWindows) -> Profile:
    """The profile of a model, measured on training windows; latency from the roofline."""
    read = profile_windows(model, windows.train)
    key = (model.fingerprint, reference_name(model), tuple(read.shape), read.numpy().tobytes())
    return _PROFILES.get(key, lambda: profile_model(model, read, roofline_cost(model)))


def forget_shared() -> None:
    """Forgets all models, texts and profiles; memory is freed once the environments that use them are gone."""
    for shelf in (_MODELS, _WINDOWS, _PROFILES):
        shelf.clear()


def _identity(path: Path) -> Hashable:
    """What tells whether a file, or the files of a directory, are still the same; () if there is nothing."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return tuple((str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats)
