"""Device functions that the kernels over bitplanes share: loading planes, merging them, finding a width's pair.

The arithmetic is explained in docs/kernels.md. A width is only known on the device, so everything that depends on it is
a masked load or a lookup there.
"""
# Kernel functions are Triton's own dialect.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

from flexquant_rl.kernels.bitplane import NUM_PLANES, NestedWeight
from flexquant_rl.kernels.launching import check_tensor, jit, tl

MAX_PLANE_WORDS = 2**31 - 1
_NOT_STORED = 15  # in a nibble of `width_table`


def width_table(bit_widths: Sequence[int]) -> int:
    """Packs the slice of every width into nibbles: nibble b is the index of width b, or 15 where it is not stored."""
    indices = [bit_widths.index(b) if b in bit_widths else _NOT_STORED for b in range(NUM_PLANES + 1)]
    return sum(index << 4 * b for b, index in enumerate(indices))


def check_weight(weight: NestedWeight) -> None:
    """Raises ValueError unless a kernel can read the weight's tensors in vectors of 16 bytes, by offsets of 32 bits."""
    device = weight.planes.device
    if weight.num_outputs < 1:
        raise ValueError("the weight has no outputs; there is nothing to multiply")
    if weight.planes[0].numel() > MAX_PLANE_WORDS:
        raise ValueError(
            f"a plane of the weight has {weight.planes[0].numel()} words but a kernel counts to {MAX_PLANE_WORDS}; "
            "split the outputs into two weights"
        )
    for name, tensor in (("planes", weight.planes), ("scale", weight.scale), ("offset", weight.offset)):
        check_tensor(name, tensor, dtype=tensor.dtype, shape=tensor.shape, device=device, aligned=True)


