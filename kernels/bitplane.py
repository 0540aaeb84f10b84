"""The one description of the nested bitplane layout; every kernel and checkpoint follows it.

A weight `[N, K]` is stored as 8-bit codes, one bit per plane, plane 0 the most significant. A plane packs 32 inputs
into one little-endian int32 word: bit ``8c + t`` of word ``w`` (byte c = 0..3, bit t = 0..7) is input ``32w + 4t + c``.
K is padded with zero codes to a multiple of `INPUT_ALIGNMENT`. Width b reads planes ``0 .. b-1`` and nothing else; the
weight is ``scale_b * (code >> (8 - b)) + offset_b``, where ``offset_b`` already holds the half cell that truncation
cuts off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

NUM_PLANES = 8
WORD_BITS = 32
INPUT_ALIGNMENT = 128
GROUP_SIZES = (32, 64, 128)

_WORD_BYTES = 4
# The three rounds of an 8x8 bit-matrix transpose (Warren, Hacker's Delight, 7-3): (shift, bits to exchange). No mask
# has a bit that an arithmetic right shift of a negative int64 fills with the sign.
_TRANSPOSE_ROUNDS = ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0))


@dataclass(frozen=True, eq=False)
class NestedWeight:
    """One weight matrix, decodable at every width from 1 to 8.

    Shapes: N output features, K input features, Kp = K padded to a multiple of 128, V stored widths, G groups of a row
    (Kp / group_size). A group that holds padding only has scale 0 and offset 0.

    Attributes:
        planes: Packed bitplanes, `[8, N, Kp // 32]` int32, plane 0 most significant.
        scale: `[V, N, G]` float16, one slice per stored width.
        offset: `[V, N, G]` float16, includes the half-cell re-centring of each width.
        bit_widths: The V stored widths, ascending; the last is 8.
        group_size: Consecutive inputs that share a scale and an offset: 32, 64 or 128.
        num_inputs: K, before padding.

    Raises:
        ValueError: If shapes, dtypes, devices or widths disagree.
    """

    planes: Tensor
    scale: Tensor
    offset: Tensor
    bit_widths: tuple[int, ...]
    group_size: int
    num_inputs: int
    # transformers draws random weights for what lacks it, also where a module is asked for the weight of its child.
    _is_hf_initialized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks everything that can be checked without reading a value from the device."""
        check_bit_widths(self.bit_widths)
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size={self.group_size} is not supported; use one of {GROUP_SIZES}")
        if self.num_inputs < 1:
            raise ValueError(f"num_inputs={self.num_inputs} must be at least 1; pass K, the inputs before padding")
        num_padded = padded_inputs(self.num_inputs)
        num_rows = self.planes.shape[1] if self.planes.dim() == 3 else -1
        pair_shape = (len(self.bit_widths), num_rows, num_padded // self.group_size)
        for field, tensor, dtype, shape in (
            ("planes", self.planes, torch.int32, (NUM_PLANES, num_rows, num_padded // WORD_BITS)),
            ("scale", self.scale, torch.float16, pair_shape),
            ("offset", self.offset, torch.float16, pair_shape),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{field} is {tensor.dtype} {list(tensor.shape)} but num_inputs={self.num_inputs}, group_size="
                    f"{self.group_size} and widths {self.bit_widths} need {dtype} {list(shape)}; re-quantise the weight"
                )
            if tensor.device != self.planes.device:
                raise ValueError(
                    f"{field} is on {tensor.device} but planes are on {self.planes.device}; move all three"
                )

    @property
    def num_outputs(self) -> int:
        """N, the number of output features."""
        return self.planes.shape[1]

    @property
    def num_padded_inputs(self) -> int:
        """Kp, the number of inputs including padding."""
        return self.planes.shape[2] * WORD_BITS

    @property
    def num_groups(self) -> int:
        """G, the number of groups of one row, including those of padding only."""
        return self.num_padded_inputs // self.group_size

    def rows(self, part: slice) -> NestedWeight:
        """Returns some of the outputs, as a view."""
        return replace(self, planes=self.planes[:, part], scale=self.scale[:, part], offset=self.offset[:, part])

    def bytes_read(self, bit_width: int) -> int:
        """Returns the bytes that a product at `bit_width` has to read: its planes and one scale and offset slice."""
        check_bit_width(bit_width)
        plane_bytes = self.num_outputs * self.num_padded_inputs // 8
        pair_bytes = 2 * self.num_outputs * self.num_groups * torch.float16.itemsize
        return bit_width * plane_bytes + pair_bytes

    def scale_and_offset(self, bit_width: int) -> tuple[Tensor, Tensor]:
        """Returns the float32 scale and offset of one width, `[N, G]` each; derived if the width is not stored.

        Raises:
            ValueError: If `bit_width` is not in 1..8.
        """
        check_bit_width(bit_width)
        if bit_width in self.bit_widths:
            width_idx = self.bit_widths.index(bit_width)
            return self.scale[width_idx].float(), self.offset[width_idx].float()
        return derive_scale_and_offset(self.scale[-1].float(), self.offset[-1].float(), bit_width=bit_width)


def padded_inputs(num_inputs: int) -> int:
    """Returns `num_inputs` rounded up to a multiple of `INPUT_ALIGNMENT`."""
    return -(-num_inputs // INPUT_ALIGNMENT) * INPUT_ALIGNMENT


def check_bit_width(bit_width: int) -> None:
    """Raises ValueError unless `bit_width` is in 1..8."""
    if not 1 <= bit_width <= NUM_PLANES:
        raise ValueError(f"bit_width={bit_width} but a weight has {NUM_PLANES} planes; use 1 to {NUM_PLANES}")


def check_bit_widths(bit_widths: tuple[int, ...]) -> None:
    """Raises ValueError unless `bit_widths` can be the stored widths: ascending, within 1..8, ending in 8."""
    ascending = sorted({width for width in bit_widths if 1 <= width <= NUM_PLANES})
    if list(bit_widths) != ascending or not ascending or ascending[-1] != NUM_PLANES:
        suggestion = ",".join(str(width) for width in sorted({*ascending, NUM_PLANES}))
        raise ValueError(
            f"bit_widths={tuple(bit_widths)} must be distinct, ascending, within 1..{NUM_PLANES} and end in "
            f"{NUM_PLANES}; use {suggestion}"
        )


def derive_scale_and_offset(scale: Tensor, offset: Tensor, *, bit_width: int) -> tuple[Tensor, Tensor]:
    """Derives the pair of a narrower width from the 8-bit pair.

    A code of b bits stands for ``2^(8-b)`` neighbouring 8-bit codes and decodes to their mean, hence the half cell:
    ``scale_b = scale_8 * 2^(8-b)`` and ``offset_b = offset_8 + scale_8 * (2^(8-b) - 1) / 2``.

    Args:
        scale: 8-bit scale, any shape, floating point.
        offset: 8-bit offset, the shape of `scale`.
        bit_width: Target width, 1..8.

    Returns:
        Scale and offset of `bit_width`, in the shape and dtype of the inputs.
    """
    num_merged = 2 ** (NUM_PLANES - bit_width)
    return scale * num_merged, offset + scale * ((num_merged - 1) / 2)


def pack_codes(codes: Tensor) -> Tensor:
    """Packs 8-bit codes into bitplanes; inputs are padded with zero codes.

    Shapes: N output features, K input features, Kp = K padded to a multiple of 128.

    Args:
        codes: `[N, K]` uint8.

    Returns:
        `[8, N, Kp // 32]` int32, plane 0 most significant.

    Raises:
        ValueError: If `codes` is not a uint8 matrix.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes are {codes.dtype} with {codes.dim()} dimensions; pass a uint8 matrix [N, K]")
    num_outputs, num_inputs = codes.shape
    padded = functional.pad(codes, (0, padded_inputs(num_inputs) - num_inputs))
    # One byte of a word takes one bit of each of the eight codes t = 0..7 of its byte lane c.
    lanes = padded.view(num_outputs, -1, 8, _WORD_BYTES).transpose(2, 3)  # [N, Kp/32, c, t]
    planes = _transpose_bits(lanes).flip(3)  # [N, Kp/32, c, plane]
    return planes.permute(3, 0, 1, 2).contiguous().view(torch.int32)[..., 0]


def unpack_codes(planes: Tensor, *, bit_width: int, num_inputs: int) -> Tensor:
    """Unpacks the top `bit_width` planes; reads no other plane.

    Args:
        planes: `[P, N, Kp // 32]` int32 with ``P >= bit_width``, plane 0 most significant.
        bit_width: Planes to read, 1..8.
        num_inputs: K, the inputs to return, at most Kp.

    Returns:
        ``code >> (8 - bit_width)``, `[N, K]` uint8.

    Raises:
        ValueError: If `planes` has another dtype or shape, or too few planes or inputs.
    """
    check_bit_width(bit_width)
    if planes.dtype != torch.int32 or planes.dim() != 3:
        raise ValueError(f"planes are {planes.dtype} with {planes.dim()} dimensions; pass int32 [8, N, Kp // 32]")
    num_planes, num_outputs, num_words = planes.shape
    if num_planes < bit_width:
        raise ValueError(f"bit_width={bit_width} but only {num_planes} planes are given; pass at least {bit_width}")
    if not 0 <= num_inputs <= num_words * WORD_BITS:
        raise ValueError(f"num_inputs={num_inputs} but the planes hold {num_words * WORD_BITS}; pass at most that")
    lanes = planes.new_zeros((num_outputs, num_words, _WORD_BYTES, 8), dtype=torch.uint8)  # [N, Kp/32, c, code bit]
    top = planes[:bit_width].contiguous().view(torch.uint8).view(bit_width, num_outputs, num_words, _WORD_BYTES)
    lanes[..., :bit_width] = top.flip(0).permute(1, 2, 3, 0)
    codes = _transpose_bits(lanes).transpose(2, 3)  # [N, Kp/32, t, c]
    return codes.reshape(num_outputs, -1)[:, :num_inputs].contiguous()


def _transpose_bits(lanes: Tensor) -> Tensor:
    """Swaps byte index and bit index: bit j of byte i of the last dimension (8 bytes) becomes bit i of byte j."""
    words = lanes.contiguous().view(torch.int64)
    for shift, mask in _TRANSPOSE_ROUNDS:
        exchanged = (words ^ (words >> shift)) & mask
        words = words ^ exchanged ^ (exchanged << shift)
    return words.view(torch.uint8)
