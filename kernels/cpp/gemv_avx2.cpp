// AVX2 body: codes and their dot products are in avx2_codes.h; here they take their scales and become rows of the
// result.
#include "kernels_internal.h"

#if FQ_X86
#include <utility>

#include "activations.h"
#include "avx2_codes.h"

namespace fq {
namespace {

// Scales or offsets of up to 8 groups; the lanes past the end of the row are zero.
FQ_INLINE FQ_AVX2 __m256 load_halves(const uint16_t* halves, int64_t count) {
    _mm_prefetch(reinterpret_cast<const char*>(halves) + kPrefetchBytes, _MM_HINT_T0);
    if (count >= 8) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
    // Put together in registers: a vector load right after narrow stores to the same place would wait for them.
    if (count >= 4) {
        const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(halves));
        const __m128i last = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(halves + count - 4));
        const __m128i rest = _mm_srl_epi64(last, _mm_cvtsi64_si128(16 * (8 - count)));
        return _mm256_cvtph_ps(_mm_unpacklo_epi64(first, rest));
    }
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint64_t>(halves[i]) << (16 * i);
    return _mm256_cvtph_ps(_mm_cvtsi64_si128(static_cast<int64_t>(bits)));
}

FQ_INLINE FQ_AVX2 float reduce_add(__m256 value) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Adds the vector's part of one row to each token's total; scale holds the group scale of each of the 8 words.
template <int kWidth, int kTokens, bool kTail>
FQ_INLINE FQ_AVX2 void add_int8(const Rows& rows, __m256 scale, const Activations& x, int64_t word, __m256* total) {
    const int64_t chunk = word / kWordsPerChunk, place = word % kWordsPerChunk;
    __m256i dots[kTokens];
    dot_int8<kWidth, kTokens, kTail>(rows, x.values_of<int8_t>(chunk, 0) + 4 * place, dots);
    const float* word_scale = x.scales_of(chunk, 0) + place;
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
        const __m256 factor = _mm256_mul_ps(_mm256_load_ps(word_scale + m * kWordsPerChunk), scale);
        total[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[m]), factor, total[m]);
    }
}

// The reference mode: codes as bytes, converted to float32 8 at a time. Lane 4j+c of quarter q is word 2q+j, byte c.
template <int kWidth, bool kTail>
FQ_INLINE FQ_AVX2 void add_float(const Rows& rows, __m256 scale, const Activations& x, int64_t word, int64_t tokens,
                                 __m256* total) {
    __m256i top[Layout<kWidth>::kVectors], bottom[4];
    load_codes<kWidth, 0, kTail>(rows, top);
    if constexpr (kWidth == 8) load_codes<kWidth, 1, kTail>(rows, bottom);
    alignas(32) uint8_t bytes[8][32];
    for (int t = 0; t < 8; ++t) {
        __m256i code = _mm256_slli_epi16(Layout<kWidth>::bytes_at(top, t), kWidth == 8 ? 4 : 8 - kWidth);
        if constexpr (kWidth == 8) code = _mm256_or_si256(code, Layout<kWidth>::bytes_at(bottom, t));
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes[t]), code);
    }
    const int64_t chunk = word / kWordsPerChunk, place = word % kWordsPerChunk;
    const __m256i word_of_lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (int quarter = 0; quarter < 4; ++quarter) {
        const __m256i index = _mm256_add_epi32(word_of_lane, _mm256_set1_epi32(2 * quarter));
        const __m256 lane_scale = _mm256_permutevar8x32_ps(scale, index);
        for (int64_t m = 0; m < tokens; ++m) {
            const float* values = x.values_of<float>(chunk, m) + 4 * place + 8 * quarter;
            __m256 sum = _mm256_setzero_ps();
            for (int t = 0; t < 8; ++t) {
                const __m128i part = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes[t] + 8 * quarter));
                const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(part));
                sum = _mm256_fmadd_ps(code, _mm256_load_ps(values + 64 * t), sum);
            }
            total[m] = _mm256_fmadd_ps(sum, lane_scale, total[m]);
        }
    }
}

template <int kMode, int kWidth, int kTokens, bool kTail>
FQ_INLINE FQ_AVX2 void add_vector(const Rows& rows, __m256 scale, const Activations& x, int64_t word, __m256* total) {
    if constexpr (kMode == kFqInt8) add_int8<kWidth, kTokens, kTail>(rows, scale, x, word, total);
    else add_float<kWidth, kTail>(rows, scale, x, word, x.tokens, total);
}

