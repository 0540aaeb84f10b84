// AVX-512 body. The eight byte vectors of a chunk are the codes of inputs 4t..4t+3 (t = 0..7) of every word, so eight
// VNNI dot products add up inside the word's own lane, which then takes the word's activation scale and its group's
// scale.
#include "kernels_internal.h"

#if FQ_X86
#include <utility>

#include "activations.h"
#include "avx512_short_rows.h"

namespace fq {
namespace {

// Adds the chunk's part of one row to each token's total; scale holds the group scale of each of the 16 words.
template <int kWidth>
FQ_INLINE FQ_AVX512 void add_int8(const Codes& codes, __m512 scale, const Activations& x, int64_t chunk, int64_t tokens,
                                  __m512* total) {
#pragma GCC unroll 8
    for (int64_t m = 0; m < tokens; ++m) {
        const __m512 dot = dot_int8<kWidth>(codes, x.values_of<int8_t>(chunk, m));
        total[m] = _mm512_fmadd_ps(dot, _mm512_mul_ps(_mm512_load_ps(x.scales_of(chunk, m)), scale), total[m]);
    }
}

// The reference mode: the same codes, converted to float32 16 at a time. Lane 4j+c of quarter q is word 4q+j, byte c.
template <int kWidth>
FQ_INLINE FQ_AVX512 void add_float(const Codes& codes, __m512 scale, const Activations& x, int64_t chunk,
                                   int64_t tokens, __m512* total) {
    alignas(64) uint8_t bytes[8][64];
    for (int t = 0; t < 8; ++t) {
        const bool is_low = has_low_nibbles(kWidth) && t < 4;
        _mm512_store_si512(bytes[t], is_low ? _mm512_slli_epi32(codes.bytes[t], 4) : codes.bytes[t]);
    }
    const __m512i word_of_lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (int quarter = 0; quarter < 4; ++quarter) {
        const __m512i word = _mm512_add_epi32(word_of_lane, _mm512_set1_epi32(4 * quarter));
        const __m512 lane_scale = _mm512_permutexvar_ps(word, scale);
        for (int64_t m = 0; m < tokens; ++m) {
            const float* values = x.values_of<float>(chunk, m) + 16 * quarter;
            __m512 sum = _mm512_setzero_ps();
            for (int t = 0; t < 8; ++t) {
                const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[t]) + quarter);
                const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part));
                sum = _mm512_fmadd_ps(code, _mm512_load_ps(values + 64 * t), sum);
            }
            total[m] = _mm512_fmadd_ps(sum, lane_scale, total[m]);
        }
    }
}

template <int kMode, int kWidth, bool kTail>
FQ_INLINE FQ_AVX512 void add_chunk(const Rows& rows, __m512 scale, const Activations& x, int64_t chunk, int64_t tokens,
                                   __m512* total) {
    Codes codes;
    load_codes<kWidth, kTail>(rows, &codes);
    if constexpr (kMode == kFqInt8) add_int8<kWidth>(codes, scale, x, chunk, tokens, total);
    else add_float<kWidth>(codes, scale, x, chunk, tokens, total);
}

// kRows rows at a time; returns the first row that is left. kTokens = 0: as many as x has.
//
// Two rows, of whole chunks, load each vector of activations once for both. They read each plane in two places; the
// lines are fetched in the order in which they lie, or memory is slower than the loads were.
template <int kMode, int kWidth, int kTokens, int kRows>
FQ_AVX512 int64_t run_rows(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                           int64_t y_stride) {
    static_assert(kRows == 1 || kRows == 2);
    const int words_per_group = weight.group_size / 32;
    const int64_t num_groups = weight.num_words / words_per_group;
    const int64_t full_chunks = weight.num_words / kWordsPerChunk;
    const __mmask16 tail_mask = kRows == 1 ? mask_of(weight.num_words % kWordsPerChunk) : __mmask16{0};
    const __m512i lane = lane_indices();
    const __m512i first_group = _mm512_srli_epi32(lane, static_cast<unsigned>(words_per_group / 2));  // lane / 1, 2, 4
    const __m512i groups_per_chunk = _mm512_set1_epi32(static_cast<int>(kWordsPerChunk) / words_per_group);
    const GroupFactors factors = group_factors(weight);
    const int64_t tokens = kTokens ? kTokens : x.tokens;
    const int64_t row_bytes = weight.num_words * 4, chunk_bytes = kWordsPerChunk * 4;

    const char* first = reinterpret_cast<const char*>(weight.planes) + begin * row_bytes;
    for (; begin + kRows <= end; begin += kRows, first += kRows * row_bytes) {
        const uint16_t* scales = weight.scale + begin * num_groups;
        const uint16_t* offsets = weight.offset + begin * num_groups;
        Rows rows[kRows];
        __m512 total[kRows][kTokens ? kTokens : kMaxTokens];
        for (int r = 0; r < kRows; ++r) {
            rows[r] = {first + r * row_bytes, weight.plane_stride * 4, tail_mask, far_bytes(x)};
            // Of two, the first row fetches every other line from row_bytes + 64 ahead on, the second those between.
            if constexpr (kRows == 2) rows[r].prefetch_bytes = r == 0 ? row_bytes + chunk_bytes : 2 * chunk_bytes;
            for (int64_t m = 0; m < tokens; ++m) total[r][m] = _mm512_setzero_ps();
        }
        // One vector of 16 group scales serves words_per_group chunks.
        for (int64_t group = 0, chunk = 0; group < num_groups; group += 16) {
            const __mmask16 mask = mask_of(num_groups - group);
            Groups groups[kRows];
            for (int r = 0; r < kRows; ++r) {
                const int64_t pair = r * num_groups + group;
                groups[r] = load_groups(scales + pair, offsets + pair, mask, factors);
                for (int64_t m = 0; m < tokens; ++m) {
                    const __m512 sum = _mm512_load_ps(x.sums_of(group, m));
                    total[r][m] = _mm512_fmadd_ps(groups[r].offset, sum, total[r][m]);
                }
            }
            __m512i group_of_word = first_group;
            const int64_t end_chunk = std::min(chunk + words_per_group, full_chunks);
            for (; chunk < end_chunk; ++chunk) {
                for (int r = 0; r < kRows; ++r) {
                    const __m512 scale = _mm512_permutexvar_ps(group_of_word, groups[r].scale);
                    add_chunk<kMode, kWidth, false>(rows[r], scale, x, chunk, tokens, total[r]);
                    rows[r].first += chunk_bytes;
                    if constexpr (kRows == 2) rows[r].prefetch_bytes += chunk_bytes;
                }
                group_of_word = _mm512_add_epi32(group_of_word, groups_per_chunk);
            }
            if (tail_mask != 0 && group + 16 >= num_groups) {
                const __m512 scale = _mm512_permutexvar_ps(group_of_word, groups[0].scale);
                add_chunk<kMode, kWidth, true>(rows[0], scale, x, full_chunks, tokens, total[0]);
            }
        }
        for (int64_t m = 0; m < tokens; ++m) {
            if constexpr (kRows == 2) {
                const __m512 both[2] = {total[0][m], total[1][m]};
                store_sums<2>(both, y + m * y_stride + begin);
            } else {
                y[m * y_stride + begin] = _mm512_cvtss_f32(sum_rows(total[0][m], 16));
            }
        }
    }
    return begin;
}

