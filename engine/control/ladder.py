"""One dial over several policies: from text without loss, through drafts verified at fewer bits, to lossy decoding.

A *ladder* is a directory with an exported policy for each of its *rungs*, and a table of what each rung gave on
validation text: its speed by the clock and its output KL. Faster rungs lose more. Loading needs torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_json, write_json

LADDER_FILE = "ladder.json"
LADDER_VERSION = 1
Mode = Literal["lossless", "verified", "lossy"]
"""The text of the largest width, drafts verified at another one, or what reads each token once at fewer bits."""
_FIX = "make it again with `fq combine`"


@dataclass(frozen=True)
class Rung:
    """One setting of one policy.

    Attributes:
        folder: Where the policy is, within the ladder.
        policy: Its name.
        mode: What its text is.
        verify_width: The width that its text equals, of drafts and of plain decoding at one width; None of all others.
        kl_weight: Its dial; None where it has none.
        speedup_measured: Speed on validation text, by the clock, over the largest width everywhere.
        output_kl_nats: Mean output KL on validation text.
    """

    folder: str
    policy: str
    mode: Mode
    verify_width: int | None
    kl_weight: float | None
    speedup_measured: float
    output_kl_nats: float

    def words(self) -> str:
        """What to expect, in words."""
        how = "lossy" if self.verify_width is None else f"the text of {self.verify_width} bits"
        return (
            f"{self.policy}, {how}: {self.speedup_measured:.2f}x measured, output KL {self.output_kl_nats:.2e} nats "
            "(validation text)"
        )


@dataclass(frozen=True)
class Ladder:
    """The rungs of one model, slowest first; each is faster than those before, and loses more.

    Attributes:
        model_fingerprint: The nested model.
        reference: What the KL is against, in words.
        num_tokens: Tokens of validation text behind each KL.
        rungs: At least one.
    """

    model_fingerprint: str
    reference: str
    num_tokens: int
    rungs: tuple[Rung, ...]

    def chosen(self, speed: float | None = None, verify_width: int | None = None) -> Rung:
        """The rung that loses least among those that are asked for.

        Args:
            speed: At least so fast; None: the fastest lossless one, or the one that loses least if there is none.
            verify_width: Its text equals this width; the fastest one of them where no speed is given.

        Raises:
            InputError: If there is none, or the speed is none.
        """
        if speed is not None and not (speed > 0 and math.isfinite(speed)):
            raise InputError(f"speed {speed:g} must be positive and finite; ask for e.g. 1.5")
        rungs = [rung for rung in self.rungs if verify_width is None or rung.verify_width == verify_width]
        if not rungs:
            known = sorted({rung.verify_width for rung in self.rungs if rung.verify_width is not None})
            raise InputError(
                f"verify width {verify_width} is on no rung; "
                + (f"choose one of {', '.join(map(str, known))}" if known else "no rung verifies, so leave it out")
            )
        if speed is not None:
            fast = [rung for rung in rungs if rung.speedup_measured >= speed]
            if not fast:
                fastest = max(rung.speedup_measured for rung in rungs)
                raise InputError(f"speed {speed:g} is beyond {fastest:.2f}, the fastest rung; ask for less")
            return min(fast, key=lambda rung: rung.output_kl_nats)
        if verify_width is not None:
            return rungs[-1]
        lossless = [rung for rung in rungs if rung.mode == "lossless"]
        return lossless[-1] if lossless else rungs[0]


def front(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """Those that no other is at least as good as in both speed and KL, slowest first."""
    kept: list[Rung] = []
    for rung in sorted(rungs, key=lambda one: (-one.speedup_measured, one.output_kl_nats)):
        if not kept or rung.output_kl_nats < kept[-1].output_kl_nats:
            kept.append(rung)
    return tuple(reversed(kept))


def is_ladder(directory: Path) -> bool:
    """Whether a directory is meant as one."""
    return (directory / LADDER_FILE).is_file()


def write_ladder(directory: Path, ladder: Ladder) -> None:
    """Writes the table beside the policies."""
    write_json(directory / LADDER_FILE, {"version": LADDER_VERSION, **asdict(ladder)})


def read_ladder(directory: Path) -> Ladder:
    """Reads the table of a ladder; the policies are read one at a time, by `load_policy`.

    Raises:
        InputError: If there is no whole one.
    """
    path = directory / LADDER_FILE
    try:
        data = read_json(path)
        version = data.pop("version")
        if version == LADDER_VERSION:
            return _checked(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no readable ladder ({error}); {_FIX}") from error
    raise InputError(f"{path}: version {version}, this is {LADDER_VERSION}; {_FIX}")


def _checked(data: dict[str, Any]) -> Ladder:
    names = {field.name for field in fields(Rung)}
    if any(rung.keys() != names for rung in data["rungs"]):
        raise ValueError(f"a rung has {', '.join(sorted(names))}")
    ladder = Ladder(**{**data, "rungs": tuple(Rung(**rung) for rung in data["rungs"])})
    numbers = [number for rung in ladder.rungs for number in (rung.speedup_measured, rung.output_kl_nats)]
    numbers += [rung.kl_weight for rung in ladder.rungs if rung.kl_weight is not None]
    rules = {
        "there is a rung": bool(ladder.rungs),
        "numbers are finite and not negative": all(
            type(number) in (int, float) and math.isfinite(number) and number >= 0 for number in numbers
        ),
        "folders are names": all(
            isinstance(rung.folder, str) and Path(rung.folder).name == rung.folder and rung.folder not in ("", "..")
            for rung in ladder.rungs
        ),
        "modes are known": all(rung.mode in get_args(Mode) for rung in ladder.rungs),
        "verify widths are whole": all(
            rung.verify_width is None or type(rung.verify_width) is int for rung in ladder.rungs
        ),
        "the rungs are a front, slowest first": front(ladder.rungs) == ladder.rungs,
        "names are text": all(isinstance(rung.policy, str) for rung in ladder.rungs)
        and isinstance(ladder.model_fingerprint, str)
        and isinstance(ladder.reference, str),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"in a ladder {rule}")
    return ladder
