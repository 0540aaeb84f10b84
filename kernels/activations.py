"""Activations as the bitplane product reads them: packed once, by whichever kernel produces them.

An output of the product needs all eight input quads of a 32-input word at the same time, one quad for each bit of a
weight word's bytes. So values are stored transposed: quad t of all words is in one row, and neighbouring threads that
hold neighbouring words read 16 bytes each, coalesced.
"""
# Kernel functions are Triton's own dialect; the launchers below them are checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flexquant_rl.kernels.bitplane import WORD_BITS, padded_inputs
from flexquant_rl.kernels.launching import FLOAT_TYPES, check_tensor, jit, require_triton, tl

ActivationMode = Literal["int8", "float"]
MODES: tuple[ActivationMode, ...] = ("int8", "float")
QUADS_PER_WORD = 8
_WORDS_PER_PROGRAM = 32


@dataclass(frozen=True, eq=False)
class PackedActivations:
    """M tokens of K inputs, K padded with zeros to Kp, a multiple of 128; W = Kp / 32 words.

    Attributes:
        values: Mode "int8": `[M, 8, W]` int32; byte c of `values[m, t, w]` is the int8 of input ``32w + 4t + c``. Mode
            "float": `[M, 32, W]` float16 or float32; `values[m, i, w]` is input ``32w + i``.
        scale: `[M, W]` float32, one per 32 inputs, ``max |x| / 127``; None in mode "float".
        sums: `[M, W]` float32, the sum of each word's inputs as stored, for the offsets of the weights.
        num_inputs: K.
    """

    values: Tensor
    scale: Tensor | None
    sums: Tensor
    num_inputs: int

    @staticmethod
    def allocate(
        num_tokens: int,
        num_inputs: int,
        *,
        device: torch.device | str,
        mode: ActivationMode = "int8",
        dtype: torch.dtype = torch.float32,
    ) -> PackedActivations:
        """Allocates room for M tokens; `dtype` is that of mode "float".

        Raises:
            ValueError: If a size is below 1, or a mode or dtype does not exist.
        """
        if num_tokens < 1 or num_inputs < 1:
            raise ValueError(f"num_tokens={num_tokens} and num_inputs={num_inputs} must be at least 1")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} does not exist; use one of {', '.join(MODES)}")
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(f"dtype={dtype} is not supported; use torch.float16 or torch.float32")
        words = padded_inputs(num_inputs) // WORD_BITS
        sums = torch.empty(num_tokens, words, dtype=torch.float32, device=device)
        if mode == "float":
            values = torch.empty(num_tokens, WORD_BITS, words, dtype=dtype, device=device)
            return PackedActivations(values, None, sums, num_inputs)
        values = torch.empty(num_tokens, QUADS_PER_WORD, words, dtype=torch.int32, device=device)
        return PackedActivations(values, torch.empty_like(sums), sums, num_inputs)

    @property
    def mode(self) -> ActivationMode:
        """How the values are held."""
        return "float" if self.scale is None else "int8"

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.values.shape[0]

    @property
    def num_words(self) -> int:
        """W."""
        return self.values.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.values.device

    def check(self, num_tokens: int, num_inputs: int, device: torch.device) -> None:
        """Raises ValueError unless the tensors fit together and hold `[num_tokens, num_inputs]` on `device`."""
        if self.num_inputs != num_inputs:
            raise ValueError(f"activations hold {self.num_inputs} inputs but {num_inputs} are needed; allocate that")
        words = padded_inputs(num_inputs) // WORD_BITS
        is_int8 = self.scale is not None
        rows, dtypes = (QUADS_PER_WORD, (torch.int32,)) if is_int8 else (WORD_BITS, (torch.float16, torch.float32))
        shape = (num_tokens, words)
        check_tensor("values", self.values, dtype=dtypes, shape=(num_tokens, rows, words), device=device, aligned=True)
        check_tensor("sums", self.sums, dtype=torch.float32, shape=shape, device=device, aligned=True)
        if self.scale is not None:
            check_tensor("scale", self.scale, dtype=torch.float32, shape=shape, device=device, aligned=True)


def pack_activations(
    x: Tensor, *, mode: ActivationMode = "int8", out: PackedActivations | None = None
) -> PackedActivations:
    """Packs activations that no other kernel has packed, such as the output of attention.

    Mode "int8" computes ``q = round(x * (127 / max |x|))`` for each 32 inputs, ties to even, as the CPU kernels do.

    Args:
        x: `[M, K]` float16, bfloat16 or float32, contiguous.
        mode: How to hold the values, if `out` is not given.
        out: Buffers for `[M, K]`, e.g. those of a captured graph; allocated if not given.

    Returns:
        `out`, or new buffers.

    Raises:
        ValueError: If a tensor has another dtype, shape, device, stride or alignment.
        RuntimeError: If Triton is not installed.
    """
    require_triton(x.device)
    check_tensor("x", x, dtype=FLOAT_TYPES, shape=(-1, -1), device=x.device)
    num_tokens, num_inputs = x.shape
    return launch_packing(_pack_kernel, x, num_tokens, num_inputs, mode=mode, out=out)