// Up to 3 bits, row by row, what limits one token are the loads of activations, which share the first cache with the
// lines that arrive. Wider codes gained nothing from pairs, shorter and longer rows lost by them (AMD Zen 4).
constexpr bool gains_from_pairs(int width, int tokens) { return width <= 3 && tokens == 1; }
constexpr bool gains_from_pairs(int64_t num_words) {
    return num_words % kWordsPerChunk == 0 && num_words >= 64 && num_words <= 256;
}

template <int kWidth, int kTokens>
FQ_AVX512 void run_int8_tokens(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                               int64_t y_stride) {
    begin = run_sharing_rows<kWidth, kTokens>(weight, x, begin, end, y, y_stride);
    if constexpr (gains_from_pairs(kWidth, kTokens)) {
        if (gains_from_pairs(weight.num_words)) {
            begin = run_rows<kFqInt8, kWidth, kTokens, 2>(weight, x, begin, end, y, y_stride);
        }
    }
    run_rows<kFqInt8, kWidth, kTokens, 1>(weight, x, begin, end, y, y_stride);
}

template <int kWidth, int... kFewer>  // kFewer: 0, 1, ..., pass_tokens - 1
FQ_INLINE void run_int8(std::integer_sequence<int, kFewer...>, const FqWeight& weight, const Activations& x,
                        int64_t begin, int64_t end, float* y, int64_t y_stride) {
    static constexpr RowsKernel kernels[] = {run_int8_tokens<kWidth, kFewer + 1>...};
    run_passes<kWidth, kFqInt8>(kernels, weight, x, begin, end, y, y_stride);
}

template <int kWidth>
void run_int8(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
    using Fewer = std::make_integer_sequence<int, pass_tokens(kWidth)>;
    run_int8<kWidth>(Fewer{}, weight, x, begin, end, y, y_stride);
}

template <int kWidth>
FQ_AVX512 void run_float(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                         int64_t y_stride) {
    run_rows<kFqFloat32, kWidth, 0, 1>(weight, x, begin, end, y, y_stride);
}

FQ_AVX512 void run_prepare_int8(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                                int32_t group_size, void* buffer) {
    prepare_int8(x, x_stride, tokens, num_inputs, num_words, group_size, buffer);
}

FQ_AVX512 void run_prepare_float(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs,
                                 int64_t num_words, int32_t group_size, void* buffer) {
    prepare_float(x, x_stride, tokens, num_inputs, num_words, group_size, buffer);
}

FQ_AVX512 uint64_t read_bytes(const void* data, int64_t num_bytes) {
    const char* bytes = static_cast<const char*>(data);
    __m512i sum[4] = {};
    for (int64_t i = 0; i + 256 <= num_bytes; i += 256) {
        for (int j = 0; j < 4; ++j) {
            _mm_prefetch(bytes + i + 64 * j + kPrefetchBytes, _MM_HINT_T0);
            sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(bytes + i + 64 * j));
        }
    }
    const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(all));
}

}  // namespace

const Body& avx512_body() {
    static const Body body = {
        {{nullptr, run_int8<1>, run_int8<2>, run_int8<3>, run_int8<4>, run_int8<5>, run_int8<6>, run_int8<7>,
          run_int8<8>},
         {nullptr, run_float<1>, run_float<2>, run_float<3>, run_float<4>, run_float<5>, run_float<6>, run_float<7>,
          run_float<8>}},
        {run_prepare_int8, run_prepare_float},
        read_bytes,
    };
    return body;
}

}  // namespace fq
#endif  // FQ_X86
