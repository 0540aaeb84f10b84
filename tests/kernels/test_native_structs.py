"""The check that Python and C++ have the same structs and constants: it passes, and it notices every change."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flexquant_rl.kernels import native, native_build, native_structs, signal_constants
from flexquant_rl.kernels.native_structs import STRUCTS, LibraryMismatchError, check_library, mirrored

CONSTANTS = [name for name in dir(signal_constants) if name.isupper() and name != "TOKENS_SINCE_PROBE_LIMIT"]
CODES = native._CODES

pytestmark = pytest.mark.skipif(not native.supported_isas(), reason="no C++ compiler here, so no native kernels")


@pytest.fixture
def library() -> ctypes.CDLL:
    library = native.load_library()
    assert library is not None
    return library


def changed_struct(name: str, change: str) -> type[ctypes.Structure]:
    """A copy of a struct with one mistake."""
    fields = list(STRUCTS[name]._fields_)
    if change == "missing":
        del fields[-1]
    elif change == "more":
        fields.append(("extra", ctypes.c_int64))
    elif change == "renamed":
        fields[1] = ("other", fields[1][1])
    elif change == "swapped":
        fields[0], fields[1] = fields[1], fields[0]
    else:  # a number of the same size and another kind
        index = max(i for i, (_, kind, *_) in enumerate(fields) if kind in (ctypes.c_int64, ctypes.c_int32))
        other = {ctypes.c_int64: ctypes.c_void_p, ctypes.c_int32: ctypes.c_float}
        fields[index] = (fields[index][0], other[fields[index][1]])
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize("change", ["missing", "more", "renamed", "swapped", "kind"])
@pytest.mark.parametrize("name", STRUCTS)
def test_a_changed_struct_is_noticed(
    library: ctypes.CDLL, name: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(native_structs.STRUCTS, name, changed_struct(name, change))
    with pytest.raises(LibraryMismatchError, match=f"disagree: .*{name}[ .].* in C\\+\\+ and .* in Python.*reinstall"):
        check_library(library, CODES)


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_changed_constant_of_the_signals_is_noticed(
    library: ctypes.CDLL, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = getattr(signal_constants, name)
    monkeypatch.setattr(signal_constants, name, value * 1.000001 if isinstance(value, float) else value + 1)
    with pytest.raises(LibraryMismatchError, match=f"k{name.title().replace('_', '')} is "):
        check_library(library, CODES)


@pytest.mark.parametrize("name", [*CODES, "kPaddedWidths", "kCacheBlock", "kMaxHidden", "kMaxInputs", "kAbiVersion"])
def test_another_limit_or_code_is_noticed(library: ctypes.CDLL, name: str) -> None:
    with pytest.raises(LibraryMismatchError, match=f"{name} is "):
        check_library(library, {**CODES, name: 77})


def test_a_code_that_only_one_side_has_is_noticed(library: ctypes.CDLL) -> None:
    with pytest.raises(LibraryMismatchError, match="kOther is missing in C\\+\\+ and 1 in Python"):
        check_library(library, {**CODES, "kOther": 1})
    with pytest.raises(LibraryMismatchError, match=r"kMaxTokens is 16.0 in C\+\+ and missing in Python"):
        check_library(library, {name: code for name, code in CODES.items() if name != "kMaxTokens"})


def test_only_the_first_few_differences_are_listed(library: ctypes.CDLL) -> None:
    with pytest.raises(LibraryMismatchError, match="and 7 more. Change both"):
        check_library(library, {})


@pytest.mark.parametrize(
    ("header", "old", "new", "message"),
    [
        ("signal_constants.h", "kEmaDecay = 0.9f", "kEmaDecay = 0.8f", "kEmaDecay is 0.80.* and 0.9 "),
        ("control.h", "entropy, entropy_ema,", "entropy_ema, entropy,", "FqControl.entropy offset is "),
        ("decoder.h", "int32_t group_size;", "int64_t group_size;", "FqDecoder size is "),
        ("decoder.h", "float norm_epsilon;", "int32_t norm_epsilon;", "FqDecoder.norm_epsilon kind is 0.0 .* and 1 "),
        ("bitplane_gemv.h", "kFqInt8 = 0, kFqFloat32 = 1", "kFqFloat32 = 0, kFqInt8 = 1", "kFqInt8 is 1.0 "),
        ("kernels_internal.h", "kAbiVersion = 2", "kAbiVersion = 3", "kAbiVersion is 3.0 "),
    ],
)
def test_changed_headers_are_noticed(tmp_path: Path, header: str, old: str, new: str, message: str) -> None:
    """The list is compiled from other headers; nothing else is, which takes half a minute."""
    for path in native_build.SOURCE_DIR.glob("*.h"):
        shutil.copy(path, tmp_path)
    shutil.copy(native_build.SOURCE_DIR / "mirror.cpp", tmp_path)
    text = (tmp_path / header).read_text()
    assert old in text
    (tmp_path / header).write_text(text.replace(old, new))
    command = [*native_build._compilers()[0], "-shared", "-fPIC", "-std=c++17", "mirror.cpp", "-o", "mirror.so"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with pytest.raises(LibraryMismatchError, match=message):
        check_library(ctypes.CDLL(str(tmp_path / "mirror.so")), CODES)


def test_a_mismatch_is_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_constants, "RECENT_TOKENS", 17)
    native.load_library.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(LibraryMismatchError, match=r"kRecentTokens is 16.0 in C\+\+ and 17 in Python"):
                native.load_library()
    finally:
        native.load_library.cache_clear()


def test_a_library_of_another_time_is_an_error() -> None:
    with pytest.raises(LibraryMismatchError, match="no library of this version"):
        check_library(ctypes.CDLL(None), CODES)


def test_the_list_leaves_out_no_field(library: ctypes.CDLL) -> None:
    headers = "\n".join(path.read_text() for path in native_build.SOURCE_DIR.glob("*.h"))
    headers = re.sub("//.*", "", headers)
    listed = {name.removesuffix(" offset") for name in mirrored(library) if name.endswith(" offset")}
    declared = set()
    for name, body in re.findall(r"struct (Fq\w+) \{(.*?)\n\};", headers, re.DOTALL):
        for declaration in body.split(";"):
            declared |= {f"{name}.{field.split()[-1].lstrip('*')}" for field in declaration.split(",") if field.strip()}
    assert declared == listed
