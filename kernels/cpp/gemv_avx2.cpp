// AVX2 body. One vector is 8 words of one plane: 256 inputs, half a chunk of activations, one int32 lane per word.
//
// Planes are merged pairwise up to nibbles as in the AVX-512 body, but no further: vpmaddubsw adds products in pairs to
// int16, which a full byte would overflow and a nibble cannot (15 * 127 * 2 * 8 vectors = 30,480).
#include "kernels_internal.h"

#if FQ_X86
#include <immintrin.h>

#include "activations.h"

#define FQ_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace fq {
namespace {

constexpr int64_t kWordsPerVector = 8;
// How far ahead each plane is fetched: the hardware prefetchers alone follow eight streams badly. 1 KiB and more was up
// to 1.5 times slower on 4096 x 4096 weights (AMD Zen 4).
constexpr int64_t kPrefetchBytes = 256;

struct Rows {  // the words of one half chunk in each plane
    const char* first;
    int64_t plane_bytes;
    __m256i mask;
};

struct Nibbles {  // r = 0..3; in each byte t = r in the low nibble, t = r + 4 in the high one
    __m256i r[4];
};

template <bool kTail>
FQ_INLINE FQ_AVX2 __m256i load_plane(const Rows& rows, int plane) {
    const char* address = rows.first + plane * rows.plane_bytes;
    _mm_prefetch(address + kPrefetchBytes, _MM_HINT_T0);
    __m256i words;
    if constexpr (kTail) words = _mm256_maskload_epi32(reinterpret_cast<const int*>(address), rows.mask);
    else words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
    // Keeps the compiler from loading the words anew for each use.
    asm("" : "+x"(words));
    return words;
}

// From fields a (more significant) and b of S bits: even takes the fields at even positions, odd those at odd ones. The
// difference of the two is moved instead of the fields themselves, which saves two of eight operations.
template <int S>
FQ_INLINE FQ_AVX2 void merge(__m256i lower, __m256i a, __m256i b, __m256i* even, __m256i* odd) {
    const __m256i change = _mm256_and_si256(_mm256_xor_si256(a, _mm256_srli_epi32(b, S)), lower);
    *odd = _mm256_xor_si256(a, change);
    *even = _mm256_xor_si256(b, _mm256_slli_epi32(change, S));
}

// Nibbles of kCount planes from kFirst. Bits of a nibble that no plane fills are left undefined: used_bits() masks
// them.
template <int kFirst, int kCount, bool kTail>
FQ_INLINE FQ_AVX2 Nibbles load_nibbles(const Rows& rows) {
    const __m256i lower1 = _mm256_set1_epi8(0x55), lower2 = _mm256_set1_epi8(0x33);
    Nibbles nibbles;
    const __m256i plane0 = load_plane<kTail>(rows, kFirst);
    if constexpr (kCount == 1) {
        for (int r = 0; r < 4; ++r) nibbles.r[r] = _mm256_slli_epi32(plane0, 3 - r);
        return nibbles;
    }
    __m256i high[2], low[2];
    merge<1>(lower1, plane0, load_plane<kTail>(rows, kFirst + 1), &high[0], &high[1]);
    if constexpr (kCount == 2) {
        for (int r = 0; r < 2; ++r) {
            nibbles.r[r] = _mm256_slli_epi32(high[r], 2);
            nibbles.r[r + 2] = high[r];
        }
        return nibbles;
    }
    const __m256i plane2 = load_plane<kTail>(rows, kFirst + 2);
    if constexpr (kCount == 3) {
        low[0] = _mm256_slli_epi32(plane2, 1);
        low[1] = plane2;
    } else {
        merge<1>(lower1, plane2, load_plane<kTail>(rows, kFirst + 3), &low[0], &low[1]);
    }
    for (int r = 0; r < 2; ++r) merge<2>(lower2, high[r], low[r], &nibbles.r[r], &nibbles.r[r + 2]);
    return nibbles;
}

// Bits of the low nibble that kCount planes fill.
template <int kCount>
FQ_INLINE FQ_AVX2 __m256i used_bits() {
    return _mm256_set1_epi8(0x0F & 0x0F << (4 - kCount));
}

// Sum of nibble * activation over the 32 inputs of each word.
template <int kCount>
FQ_INLINE FQ_AVX2 __m256i dot_nibbles(const Nibbles& nibbles, const __m256i* values) {
    __m256i sum = _mm256_setzero_si256();
    for (int r = 0; r < 4; ++r) {
        const __m256i low = _mm256_and_si256(nibbles.r[r], used_bits<kCount>());
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(nibbles.r[r], 4), used_bits<kCount>());
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(low, _mm256_load_si256(values + 2 * r)));
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(high, _mm256_load_si256(values + 2 * (r + 4))));
    }
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

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

constexpr int top_count(int width) { return width < 4 ? width : 4; }

