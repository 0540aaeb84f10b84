"""A body is taken only where every extension that it is compiled for is there."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest

from flexquant_rl.kernels import native
from flexquant_rl.kernels.native import ISA_CODES

# FqCpuFeature of cpp/bitplane_gemv.h; the names are those of /proc/cpuinfo.
FEATURES = {
    "avx2": 1,
    "fma": 2,
    "f16c": 4,
    "avx512f": 8,
    "avx512bw": 16,
    "avx512vl": 32,
    "avx512dq": 64,
    "avx512_vnni": 128,
}
NEEDED = {"avx2": ("avx2", "fma", "f16c"), "avx512": tuple(FEATURES)}
EVERY = sum(FEATURES.values())

pytestmark = [
    pytest.mark.skipif(not native.supported_isas(), reason="no C++ compiler here, so no native kernels"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have the portable body only"),
]


@pytest.fixture
def library() -> ctypes.CDLL:
    library = native.load_library()
    assert library is not None
    return library


@pytest.mark.parametrize(("isa", "feature"), [(isa, feature) for isa in NEEDED for feature in NEEDED[isa]])
def test_without_an_extension_its_body_is_not_taken(library: ctypes.CDLL, isa: str, feature: str) -> None:
    code = ISA_CODES[isa]
    needed = sum(FEATURES[name] for name in NEEDED[isa])
    assert library.fq_isa_runs_with(code, needed)
    assert library.fq_isa_runs_with(code, EVERY)
    assert not library.fq_isa_runs_with(code, EVERY - FEATURES[feature])


def test_the_portable_body_needs_nothing(library: ctypes.CDLL) -> None:
    assert library.fq_isa_runs_with(ISA_CODES["portable"], 0)
    assert not library.fq_isa_runs_with(len(ISA_CODES), EVERY)


def test_this_machine(library: ctypes.CDLL) -> None:
    features = library.fq_cpu_features()
    supported = tuple(isa for isa, code in ISA_CODES.items() if library.fq_isa_runs_with(code, features))
    assert sorted(native.supported_isas()) == sorted(supported)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
    assert features == sum(bit for name, bit in FEATURES.items() if name in flags)