@jit()
def select(upper, lower, MASK: tl.constexpr, ASM: tl.constexpr, USE_ASM: tl.constexpr):
    """Takes the bits of `upper` where MASK has ones, those of `lower` elsewhere: one LOP3."""
    if USE_ASM:
        result = tl.inline_asm_elementwise(ASM, "=r,r,r", [upper, lower], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        result = (upper & MASK) | (lower & (0xFFFFFFFF ^ MASK))
    return result


@jit()
def merge_bits(upper, lower, USE_ASM: tl.constexpr):
    """Two planes -> fields of 2 bits: (inputs with even t, inputs with odd t)."""
    even = select(upper << 1, lower, 0xAAAAAAAA, "lop3.b32 $0, $1, $2, 0xAAAAAAAA, 0xE4;", USE_ASM)
    odd = select(upper, lower >> 1, 0xAAAAAAAA, "lop3.b32 $0, $1, $2, 0xAAAAAAAA, 0xE4;", USE_ASM)
    return even, odd


@jit()
def merge_crumbs(upper, lower, USE_ASM: tl.constexpr):
    """Two words of 2-bit fields -> two words of 4-bit fields: (fields at even places, fields at odd places)."""
    even = select(upper << 2, lower, 0xCCCCCCCC, "lop3.b32 $0, $1, $2, 0xCCCCCCCC, 0xE4;", USE_ASM)
    odd = select(upper, lower >> 2, 0xCCCCCCCC, "lop3.b32 $0, $1, $2, 0xCCCCCCCC, 0xE4;", USE_ASM)
    return even, odd


@jit()
def merge_nibbles(upper, lower, USE_ASM: tl.constexpr):
    """Two words of 4-bit fields -> two words of bytes: (quad t, quad t + 4)."""
    first = select(upper << 4, lower, 0xF0F0F0F0, "lop3.b32 $0, $1, $2, 0xF0F0F0F0, 0xE4;", USE_ASM)
    second = select(upper, lower >> 4, 0xF0F0F0F0, "lop3.b32 $0, $1, $2, 0xF0F0F0F0, 0xE4;", USE_ASM)
    return first, second


@jit()
def nibble_words(p0, p1, p2, p3, USE_ASM: tl.constexpr):
    """Four planes, most significant first -> four words; byte c of word r holds quads t = r (low) and t = r + 4."""
    upper_even, upper_odd = merge_bits(p0, p1, USE_ASM)
    lower_even, lower_odd = merge_bits(p2, p3, USE_ASM)
    n0, n2 = merge_crumbs(upper_even, lower_even, USE_ASM)
    n1, n3 = merge_crumbs(upper_odd, lower_odd, USE_ASM)
    return n0, n1, n2, n3


@jit()
def load_plane(planes_ptr, offset, plane_stride, PLANE: tl.constexpr, mask):
    """Loads one tile of one plane; read once, so the cache may drop it first."""
    pointers = planes_ptr + PLANE * plane_stride + offset
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first").to(tl.uint32, bitcast=True)


@jit()
def code_words(
    p0, p1, p2, planes_ptr, offset, plane_stride, in_row, bit_width, MAX_WIDTH: tl.constexpr, USE_ASM: tl.constexpr
):
    """The codes of a tile: eight words of four codes, word t = quad t.

    For MAX_WIDTH 4 the last four words hold sixteen times the code. Codes have MAX_WIDTH bits, the missing ones 0.
    """
    # Spread over the tile, the comparison becomes the predicate of the load.
    widths = tl.zeros(in_row.shape, tl.int32) + bit_width
    p3 = load_plane(planes_ptr, offset, plane_stride, 3, in_row & (widths > 3))
    if MAX_WIDTH == 8:
        p4 = load_plane(planes_ptr, offset, plane_stride, 4, in_row & (widths > 4))
        p5 = load_plane(planes_ptr, offset, plane_stride, 5, in_row & (widths > 5))
        p6 = load_plane(planes_ptr, offset, plane_stride, 6, in_row & (widths > 6))
        p7 = load_plane(planes_ptr, offset, plane_stride, 7, in_row & (widths > 7))
        u0, u1, u2, u3 = nibble_words(p0, p1, p2, p3, USE_ASM)
        l0, l1, l2, l3 = nibble_words(p4, p5, p6, p7, USE_ASM)
        w0, w4 = merge_nibbles(u0, l0, USE_ASM)
        w1, w5 = merge_nibbles(u1, l1, USE_ASM)
        w2, w6 = merge_nibbles(u2, l2, USE_ASM)
        w3, w7 = merge_nibbles(u3, l3, USE_ASM)
    else:
        n0, n1, n2, n3 = nibble_words(p0, p1, p2, p3, USE_ASM)
        w0, w4 = n0 & 0x0F0F0F0F, n0 & 0xF0F0F0F0
        w1, w5 = n1 & 0x0F0F0F0F, n1 & 0xF0F0F0F0
        w2, w6 = n2 & 0x0F0F0F0F, n2 & 0xF0F0F0F0
        w3, w7 = n3 & 0x0F0F0F0F, n3 & 0xF0F0F0F0
    return w0, w1, w2, w3, w4, w5, w6, w7


@jit()
def load_base_planes(planes_ptr, offset, plane_stride, in_row, bit_width, MIN_WIDTH: tl.constexpr):
    """Loads planes 0..2: without waiting for the width where every stored width has them."""
    widths = tl.zeros(in_row.shape, tl.int32) + bit_width
    p0 = load_plane(planes_ptr, offset, plane_stride, 0, in_row)
    if MIN_WIDTH >= 2:
        p1 = load_plane(planes_ptr, offset, plane_stride, 1, in_row)
    else:
        p1 = load_plane(planes_ptr, offset, plane_stride, 1, in_row & (widths > 1))
    if MIN_WIDTH >= 3:
        p2 = load_plane(planes_ptr, offset, plane_stride, 2, in_row)
    else:
        p2 = load_plane(planes_ptr, offset, plane_stride, 2, in_row & (widths > 2))
    return p0, p1, p2


@jit()
def read_width(bit_widths_ptr, unit, MIN_WIDTH: tl.constexpr):
    """The unit's width, clamped to the stored range."""
    return tl.minimum(tl.maximum(tl.load(bit_widths_ptr + unit), MIN_WIDTH), 8)


@jit()
def pair_of_width(bit_width, NUM_WIDTHS: tl.constexpr, WIDTH_TABLE: tl.constexpr):
    """Which slice of scales and offsets a width uses, and the factors that derive the pair if it is not stored."""
    table = tl.full([], WIDTH_TABLE, tl.int64)
    index = ((table >> (bit_width * 4).to(tl.int64)) & 15).to(tl.int32)
    is_stored = index < NUM_WIDTHS
    merged = (1 << (8 - bit_width)).to(tl.float32)
    scale_factor = tl.where(is_stored, 1.0, merged)
    offset_factor = tl.where(is_stored, 0.0, (merged - 1.0) * 0.5)
    return tl.where(is_stored, index, NUM_WIDTHS - 1), scale_factor, offset_factor
