"""What every Triton kernel module shares: Triton itself where it is installed, and the checks before a launch.

Triton exists for Linux only, so its absence must not break an import: `jit` then leaves the function alone and the
first launch says what is missing. With `TRITON_INTERPRET=1`, set before a kernel module is imported, the kernels run on
CPU tensors without a compiler (slowly: for tests).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

triton: ModuleType | None = None
tl: Any = SimpleNamespace(constexpr=object)  # what a kernel's signature names
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError:
    triton = None  # `require_triton` says so at the first launch

VECTOR_BYTES = 16
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
POSITION_TYPES = (torch.int32, torch.int64)


def jit(**options: Any) -> Any:
    """Decorates a kernel: `triton.jit` where Triton is installed."""
    if triton is None:
        return lambda function: function
    return triton.jit(**options)


def constant(value: float) -> Any:
    """Makes a number of a module readable for its kernels.

    Triton compiles in only those that are wrapped; its interpreter would mix up the wrapper with a tensor.

    Args:
        value: The number, the same in every launch.

    Returns:
        `value`, wrapped where kernels are compiled.
    """
    return value if triton is None or is_interpreting() else tl.constexpr(value)


@jit()
def _probe_kernel(x_ptr):  # type: ignore[no-untyped-def]  # Triton takes an annotation for an expression
    tl.store(x_ptr, 1)


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def uses_inline_asm() -> bool:
    """Whether PTX instructions may be spelt out: on NVIDIA hardware, not in the interpreter, not on AMD."""
    return torch.version.cuda is not None and not is_interpreting()


def why_not_triton(device: torch.device) -> str | None:
    """Returns why Triton cannot run kernels on a CUDA device, in a few words, or None if it can.

    Warns the first time that it is installed but cannot: it needs a C compiler and Python's headers to launch anything.
    """
    if triton is None:
        return "Triton is not installed"
    return _why_not_launched(device) if device.type == "cuda" and not is_interpreting() else None


@cache
def _why_not_launched(device: torch.device) -> str | None:
    try:
        with torch.cuda.device(device):
            _probe_kernel[(1,)](torch.empty(1, dtype=torch.int32, device=device))
    except Exception as error:  # whatever Triton, its compiler or the C compiler raises
        reason = f"Triton fails with {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        warnings.warn(
            f"no Triton kernels on {device}, falling back to torch (slow): {reason}", RuntimeWarning, stacklevel=3
        )
        return reason
    return None


def require_triton(device: torch.device) -> None:
    """Checks that a kernel can be launched on `device`.

    Raises:
        RuntimeError: If Triton is not installed.
        ValueError: If the tensors are not on a CUDA device, and the interpreter is off.
    """
    if triton is None:
        raise RuntimeError(
            "Triton is not installed (it exists for Linux on x86-64); install it with `pip install triton`, or use "
            "flexquant_rl.kernels.native or flexquant_rl.kernels.reference"
        )
    if device.type != "cuda" and not is_interpreting():
        raise ValueError(
            f"the tensors are on {device} but Triton kernels need a CUDA device; move them, or use "
            "flexquant_rl.kernels.native on the CPU"
        )


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: Sequence[int],
    device: torch.device,
    aligned: bool = False,
) -> None:
    """Raises ValueError unless a tensor is contiguous and as a kernel needs it.

    Args:
        name: The argument's name, for the message.
        tensor: The argument.
        dtype: The dtype or dtypes allowed.
        shape: The exact shape; -1 stands for any size.
        device: Where it must be.
        aligned: Whether it is read in vectors of 16 bytes, so that it must start at such an address.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    fits = tensor.dim() == len(shape) and all(
        want in (-1, size) for size, want in zip(tensor.shape, shape, strict=True)
    )
    if tensor.dtype not in dtypes or not fits:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in dtypes)
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; pass {wanted} {list(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but must be on {device}; move it")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()} but must be contiguous; call contiguous()")
    if aligned and tensor.data_ptr() % VECTOR_BYTES != 0:
        raise ValueError(f"{name} does not start at a multiple of {VECTOR_BYTES} bytes; clone the tensor")


def check_token_count(num_tokens: int, max_tokens: int) -> None:
    """Raises ValueError unless 1 <= num_tokens <= max_tokens."""
    if not 1 <= num_tokens <= max_tokens:
        raise ValueError(
            f"{num_tokens} tokens were given but the kernel takes 1 to {max_tokens}; "
            "dequantize the weight and use a matrix product for more"
        )


def check_rows(rows: Tensor | None, num_tokens: int, num_rows: int, device: torch.device) -> None:
    """Raises ValueError unless tokens can be matched with cache rows.

    Args:
        rows: `[M]` int32 or int64 on the device; None: token m belongs to row m, or every token to the only row.
        num_tokens: M.
        num_rows: Rows of the cache.
        device: Where `rows` must be.
    """
    if rows is not None:
        check_tensor("rows", rows, dtype=POSITION_TYPES, shape=(num_tokens,), device=device)
    elif num_rows not in (1, num_tokens):
        raise ValueError(f"{num_tokens} tokens but {num_rows} cache rows; pass rows to say where each token belongs")


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
