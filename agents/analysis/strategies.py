"""Strategies of quantisation by name: how codes are chosen, what scales are fitted to, how large a group is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flexquant_rl.engine.benches.gguf_types import QuantiserType
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.quantize import check_format

STORED = "stored"
"""The only strategy of a nested checkpoint: what it holds, as it is."""

PEER_TYPES: tuple[tuple[QuantiserType, int], ...] = (
    ("Q4_0", 4),
    ("IQ4_NL", 4),
    ("Q4_K_M", 4),
    ("Q5_0", 5),
    ("Q8_0", 8),
)
"""Types of llama.cpp that are measured beside ours, and the bits in their names."""
PEER_GROUPS = (64, 128)
PEER_WIDTHS = (3, 4)
"""Group sizes and bits of HQQ that are measured beside ours."""
LLAMA_CPP, HQQ = "llama.cpp", "hqq"
"""Libraries whose formats are measured beside ours; a row's strategy begins with one of them and a colon."""

RECIPES: dict[str, tuple[Literal["rtn", "gptq"], bool, bool, bool]] = {
    "rtn": ("rtn", False, False, False),
    "rtn-rotated": ("rtn", False, False, True),
    "rtn-text": ("rtn", True, False, False),
    "rtn-tuned": ("rtn", True, True, False),
    "gptq": ("gptq", True, False, False),
    "gptq-rotated": ("gptq", True, False, True),
    "gptq-tuned": ("gptq", True, True, False),
    "gptq-rotated-tuned": ("gptq", True, True, True),
}
"""Method, whether calibrated, tuned and rotated, by name."""
_GROUP_SIZE = 128
_CHEAP = ("rtn:32", "rtn:64", "rtn", "rtn-text")
_DEAR, _DEAR_UNROTATED = ("gptq", "gptq-rotated", "gptq-rotated-tuned"), ("gptq", "gptq-tuned")
# gptq takes two seconds for a million weights, tuning ten: more than a sample may cost.
_DEAR_UP_TO = 20_000_000


@dataclass(frozen=True)
class Strategy:
    """One way to quantise a model.

    Attributes:
        method: How codes are chosen.
        calibrated: Whether scales are fitted to text; gptq fits its codes to it too.
        tuned: Whether scales then follow the KL of the whole model.
        rotated: Whether the model is rotated before.
        group_size: Consecutive inputs that share a scale and an offset.
    """

    method: Literal["rtn", "gptq"]
    calibrated: bool
    tuned: bool
    rotated: bool
    group_size: int

    @property
    def name(self) -> str:
        """`recipe` in groups of 128, else `recipe:group size`."""
        what = (self.method, self.calibrated, self.tuned, self.rotated)
        recipe = next(key for key, value in RECIPES.items() if value == what)
        return recipe if self.group_size == _GROUP_SIZE else f"{recipe}:{self.group_size}"

    def untuned(self) -> Strategy:
        """What tuning begins with."""
        return replace(self, tuned=False)


def is_peer(name: str) -> bool:
    """Whether a row's strategy is another library's."""
    return name.partition(":")[0] in (LLAMA_CPP, HQQ)


def parse_strategy(name: str) -> Strategy:
    """Reads `gptq`, `rtn-text:64` and so on.

    Raises:
        InputError: If there is no such recipe or group size.
    """
    recipe, separator, size = name.partition(":")
    if recipe not in RECIPES:
        raise InputError(
            f"{name!r} is no strategy; use {', '.join(RECIPES)}, with a group size behind a colon as in gptq:64"
        )
    if separator:
        if not size.isdecimal():
            raise InputError(f"{name!r} has group size {size!r}, which is no number; use e.g. gptq:64")
        try:
            check_format(int(size), (8,))
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from error
    return Strategy(*RECIPES[recipe], int(size) if separator else _GROUP_SIZE)


def default_strategies(num_weights: int, *, rotatable: bool) -> tuple[str, ...]:
    """What is analysed of a model unless told otherwise; of a small one last what `fq quantize` makes of it."""
    if num_weights > _DEAR_UP_TO:
        return _CHEAP
    return (*_CHEAP, *(_DEAR if rotatable else _DEAR_UNROTATED))


def by_start(strategies: Iterable[Strategy]) -> list[tuple[Strategy, Sequence[Strategy]]]:
    """What is quantised once, each with the strategies that begin with it, the one without tuning first."""
    found: dict[Strategy, list[Strategy]] = {}
    for strategy in dict.fromkeys(strategies):
        found.setdefault(strategy.untuned(), []).append(strategy)
    return [(start, sorted(members, key=lambda one: one.tuned)) for start, members in found.items()]


def recipe_text(name: str) -> str:
    """A strategy in words, for reports."""
    if name == STORED:
        return "the checkpoint as it is stored"
    library, _, form = name.partition(":")
    if library == LLAMA_CPP:
        return f"what llama.cpp's own quantiser makes of the model when it is asked for {form}, without text"
    if library == HQQ:
        return f"HQQ with its own settings, {form.replace('g', 'groups of ')}, without text; every matrix, the head too"
    strategy = parse_strategy(name)
    codes = {"rtn": "codes to nearest", "gptq": "codes fitted to the outputs (gptq)"}[strategy.method]
    scales = "scales of the weights" if not strategy.calibrated else "scales fitted to the outputs"
    tuned = ", then tuned to the KL of the model" if strategy.tuned else ""
    rotated = "the model rotated, " if strategy.rotated else ""
    return f"{rotated}{codes}, {scales}{tuned}; groups of {strategy.group_size}"
