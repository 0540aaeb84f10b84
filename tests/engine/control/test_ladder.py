"""Ladders: which rungs are kept, which one is taken, and files that are none."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexquant_rl.engine.control.ladder import LADDER_FILE, Ladder, Rung, front, read_ladder, write_ladder
from flexquant_rl.engine.errors import InputError


def rung(speed: float, kl_nats: float, verify: int | None = None, folder: str = "00") -> Rung:
    mode: Any = "lossy" if verify is None else "lossless" if verify == 8 else "verified"
    return Rung(folder, f"p{speed:g}", mode, verify, None, speed, kl_nats)


NO_SPEEDS = (0.0, -1.0, float("inf"), float("nan"))
LADDER = Ladder(
    "f" * 64,
    "unquantised",
    99,
    (rung(1.0, 0.001), rung(1.3, 0.002, 8), rung(1.4, 0.003, 6), rung(1.5, 0.01, 6), rung(1.9, 0.1)),
)


@given(st.lists(st.tuples(st.floats(0.1, 4), st.floats(0, 3)), min_size=1, max_size=12))
def test_a_front_is_what_no_other_rung_beats(points: list[tuple[float, float]]) -> None:
    rungs = [rung(speed, kl_nats) for speed, kl_nats in points]
    kept = front(rungs)
    assert front(kept) == kept
    for one in rungs:
        beaten = any(
            other.speedup_measured >= one.speedup_measured and other.output_kl_nats <= one.output_kl_nats
            for other in kept
            if other is not one
        )
        assert (one in kept) or beaten
    for slow, fast in pairwise(kept):
        assert slow.speedup_measured < fast.speedup_measured
        assert slow.output_kl_nats < fast.output_kl_nats


def test_the_rung_that_loses_least_is_taken() -> None:
    assert LADDER.chosen() == LADDER.rungs[1]
    assert LADDER.chosen(1.0) == LADDER.rungs[0]
    assert LADDER.chosen(1.31) == LADDER.rungs[2]
    assert LADDER.chosen(verify_width=6) == LADDER.rungs[3]
    assert LADDER.chosen(1.2, verify_width=6) == LADDER.rungs[2]
    lossy = Ladder("f", "r", 1, (rung(1.0, 0.1), rung(2.0, 0.2)))
    assert lossy.chosen() == lossy.rungs[0]
    for ladder, wrong, message in (
        (LADDER, {"speed": 2.0}, "speed 2 is beyond 1.90"),
        *((LADDER, {"speed": speed}, f"speed {speed:g} must be positive and finite") for speed in NO_SPEEDS),
        (LADDER, {"speed": -1.0, "verify_width": 5}, "positive and finite"),
        (LADDER, {"speed": 1.6, "verify_width": 6}, "beyond 1.50"),
        (LADDER, {"verify_width": 5}, "choose one of 6, 8"),
        (lossy, {"verify_width": 5}, "no rung verifies"),
    ):
        with pytest.raises(InputError, match=message):
            ladder.chosen(**wrong)


def test_a_ladder_goes_through_its_file(tmp_path: Path) -> None:
    write_ladder(tmp_path, LADDER)
    assert read_ladder(tmp_path) == LADDER
    path = tmp_path / LADDER_FILE
    whole = json.loads(path.read_text())
    first = whole["rungs"][0]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"version": 9}, "version 9"),
        ({"rungs": []}, "there is a rung"),
        ({"rungs": whole["rungs"][::-1]}, "slowest first"),
        *(({"rungs": [first | {"folder": folder}]}, "folders are names") for folder in ("../x", "..", ".", "", "/x")),
        ({"rungs": [first | {"mode": "fast"}]}, "modes are known"),
        ({"rungs": [first | {"speedup_measured": "fast"}]}, "finite|str"),
        ({"rungs": [first | {"output_kl_nats": None}]}, "finite|None"),
        ({"rungs": [{"folder": "x"}]}, "a rung has"),
        ({"model_fingerprint": 3}, "names are text"),
    ]
    for change, message in wrong:
        path.write_text(json.dumps(whole | change))
        with pytest.raises(InputError, match=message):
            read_ladder(tmp_path)
    for text in ("", "[]", "3", '{"version": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match="no readable ladder"):
            read_ladder(tmp_path)