template <int kMode, int kWidth, int kTokens>  // kTokens = 0: as many as x has
FQ_AVX2 void run_rows(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                      int64_t y_stride) {
    const int words_per_group = weight.group_size / 32;
    const int64_t num_groups = weight.num_words / words_per_group;
    const int64_t full_words = weight.num_words / kWordsPerVector * kWordsPerVector;
    const bool has_tail = full_words < weight.num_words;  // of 4 words
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i first_group = _mm256_srli_epi32(lane, words_per_group / 2);  // lane / 1, 2, 4
    const __m256i groups_per_vector = _mm256_set1_epi32(static_cast<int>(kWordsPerVector) / words_per_group);
    const __m256i tail_mask = _mm256_setr_epi32(-1, -1, -1, -1, 0, 0, 0, 0);
    const __m256 scale_factor = _mm256_set1_ps(top_aligned_factor(weight));
    const __m256 offset_factor = _mm256_set1_ps(weight.offset_factor);
    const int64_t tokens = kTokens ? kTokens : x.tokens;
    const int64_t row_bytes = weight.num_words * 4;
    Rows rows{reinterpret_cast<const char*>(weight.planes) + begin * row_bytes, weight.plane_stride * 4, tail_mask};

    for (int64_t row = begin; row < end; ++row) {
        const uint16_t* scales = weight.scale + row * num_groups;
        const uint16_t* offsets = weight.offset + row * num_groups;
        __m256 total[kTokens ? kTokens : kMaxTokens];
        for (int64_t m = 0; m < tokens; ++m) total[m] = _mm256_setzero_ps();
        // One vector of 8 group scales serves words_per_group vectors of words.
        for (int64_t group = 0, word = 0; group < num_groups; group += 8) {
            __m256 group_scale = load_halves(scales + group, num_groups - group);
            const __m256 offset =
                _mm256_fmadd_ps(group_scale, offset_factor, load_halves(offsets + group, num_groups - group));
            for (int64_t m = 0; m < tokens; ++m) {
                const __m256 sum = _mm256_load_ps(x.sums_of(group, m) + group % kWordsPerChunk);
                total[m] = _mm256_fmadd_ps(offset, sum, total[m]);
            }
            group_scale = _mm256_mul_ps(group_scale, scale_factor);
            __m256i group_of_word = first_group;
            const int64_t end_word = std::min(word + words_per_group * kWordsPerVector, full_words);
            for (; word < end_word; word += kWordsPerVector) {
                const __m256 scale = _mm256_permutevar8x32_ps(group_scale, group_of_word);
                if (word % kWordsPerChunk == 0) fetch_ahead<kWidth>(rows);
                add_vector<kMode, kWidth, kTokens, false>(rows, scale, x, word, total);
                group_of_word = _mm256_add_epi32(group_of_word, groups_per_vector);
                rows.first += kWordsPerVector * 4;
            }
            if (has_tail && group + 8 >= num_groups) {
                const __m256 scale = _mm256_permutevar8x32_ps(group_scale, group_of_word);
                add_vector<kMode, kWidth, kTokens, true>(rows, scale, x, full_words, total);
                rows.first += row_bytes % (kWordsPerVector * 4);
            }
        }
        for (int64_t m = 0; m < tokens; ++m) y[m * y_stride + row] = reduce_add(total[m]);
    }
}

template <int kWidth, int... kFewer>  // kFewer: 0, 1, ..., pass_tokens - 1
FQ_INLINE void run_int8(std::integer_sequence<int, kFewer...>, const FqWeight& weight, const Activations& x,
                        int64_t begin, int64_t end, float* y, int64_t y_stride) {
    static constexpr RowsKernel kernels[] = {run_rows<kFqInt8, kWidth, kFewer + 1>...};
    run_passes<kWidth, kFqInt8>(kernels, weight, x, begin, end, y, y_stride);
}

template <int kWidth>
void run_int8(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
    using Fewer = std::make_integer_sequence<int, pass_tokens(kWidth)>;
    run_int8<kWidth>(Fewer{}, weight, x, begin, end, y, y_stride);
}

template <int kWidth>
FQ_AVX2 void run_float(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                       int64_t y_stride) {
    run_rows<kFqFloat32, kWidth, 0>(weight, x, begin, end, y, y_stride);
}

FQ_AVX2 void run_prepare_int8(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                              int32_t group_size, void* buffer) {
    prepare_int8(x, x_stride, tokens, num_inputs, num_words, group_size, buffer);
}

FQ_AVX2 void run_prepare_float(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                               int32_t group_size, void* buffer) {
    prepare_float(x, x_stride, tokens, num_inputs, num_words, group_size, buffer);
}

FQ_AVX2 uint64_t read_bytes(const void* data, int64_t num_bytes) {
    const char* bytes = static_cast<const char*>(data);
    __m256i sum[4] = {};
    for (int64_t i = 0; i + 128 <= num_bytes; i += 128) {
        for (int j = 0; j < 4; ++j) {
            _mm_prefetch(bytes + i + 32 * j + kPrefetchBytes, _MM_HINT_T0);
            const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i + 32 * j));
            sum[j] = _mm256_xor_si256(sum[j], line);
        }
    }
    const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), all);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

}  // namespace

const Body& avx2_body() {
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
