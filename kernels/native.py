"""CPU product over bitplanes: builds and loads the C++ kernels of kernels/cpp, and calls them on torch tensors.

The library has a plain C ABI and is loaded with ctypes, so it needs neither torch nor Python headers and survives their
upgrades. An installation has compiled it; from sources without one, or newer than it, it is compiled on first use into
a per-user cache (native_build.py).
"""

import ctypes
import functools
import os
import warnings
from typing import Literal

import torch
from torch import Tensor

from flexquant_rl.kernels.bitplane import NUM_PLANES, NestedWeight, check_bit_width
from flexquant_rl.kernels.native_build import BuildError, build_library
from flexquant_rl.kernels.native_structs import WeightStruct, check_library

Isa = Literal["avx512", "avx2", "portable"]
Mode = Literal["int8", "float32"]

MAX_TOKENS = 16
ISA_VARIABLE = "FQ_CPU_ISA"

ISA_CODES: dict[str, int] = {"portable": 0, "avx2": 1, "avx512": 2}
MODE_CODES: dict[str, int] = {"int8": 0, "float32": 1}
OK, BAD_ARGUMENT, UNSUPPORTED_ISA, OUT_OF_MEMORY = range(4)
STATUS_TEXTS = {
    BAD_ARGUMENT: "bad argument",
    UNSUPPORTED_ISA: "instruction set not supported",
    OUT_OF_MEMORY: "out of memory",
}
_CODES = {
    "kMaxTokens": MAX_TOKENS,
    "kFqPortable": ISA_CODES["portable"],
    "kFqAvx2": ISA_CODES["avx2"],
    "kFqAvx512": ISA_CODES["avx512"],
    "kFqInt8": MODE_CODES["int8"],
    "kFqFloat32": MODE_CODES["float32"],
    "kFqOk": OK,
    "kFqBadArgument": BAD_ARGUMENT,
    "kFqUnsupportedIsa": UNSUPPORTED_ISA,
    "kFqOutOfMemory": OUT_OF_MEMORY,
}