def launch_packing(
    kernel: Any, x: Tensor, num_tokens: int, num_inputs: int, *, mode: ActivationMode, out: PackedActivations | None
) -> PackedActivations:
    """Launches a kernel that makes `[num_tokens, num_inputs]` of `x` and packs it, 32 words of a token in a program.

    Returns:
        `out`, or new buffers of the given mode.

    Raises:
        ValueError: If `out` does not fit.
    """
    if out is None:
        out = PackedActivations.allocate(num_tokens, num_inputs, device=x.device, mode=mode)
    out.check(num_tokens, num_inputs, x.device)
    kernel[(num_tokens, -(-out.num_words // _WORDS_PER_PROGRAM))](
        x,
        *output_pointers(out),
        NUM_INPUTS=num_inputs,
        NUM_WORDS=out.num_words,
        IS_INT8=out.scale is not None,
        BLOCK_WORDS=_WORDS_PER_PROGRAM,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def output_pointers(out: PackedActivations) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors that `store_packed` takes; an unused one is stood in for."""
    return out.values, out.sums if out.scale is None else out.scale, out.sums


@jit()
def load_words(x_ptr, first_word, NUM_INPUTS: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """Loads the 32 inputs of each of BLOCK words as float32 `[BLOCK, 8, 4]`; inputs beyond K are 0."""
    # Two dimensions: the compiler sees 16 neighbouring bytes only within one.
    index = (first_word + tl.arange(0, BLOCK_WORDS))[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + index, mask=index < NUM_INPUTS, other=0.0).to(tl.float32)
    return tl.reshape(x, (BLOCK_WORDS, 8, 4))


@jit()
def store_packed(x, word, token, values_ptr, scale_ptr, sums_ptr, NUM_WORDS: tl.constexpr, IS_INT8: tl.constexpr):
    """Packs float32 `[BLOCK, 8, 4]` (words, quads, bytes) and stores it for one token.

    Must be compiled without fused multiply-add: adding the rounding constant is exact only to a rounded product.
    """
    in_row = word < NUM_WORDS
    quad = tl.arange(0, 8)
    lane = tl.arange(0, 4)
    if IS_INT8:
        # The largest magnitude by its bits: unlike a float maximum, this does not lose a NaN.
        bits = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2), axis=1)
        largest = bits.to(tl.float32, bitcast=True)
        is_finite = bits < 0x7F800000
        # Below this 127 / largest would overflow; such a word contributes nothing a float32 sum could hold on to.
        is_used = is_finite & (largest >= 1e-35)
        inverse = tl.div_rn(tl.full(largest.shape, 127.0, tl.float32), tl.where(is_used, largest, 1.0))
        scaled = tl.where(is_used[:, None, None], x * inverse[:, None, None], 0.0)
        # 1.5 * 2^23: float32 has no bits left for a fraction there, so the sum is rounded to an integer, ties to even.
        q = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        packed = tl.sum((q & 0xFF) << (lane * 8)[None, None, :], axis=2)
        address = values_ptr + (token * 8 + quad[None, :]) * NUM_WORDS + word[:, None]
        tl.store(address, packed, mask=in_row[:, None])
        scale = tl.div_rn(tl.where(is_used, largest, 0.0), tl.full(largest.shape, 127.0, tl.float32))
        scale = tl.where(is_finite, scale, float("nan"))  # a NaN or infinite input poisons the result
        tl.store(scale_ptr + token * NUM_WORDS + word, scale, mask=in_row)
        sums = tl.sum(tl.sum(q, axis=2), axis=1).to(tl.float32) * scale
    else:
        stored = x.to(values_ptr.dtype.element_ty)
        row = token * 32 + quad[None, :, None] * 4 + lane[None, None, :]
        tl.store(values_ptr + row * NUM_WORDS + word[:, None, None], stored, mask=in_row[:, None, None])
        sums = tl.sum(tl.sum(stored.to(tl.float32), axis=2), axis=1)
    tl.store(sums_ptr + token * NUM_WORDS + word, sums, mask=in_row)


@jit()
def _pack_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    sums_ptr,
    NUM_INPUTS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first_word = tl.program_id(1) * BLOCK_WORDS
    word = first_word + tl.arange(0, BLOCK_WORDS)
    x = load_words(x_ptr + token * NUM_INPUTS, first_word, NUM_INPUTS, BLOCK_WORDS)
    store_packed(x, word, token, values_ptr, scale_ptr, sums_ptr, NUM_WORDS, IS_INT8)
