"""The search for nested codes on the CPU: the inner loops of gptq in C++, 16 rows of a weight at a time.

`engine/quantisation/gptq.py` has the same in torch. That is the reference, and what other devices and float64 run; it
spends its time on operations that are each too small.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.kernels.native import ISA_CODES, OK, STATUS_TEXTS, choose_isa, load_library

MAX_GROUP = 128
"""Inputs of a group at most."""


class CodeSearch:
    """Chooses the codes of one group of inputs for all rows of a weight.

    Rows are independent: the result is the same, bit for bit, for any number of threads and any other rows.

    Shapes: g inputs of the group, V widths, n rows; everything float32 on the CPU, contiguous.

    Args:
        grids: `[5, V, n]`: scale, offset, steps for a value (1 / scale, or 0), cost of a squared step, share in the
            mean of the widths' wishes.
        bit_widths: The V widths, ascending, the last is 8.
        searched: Cells of the second widest width that the search looks at.
        isa: "avx512", "avx2" or "portable"; default: the fastest.

    Raises:
        ValueError: If a tensor or an option is not as described.
        RuntimeError: If the library cannot be loaded; `can_search` says beforehand.
    """

    def __init__(self, grids: Tensor, bit_widths: Sequence[int], searched: int, *, isa: str | None = None) -> None:
        library = load_library()
        if library is None:
            raise RuntimeError("the native kernels could not be built; search with torch instead")
        self._library = library
        self._isa = ISA_CODES[choose_isa(isa)]
        self._num_rows = grids.shape[-1]
        self._widths = torch.tensor(tuple(bit_widths), dtype=torch.int64)
        self._grids = _checked("grids", grids, (5, len(self._widths), self._num_rows))
        self._searched = searched

    def feed_back(self, targets: Tensor, codes: Tensor, factor: Tensor) -> None:
        """Chooses codes from the first input to the last; later inputs make up for the errors of earlier ones.

        Args:
            targets: `[g, V, n]`, replaced by the errors over the diagonal of the factor.
            codes: `[g, n]`, where the codes go, as floats.
            factor: `[g, g]`, upper triangular, unit stride in a row.
        """
        num_inputs = len(targets)
        self._call(
            self._library.fq_feed_back,
            num_inputs,
            _checked("targets", targets, (num_inputs, len(self._widths), self._num_rows)).data_ptr(),
            _checked("codes", codes, (num_inputs, self._num_rows)).data_ptr(),
            matrix=factor,
        )

    def descend(self, weight: Tensor, errors: Tensor, slopes: Tensor, codes: Tensor, hessian: Tensor) -> None:
        """Chooses every code once more, given all the others.

        Args:
            weight: `[g, n]`.
            errors: `[g, V, n]`, the weight less what the codes stand for; kept up to date.
            slopes: `[g, V, n]`, the hessian times the errors of all inputs.
            codes: `[g, n]`, the codes; replaced.
            hessian: `[g, g]`, unit stride in a row.
        """
        num_inputs = len(weight)
        shape = (num_inputs, len(self._widths), self._num_rows)
        self._call(
            self._library.fq_descend,
            num_inputs,
            _checked("weight", weight, (num_inputs, self._num_rows)).data_ptr(),
            _checked("errors", errors, shape).data_ptr(),
            _checked("slopes", slopes, shape).data_ptr(),
            _checked("codes", codes, (num_inputs, self._num_rows)).data_ptr(),
            matrix=hessian,
        )

    def _call(self, function: Any, num_inputs: int, *arrays: int, matrix: Tensor) -> None:
        is_square = matrix.shape == (num_inputs, num_inputs) and (matrix.stride(1) == 1 or num_inputs == 1)
        if not is_square or matrix.dtype != torch.float32 or matrix.device.type != "cpu":
            raise ValueError(
                f"the matrix is {matrix.dtype} {list(matrix.shape)}, strides {matrix.stride()}, on {matrix.device}; "
                f"pass float32 [{num_inputs}, {num_inputs}] on the CPU with unit stride in a row"
            )
        status = function(
            ctypes.c_void_p(self._grids.data_ptr()),
            ctypes.c_void_p(self._widths.data_ptr()),
            ctypes.c_int64(len(self._widths)),
            ctypes.c_int64(self._searched),
            *map(ctypes.c_void_p, arrays),
            ctypes.c_void_p(matrix.data_ptr()),
            ctypes.c_int64(max(matrix.stride(0), num_inputs)),
            ctypes.c_int64(num_inputs),
            ctypes.c_int64(self._num_rows),
            ctypes.c_int32(self._isa),
            ctypes.c_int32(torch.get_num_threads()),
        )
        if status != OK:
            raise ValueError(
                f"code search of {num_inputs} inputs, widths {self._widths.tolist()}, {self._searched} cells: "
                f"{STATUS_TEXTS.get(status, status)}; a group has 1 to {MAX_GROUP} inputs"
            )


def can_search(weight: Tensor) -> bool:
    """Whether the native search takes a weight: float32 on the CPU, with the library there."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and load_library() is not None


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor itself; raises ValueError if it is not contiguous float32 of a shape on the CPU."""
    if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; pass float32 {list(shape)} on the CPU"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; call contiguous()")
    return tensor