// Adds the vector's part of one row to each token's total; scale holds the group scale of each of the 8 words.
template <int kWidth, bool kTail>
FQ_INLINE FQ_AVX2 void add_int8(const Rows& rows, __m256 scale, const Activations& x, int64_t word, int64_t tokens,
                                __m256* total) {
    const Nibbles top = load_nibbles<0, top_count(kWidth), kTail>(rows);
    Nibbles bottom;
    if constexpr (kWidth > 4) bottom = load_nibbles<4, kWidth - 4, kTail>(rows);
    const int64_t place = word / kWordsPerChunk * kChunkInputs + word % kWordsPerChunk * 4;
    for (int64_t m = 0; m < tokens; ++m) {
        const char* base = static_cast<const char*>(x.values) + m * x.token_bytes + place;
        const __m256i* values = reinterpret_cast<const __m256i*>(base);
        __m256i dot = _mm256_slli_epi32(dot_nibbles<top_count(kWidth)>(top, values), 4);
        if constexpr (kWidth > 4) dot = _mm256_add_epi32(dot, dot_nibbles<kWidth - 4>(bottom, values));
        const __m256 word_scale = _mm256_load_ps(x.word_scale + m * (x.token_bytes / 4) + word);
        total[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(word_scale, scale), total[m]);
    }
}

// The reference mode: codes as bytes, converted to float32 8 at a time. Lane 4j+c of quarter q is word 2q+j, byte c.
template <int kWidth, bool kTail>
FQ_INLINE FQ_AVX2 void add_float(const Rows& rows, __m256 scale, const Activations& x, int64_t word, int64_t tokens,
                                 __m256* total) {
    const Nibbles top = load_nibbles<0, top_count(kWidth), kTail>(rows);
    const __m256i top_bits = used_bits<top_count(kWidth)>();
    alignas(32) uint8_t codes[8][32];
    for (int r = 0; r < 4; ++r) {
        __m256i low = _mm256_slli_epi32(_mm256_and_si256(top.r[r], top_bits), 4);
        __m256i high = _mm256_and_si256(top.r[r], _mm256_slli_epi32(top_bits, 4));
        _mm256_store_si256(reinterpret_cast<__m256i*>(codes[r]), low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(codes[r + 4]), high);
    }
    if constexpr (kWidth > 4) {
        const Nibbles bottom = load_nibbles<4, kWidth - 4, kTail>(rows);
        const __m256i bottom_bits = used_bits<kWidth - 4>();
        for (int r = 0; r < 4; ++r) {
            __m256i* low = reinterpret_cast<__m256i*>(codes[r]);
            __m256i* high = reinterpret_cast<__m256i*>(codes[r + 4]);
            *low = _mm256_or_si256(*low, _mm256_and_si256(bottom.r[r], bottom_bits));
            *high = _mm256_or_si256(*high, _mm256_and_si256(_mm256_srli_epi32(bottom.r[r], 4), bottom_bits));
        }
    }
    const int64_t place = word / kWordsPerChunk * kChunkInputs + word % kWordsPerChunk * 4;
    const __m256i word_of_lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (int quarter = 0; quarter < 4; ++quarter) {
        const __m256i index = _mm256_add_epi32(word_of_lane, _mm256_set1_epi32(2 * quarter));
        const __m256 lane_scale = _mm256_permutevar8x32_ps(scale, index);
        for (int64_t m = 0; m < tokens; ++m) {
            const char* base = static_cast<const char*>(x.values) + m * x.token_bytes;
            const float* values = reinterpret_cast<const float*>(base) + place + 8 * quarter;
            __m256 sum = _mm256_setzero_ps();
            for (int t = 0; t < 8; ++t) {
                const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes[t] + 8 * quarter));
                const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
                sum = _mm256_fmadd_ps(code, _mm256_load_ps(values + 64 * t), sum);
            }
            total[m] = _mm256_fmadd_ps(sum, lane_scale, total[m]);
        }
    }
}

template <int kMode, int kWidth, bool kTail>
FQ_INLINE FQ_AVX2 void add_vector(const Rows& rows, __m256 scale, const Activations& x, int64_t word, int64_t tokens,
                                  __m256* total) {
    if constexpr (kMode == kFqInt8) add_int8<kWidth, kTail>(rows, scale, x, word, tokens, total);
    else add_float<kWidth, kTail>(rows, scale, x, word, tokens, total);
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
                const __m256 sum = _mm256_load_ps(x.group_sum + m * (x.token_bytes / 4) + group);
                total[m] = _mm256_fmadd_ps(offset, sum, total[m]);
            }
            group_scale = _mm256_mul_ps(group_scale, scale_factor);
            __m256i group_of_word = first_group;
            const int64_t end_word = std::min(word + words_per_group * kWordsPerVector, full_words);
            for (; word < end_word; word += kWordsPerVector) {
                const __m256 scale = _mm256_permutevar8x32_ps(group_scale, group_of_word);
                add_vector<kMode, kWidth, false>(rows, scale, x, word, tokens, total);
                group_of_word = _mm256_add_epi32(group_of_word, groups_per_vector);
                rows.first += kWordsPerVector * 4;
            }
            if (has_tail && group + 8 >= num_groups) {
                const __m256 scale = _mm256_permutevar8x32_ps(group_scale, group_of_word);
                add_vector<kMode, kWidth, true>(rows, scale, x, full_words, tokens, total);
                rows.first += row_bytes % (kWordsPerVector * 4);
            }
        }
        for (int64_t m = 0; m < tokens; ++m) y[m * y_stride + row] = reduce_add(total[m]);
    }
}

template <int kWidth>
FQ_AVX2 void run_int8(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                      int64_t y_stride) {
    if (x.tokens == 1) run_rows<kFqInt8, kWidth, 1>(weight, x, begin, end, y, y_stride);
    else run_rows<kFqInt8, kWidth, 0>(weight, x, begin, end, y, y_stride);
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
