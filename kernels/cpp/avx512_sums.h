// From codes to sums: the dot products of a chunk, and the sum of a row's lanes.
#pragma once

#include "avx512_codes.h"

namespace fq {

FQ_INLINE __mmask16 mask_of(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

FQ_INLINE FQ_AVX512 __m512i lane_indices() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Scales or offsets of up to 16 groups.
FQ_INLINE FQ_AVX512 __m512 load_halves(const uint16_t* halves, __mmask16 mask) {
    _mm_prefetch(reinterpret_cast<const char*>(halves) + kPrefetchBytes, _MM_HINT_T0);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves));
}

// What one unit of the top-aligned codes and of the offsets of a weight is worth, in every lane.
struct GroupFactors {
    __m512 scale, offset;
};

FQ_INLINE FQ_AVX512 GroupFactors group_factors(const FqWeight& weight) {
    return {_mm512_set1_ps(top_aligned_factor(weight)), _mm512_set1_ps(weight.offset_factor)};
}

// Scale and offset of up to 16 groups, for codes aligned to the top of a byte.
struct Groups {
    __m512 scale, offset;
};

FQ_INLINE FQ_AVX512 Groups load_groups(const uint16_t* scales, const uint16_t* offsets, __mmask16 mask,
                                       const GroupFactors& factors) {
    const __m512 scale = load_halves(scales, mask);
    const __m512 offset = _mm512_fmadd_ps(scale, factors.offset, load_halves(offsets, mask));
    return {_mm512_mul_ps(scale, factors.scale), offset};
}

template <int kWidth>
FQ_INLINE FQ_AVX512 __m512 dot_int8(const Codes& codes, const int8_t* values) {
    __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
    for (int t = 0; t < 4; ++t) {
        low = _mm512_dpbusd_epi32(low, codes.bytes[t], _mm512_load_si512(values + 64 * t));
        high = _mm512_dpbusd_epi32(high, codes.bytes[t + 4], _mm512_load_si512(values + 64 * (t + 4)));
    }
    if constexpr (has_low_nibbles(kWidth)) low = _mm512_slli_epi32(low, 4);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(low, high));
}

// Sums of the lanes of each row, in every lane of that row: 16, 8 or 4 lanes belong to one row. One tree for all (lanes
// 8 apart, then 4, 2 and 1), so that a row has the same sum whether it shared vectors with others or not.
FQ_INLINE FQ_AVX512 __m512 sum_rows(__m512 lanes, int64_t lanes_per_row) {
    if (lanes_per_row == 16) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4E));
    if (lanes_per_row >= 8) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xB1));
    lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0x4E));
    return _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0xB1));
}

// The same tree for two or four rows at once. Where in its vectors a row began does not matter: a rotation by a
// multiple of four lanes only swaps the operands of additions.
FQ_INLINE FQ_AVX512 __m512 halves_summed(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
}

template <int kRows>
FQ_INLINE FQ_AVX512 void store_sums(const __m512* totals, float* y) {
    __m512 lanes = halves_summed(totals[0], totals[1]);
    if constexpr (kRows == 4) {
        const __m512 others = halves_summed(totals[2], totals[3]);
        lanes = _mm512_add_ps(_mm512_shuffle_f32x4(lanes, others, 0x88), _mm512_shuffle_f32x4(lanes, others, 0xDD));
    } else {
        lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xB1));
    }
    lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0x4E));
    lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0xB1));
    // Not the compressing store: AMD Zen 4 takes over a hundred cycles for it.
    lanes = _mm512_maskz_compress_ps(kRows == 4 ? 0x1111 : 0x0101, lanes);
    if constexpr (kRows == 4) _mm_storeu_ps(y, _mm512_castps512_ps128(lanes));
    else _mm_storel_pi(reinterpret_cast<__m64*>(y), _mm512_castps512_ps128(lanes));
}

}  // namespace fq
