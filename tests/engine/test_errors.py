"""One line, whatever is put into it."""

from __future__ import annotations

import copy

from hypothesis import given
from hypothesis import strategies as st

from flexquant_rl.engine.errors import InputError


@given(value=st.text(max_size=3000))
def test_a_message_is_one_printable_line(value: str) -> None:
    text = str(InputError(f"version {value} is not known; use 2"))
    assert len(text) <= 1005
    assert text.isprintable()
    assert text.startswith("version ")
    assert text.endswith("; use 2")


def test_what_breaks_a_line_is_shown() -> None:
    assert str(InputError("a\rb\nc\x1b[2Jd\u2028e")) == "a b c\\x1b[2Jd e"
    assert str(InputError("café → 3 bits")) == "café → 3 bits"


def test_a_copy_says_the_same() -> None:
    """As when a worker process sends it."""
    assert str(copy.copy(InputError("width=9 is not stored"))) == "width=9 is not stored"