class NativeGemv:
    """Multiplies activations by one nested weight with the native kernels.

    The result is the same, bit for bit, for any number of threads and whichever tokens share a call. It carries no
    gradient. The weight's tensors are read in place and must not be freed or resized while this object is in use (it
    holds references); writing to them is seen by the next call.

    Attributes:
        weight: The nested weight, on the CPU.
        num_threads: Threads used at most; small products use fewer. 1 involves no pool.
        mode: "int8" rounds activations to int8 with one scale per 32 inputs; "float32" keeps them.
        isa: The body in use.

    Raises:
        ValueError: If the weight is not on the CPU, not laid out in whole rows or not aligned, or if an option has a
            value that does not exist.
        RuntimeError: If the library cannot be loaded; `load_library` says beforehand.
    """

    def __init__(
        self, weight: NestedWeight, *, num_threads: int = 1, mode: Mode = "int8", isa: Isa | None = None
    ) -> None:
        """Checks the weight once, so that a call has only its own arguments to check."""
        library = load_library()
        if library is None:
            raise RuntimeError("the native kernels could not be built; use flexquant_rl.kernels.reference instead")
        if mode not in MODE_CODES:
            raise ValueError(f"mode={mode!r} does not exist; use one of {', '.join(MODE_CODES)}")
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads} must be at least 1; use 1 for no pool")
        check_weight(weight)
        self.weight = weight
        self.num_threads = num_threads
        self.mode: Mode = mode
        self.isa: Isa = choose_isa(isa)
        self._gemv = library.fq_gemv
        self._structs = {width: weight_struct(weight, width) for width in range(1, NUM_PLANES + 1)}
        self._pointers = {width: ctypes.addressof(struct) for width, struct in self._structs.items()}
        self._options = (MODE_CODES[mode], ISA_CODES[self.isa], num_threads)

    def __call__(self, x: Tensor, *, bit_width: int, out: Tensor | None = None) -> Tensor:
        """Computes ``x @ W.T`` with the top `bit_width` planes, accumulated in float32.

        Shapes: M tokens (1..16), K input features, N output features.

        Args:
            x: Activations, `[M, K]` float32 on the CPU, unit stride in K.
            bit_width: Planes to read, 1..8; no other plane is touched.
            out: Result, `[M, N]` float32 on the CPU, unit stride in N; allocated if not given.

        Returns:
            `out`, or a new tensor.

        Raises:
            ValueError: If a tensor has another dtype, shape, device, stride or alignment, or `bit_width` is not in
                1..8.
        """
        check_bit_width(bit_width)
        weight = self.weight
        _check_matrix("x", x, weight.num_inputs)
        num_tokens = x.shape[0]
        if not 1 <= num_tokens <= MAX_TOKENS:
            raise ValueError(
                f"x has {num_tokens} tokens but the kernel takes 1 to {MAX_TOKENS}; dequantize the weight for more"
            )
        if out is None:
            out = torch.empty(num_tokens, weight.num_outputs, dtype=torch.float32)
        else:
            _check_matrix("out", out, weight.num_outputs)
            if out.shape[0] != num_tokens:
                raise ValueError(f"out has {out.shape[0]} rows but x has {num_tokens}; allocate [{num_tokens}, N]")
        status = self._gemv(
            self._pointers[bit_width],
            x.data_ptr(),
            x.stride(0),
            num_tokens,
            out.data_ptr(),
            out.stride(0),
            *self._options,
        )
        if status != OK:
            raise RuntimeError(f"native kernel failed: {STATUS_TEXTS.get(status, status)}")
        return out


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Finds the library, or compiles it if need be, and loads it.

    Returns:
        The library, or None (after one RuntimeWarning) if it can be neither found nor built; later calls return the
        same.

    Raises:
        LibraryMismatchError: If structs or constants differ between the library and the Python files.
    """
    try:
        library = ctypes.CDLL(str(build_library()))
    except (OSError, BuildError) as error:
        warnings.warn(f"no native CPU kernels, falling back to torch (slow): {error}", RuntimeWarning, stacklevel=2)
        return None
    check_library(library, _CODES)
    int64, int32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    library.fq_gemv.argtypes = (pointer, pointer, int64, int64, pointer, int64, int32, int32, int32)
    library.fq_read_bytes.argtypes = (pointer, int64, int32, int32)
    library.fq_read_bytes.restype = ctypes.c_uint64
    return library


def supported_isas() -> tuple[Isa, ...]:
    """Returns the bodies that this machine can run, fastest first; empty if there is no library."""
    library = load_library()
    if library is None:
        return ()
    names: tuple[Isa, ...] = ("avx512", "avx2", "portable")
    return tuple(name for name in names if library.fq_isa_supported(ISA_CODES[name]))


def read_bytes(data: Tensor, *, num_threads: int = 1, isa: Isa | None = None) -> int:
    """Reads a contiguous CPU tensor once with a plain vector loop; benchmarks compare bandwidths with it.

    Args:
        data: Any dtype and shape.
        num_threads: Threads that share the reading.
        isa: Body whose loop is used; default as for `NativeGemv`.

    Returns:
        A checksum without meaning, so that the reads cannot be left out.

    Raises:
        ValueError: If `data` is not a contiguous CPU tensor.
        RuntimeError: If there is no library.
    """
    if data.device.type != "cpu" or not data.is_contiguous():
        raise ValueError(f"data is on {data.device}, strides {data.stride()}; pass a contiguous CPU tensor")
    library = load_library()
    if library is None:
        raise RuntimeError("the native kernels could not be built")
    code = ISA_CODES[choose_isa(isa)]
    return int(library.fq_read_bytes(data.data_ptr(), data.nbytes, code, num_threads))


def choose_isa(isa: str | None) -> Isa:
    """Returns the requested body, else the one $FQ_CPU_ISA names, else the fastest."""
    supported = supported_isas()
    requested = isa if isa is not None else os.environ.get(ISA_VARIABLE) or None
    if requested is None:
        return supported[0]
    if requested not in supported:
        source = "isa" if isa is not None else ISA_VARIABLE
        raise ValueError(f"{source}={requested} but this machine runs {', '.join(supported)}; use one of these")
    return requested


def check_weight(weight: NestedWeight) -> None:
    """Raises ValueError unless the kernel can walk the weight's tensors by address."""
    planes, num_words = weight.planes, weight.planes.shape[2]
    for name, tensor in (("planes", planes), ("scale", weight.scale), ("offset", weight.offset)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} are on {tensor.device}; move the weight to the CPU or use another backend")
        if tensor.data_ptr() % tensor.itemsize != 0:
            raise ValueError(f"{name} are not aligned to {tensor.itemsize} bytes; clone the tensor")
    if weight.num_outputs < 1:
        raise ValueError("the weight has no outputs; there is nothing to multiply")
    if planes.stride()[1:] != (num_words, 1) or planes.stride(0) < weight.num_outputs * num_words:
        raise ValueError(
            f"planes have strides {planes.stride()} but rows of {num_words} words must be adjacent; call contiguous()"
        )
    for name, tensor in (("scale", weight.scale), ("offset", weight.offset)):
        if not tensor[0].is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()} but a width must be contiguous; call contiguous()")


def _check_matrix(name: str, matrix: Tensor, num_columns: int) -> None:
    """Raises ValueError unless `matrix` is a float32 CPU matrix with unit stride in its columns."""
    if matrix.dtype != torch.float32 or matrix.device.type != "cpu":
        raise ValueError(f"{name} is {matrix.dtype} on {matrix.device}; pass float32 on the CPU")
    if matrix.dim() != 2 or matrix.shape[1] != num_columns:
        raise ValueError(f"{name} is {list(matrix.shape)} but must have {num_columns} columns; pass [M, {num_columns}]")
    if matrix.stride(1) != 1 and num_columns > 1:
        raise ValueError(f"{name} has strides {matrix.stride()} but needs unit stride in a row; call contiguous()")
    if matrix.data_ptr() % 4 != 0:
        raise ValueError(f"{name} is not aligned to 4 bytes; clone the tensor")


def weight_struct(weight: NestedWeight, bit_width: int) -> WeightStruct:
    """Describes one width to the kernel; one that is not stored is derived from the 8-bit pair."""
    is_stored = bit_width in weight.bit_widths
    width_idx = weight.bit_widths.index(bit_width if is_stored else NUM_PLANES)
    num_merged = 1 if is_stored else 2 ** (NUM_PLANES - bit_width)
    return WeightStruct(
        planes=weight.planes.data_ptr(),
        scale=weight.scale[width_idx].data_ptr(),
        offset=weight.offset[width_idx].data_ptr(),
        plane_stride=weight.planes.stride(0),
        num_outputs=weight.num_outputs,
        num_inputs=weight.num_inputs,
        num_words=weight.planes.shape[2],
        group_size=weight.group_size,
        bit_width=bit_width,
        scale_factor=float(num_merged),
        offset_factor=(num_merged - 1) / 2,
    )
