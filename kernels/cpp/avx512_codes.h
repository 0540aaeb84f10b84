// How the AVX-512 body turns words of the planes into codes. One vector is 16 words of one plane: 512 inputs, one int32
// lane per word.
//
// Planes are merged pairwise, planes -> 2-bit fields -> nibbles -> bytes, each merge being a shift and a bit select for
// each of its two results.
#pragma once

#include "kernels_internal.h"

#include <immintrin.h>

#define FQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

namespace fq {

// How far ahead each plane is fetched where rows go one by one: the hardware prefetchers alone follow eight streams
// badly. 1 KiB and more was up to 1.5 times slower on 4096 x 4096 weights (AMD Zen 4).
constexpr int64_t kPrefetchBytes = 256;
// The second cache is filled from further ahead, but for one thread that computes one token (gains_from_far()). Where a
// pass over several tokens keeps the arithmetic busy, that hides most of the memory's time: four tokens take 240 us
// instead of 278 (AMD Zen 4, 896 x 4864 weights, 8 bits).
constexpr int64_t kFarPrefetchBytes = 2048;

struct Codes {
    __m512i bytes[8];  // t = 0..7; the code is aligned to the top of the byte, except as said by has_low_nibbles()
};

// Up to 4 bits, codes t = 0..3 are left in the low nibble: shifting one sum is cheaper than shifting four vectors.
constexpr bool has_low_nibbles(int width) { return width <= 4; }

struct Rows {  // the words of one chunk in each plane
    const char* first;
    int64_t plane_bytes;
    __mmask16 mask;
    int64_t far_prefetch_bytes;
    int64_t prefetch_bytes = kPrefetchBytes;
};

// From a chunk to what is fetched into the second cache. Near, it is a line that is fetched anyway, or with pairs of
// rows one that was or will be soon: it costs next to nothing.
constexpr int64_t far_bytes(const Activations& x) { return x.fetches_far ? kFarPrefetchBytes : kPrefetchBytes; }

template <bool kTail>
FQ_INLINE FQ_AVX512 __m512i load_plane(const Rows& rows, int plane) {
    const char* address = rows.first + plane * rows.plane_bytes;
    _mm_prefetch(address + rows.prefetch_bytes, _MM_HINT_T0);
    _mm_prefetch(address + rows.far_prefetch_bytes, _MM_HINT_T1);
    __m512i words;
    if constexpr (kTail) words = _mm512_maskz_loadu_epi32(rows.mask, address);
    else words = _mm512_loadu_si512(address);
    // Keeps the compiler from loading the words anew for each use: the load ports are the busiest of all.
    asm("" : "+v"(words));
    return words;
}

// mask ? a : b. The result replaces the first operand, so each form names the one that is not needed afterwards.
FQ_INLINE FQ_AVX512 __m512i select_into_a(__m512i mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(a, b, mask, 0xE4);
}
FQ_INLINE FQ_AVX512 __m512i select_into_b(__m512i mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(b, a, mask, 0xD8);
}

FQ_INLINE FQ_AVX512 __m512i every_byte(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// From fields a (more significant) and b of S bits: even takes the fields at even positions, odd those at odd ones.
template <int S>
FQ_INLINE FQ_AVX512 void merge(__m512i upper, __m512i a, __m512i b, __m512i* even, __m512i* odd) {
    *even = select_into_a(upper, _mm512_slli_epi32(a, S), b);
    *odd = select_into_b(upper, a, _mm512_srli_epi32(b, S));
}

// Top nibbles of up to four planes: nibbles[r] holds t = r in the low half of each byte and t = r + 4 in the high half.
// Bits of a nibble below kWidth are left undefined; the caller's masks clear them for nothing.
template <int kWidth, bool kTail>
FQ_INLINE FQ_AVX512 void load_top_nibbles(const Rows& rows, __m512i* nibbles) {
    const __m512i upper1 = every_byte(0xAA), upper2 = every_byte(0xCC);
    const __m512i plane0 = load_plane<kTail>(rows, 0);
    if constexpr (kWidth == 1) {
        for (int r = 0; r < 4; ++r) nibbles[r] = _mm512_slli_epi32(plane0, static_cast<unsigned>(3 - r));
        return;
    }
    __m512i high[2];
    merge<1>(upper1, plane0, load_plane<kTail>(rows, 1), &high[0], &high[1]);
    if constexpr (kWidth == 2) {
        for (int r = 0; r < 2; ++r) {
            nibbles[r] = _mm512_slli_epi32(high[r], 2);
            nibbles[r + 2] = high[r];
        }
    } else if constexpr (kWidth == 3) {
        const __m512i plane2 = load_plane<kTail>(rows, 2);
        nibbles[0] = select_into_a(upper2, _mm512_slli_epi32(high[0], 2), _mm512_slli_epi32(plane2, 1));
        nibbles[1] = select_into_a(upper2, _mm512_slli_epi32(high[1], 2), plane2);
        nibbles[2] = select_into_b(upper2, high[0], _mm512_srli_epi32(plane2, 1));
        nibbles[3] = select_into_b(upper2, high[1], _mm512_srli_epi32(plane2, 2));
    } else {
        __m512i low[2];
        merge<1>(upper1, load_plane<kTail>(rows, 2), load_plane<kTail>(rows, 3), &low[0], &low[1]);
        for (int r = 0; r < 2; ++r) merge<2>(upper2, high[r], low[r], &nibbles[r], &nibbles[r + 2]);
    }
}

// Bottom nibbles of planes 4 to 4 + kCount - 1, in the same order; absent bits are zero, for no mask follows.
template <int kCount, bool kTail>
FQ_INLINE FQ_AVX512 void load_bottom_nibbles(const Rows& rows, __m512i* nibbles) {
    const __m512i upper1 = every_byte(0xAA), upper2 = every_byte(0xCC);
    const __m512i plane4 = load_plane<kTail>(rows, 4);
    if constexpr (kCount == 1) {
        const __m512i top_bit = every_byte(0x88);
        for (int r = 0; r < 4; ++r) {
            nibbles[r] = _mm512_and_si512(_mm512_slli_epi32(plane4, static_cast<unsigned>(3 - r)), top_bit);
        }
        return;
    }
    __m512i high[2];
    merge<1>(upper1, plane4, load_plane<kTail>(rows, 5), &high[0], &high[1]);
    if constexpr (kCount == 2) {
        for (int r = 0; r < 2; ++r) {
            nibbles[r] = _mm512_and_si512(_mm512_slli_epi32(high[r], 2), upper2);
            nibbles[r + 2] = _mm512_and_si512(high[r], upper2);
        }
        return;
    }
    __m512i low[2];
    const __m512i plane6 = load_plane<kTail>(rows, 6);
    if constexpr (kCount == 3) {
        low[0] = _mm512_and_si512(_mm512_slli_epi32(plane6, 1), upper1);
        low[1] = _mm512_and_si512(plane6, upper1);
    } else {
        merge<1>(upper1, plane6, load_plane<kTail>(rows, 7), &low[0], &low[1]);
    }
    for (int r = 0; r < 2; ++r) merge<2>(upper2, high[r], low[r], &nibbles[r], &nibbles[r + 2]);
}

template <int kWidth, bool kTail>
FQ_INLINE FQ_AVX512 void load_codes(const Rows& rows, Codes* codes) {
    __m512i top[4];
    load_top_nibbles<(kWidth < 4 ? kWidth : 4), kTail>(rows, top);
    if constexpr (kWidth <= 4) {
        const int bits = 0x0F & 0x0F << (4 - kWidth);
        for (int r = 0; r < 4; ++r) {
            codes->bytes[r] = _mm512_and_si512(top[r], every_byte(bits));
            codes->bytes[r + 4] = _mm512_and_si512(top[r], every_byte(bits << 4));
        }
    } else {
        __m512i bottom[4];
        load_bottom_nibbles<kWidth - 4, kTail>(rows, bottom);
        for (int r = 0; r < 4; ++r) {
            merge<4>(every_byte(0xF0), top[r], bottom[r], &codes->bytes[r], &codes->bytes[r + 4]);
        }
    }
}

}  // namespace fq
