// AVX-512 body. One vector is 16 words of one plane: 512 inputs, one int32 lane per word.
//
// Planes are merged pairwise, planes -> 2-bit fields -> nibbles -> bytes, each merge being a shift and a bit select for
// each of its two results. The eight byte vectors are the codes of inputs 4t..4t+3 (t = 0..7) of every word, so eight
// VNNI dot products add up inside the word's own lane, which then takes the word's activation scale and its group's
// scale.
#include "kernels_internal.h"

#if FQ_X86
#include <immintrin.h>

#include "activations.h"

#define FQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

namespace fq {
namespace {

// How far ahead each plane is fetched: the hardware prefetchers alone follow eight streams badly. 1 KiB and more was up
// to 1.5 times slower on 4096 x 4096 weights (AMD Zen 4).
constexpr int64_t kPrefetchBytes = 256;

struct Codes {
    __m512i bytes[8];  // t = 0..7; the code is aligned to the top of the byte, except as said by has_low_nibbles()
};

// Up to 4 bits, codes t = 0..3 are left in the low nibble: shifting one sum is cheaper than shifting four vectors.
constexpr bool has_low_nibbles(int width) { return width <= 4; }

struct Rows {  // the words of one chunk in each plane
    const char* first;
    int64_t plane_bytes;
    __mmask16 mask;
};

template <bool kTail>
FQ_INLINE FQ_AVX512 __m512i load_plane(const Rows& rows, int plane) {
    const char* address = rows.first + plane * rows.plane_bytes;
    _mm_prefetch(address + kPrefetchBytes, _MM_HINT_T0);
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

FQ_INLINE __mmask16 mask_of(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

// Scales or offsets of up to 16 groups.
FQ_INLINE FQ_AVX512 __m512 load_halves(const uint16_t* halves, __mmask16 mask) {
    _mm_prefetch(reinterpret_cast<const char*>(halves) + kPrefetchBytes, _MM_HINT_T0);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves));
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

// Adds the chunk's part of one row to each token's total; scale holds the group scale of each of the 16 words.
template <int kWidth>
FQ_INLINE FQ_AVX512 void add_int8(const Codes& codes, __m512 scale, const Activations& x, int64_t chunk, int64_t tokens,
                                  __m512* total) {
    for (int64_t m = 0; m < tokens; ++m) {
        const char* base = static_cast<const char*>(x.values) + m * x.token_bytes;
        const float* word_scale = x.word_scale + m * (x.token_bytes / 4) + chunk * kWordsPerChunk;
        const __m512 dot = dot_int8<kWidth>(codes, reinterpret_cast<const int8_t*>(base) + chunk * kChunkInputs);
        total[m] = _mm512_fmadd_ps(dot, _mm512_mul_ps(_mm512_load_ps(word_scale), scale), total[m]);
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
            const char* base = static_cast<const char*>(x.values) + m * x.token_bytes;
            const float* values = reinterpret_cast<const float*>(base) + chunk * kChunkInputs + 16 * quarter;
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

// Sums of the lanes of each row, in every lane of that row: 16, 8 or 4 lanes belong to one row. One tree for all three,
// so that a row has the same sum whether it was packed or not.
FQ_INLINE FQ_AVX512 __m512 sum_rows(__m512 lanes, int64_t lanes_per_row) {
    if (lanes_per_row == 16) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4E));
    if (lanes_per_row >= 8) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xB1));
    lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0x4E));
    return _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0xB1));
}

// The activations of one token, repeated for each of the rows that share a vector.
struct PackedToken {
    __m512i values[8];
    __m512 word_scale;
    __m512 group_sum;  // in the first lanes of each row, as the offsets
};

FQ_INLINE FQ_AVX512 void pack_token(const Activations& x, int64_t m, __m512i word_of_lane, __mmask16 group_lanes,
                                    PackedToken* packed) {
    const char* base = static_cast<const char*>(x.values) + m * x.token_bytes;
    for (int t = 0; t < 8; ++t) {
        packed->values[t] = _mm512_permutexvar_epi32(word_of_lane, _mm512_load_si512(base + 64 * t));
    }
    packed->word_scale = _mm512_permutexvar_ps(word_of_lane, _mm512_load_ps(x.word_scale + m * (x.token_bytes / 4)));
    const __m512 sums = _mm512_load_ps(x.group_sum + m * (x.token_bytes / 4));
    packed->group_sum = _mm512_maskz_permutexvar_ps(group_lanes, word_of_lane, sums);
}

// Rows of 4 or 8 words would leave most of a vector empty: four or two of them, adjacent in every plane, share one.
// Returns the first row that is left.
template <int kWidth>
FQ_AVX512 int64_t run_packed_rows(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                                  int64_t y_stride) {
    const int64_t num_words = weight.num_words, rows_per_vector = kWordsPerChunk / num_words;
    const int words_per_group = weight.group_size / 32;
    const int64_t num_groups = num_words / words_per_group;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i word_of_lane = _mm512_and_si512(lane, _mm512_set1_epi32(static_cast<int>(num_words - 1)));
    const __m512i row_of_lane = _mm512_srli_epi32(lane, num_words == 8 ? 3 : 2);
    const __m512i scale_of_lane = _mm512_srli_epi32(lane, static_cast<unsigned>(words_per_group / 2));
    const __m512i row_groups = _mm512_mullo_epi32(row_of_lane, _mm512_set1_epi32(static_cast<int>(num_groups)));
    const __m512i offset_of_lane = _mm512_add_epi32(row_groups, word_of_lane);
    const __mmask16 group_lanes =
        _mm512_cmplt_epi32_mask(word_of_lane, _mm512_set1_epi32(static_cast<int>(num_groups)));
    const __mmask16 pair_mask = mask_of(rows_per_vector * num_groups);
    const __m512 scale_factor = _mm512_set1_ps(top_aligned_factor(weight));
    const __m512 offset_factor = _mm512_set1_ps(weight.offset_factor);
    PackedToken packed[kMaxTokens];
    for (int64_t m = 0; m < x.tokens; ++m) {
        pack_token(x, m, word_of_lane, group_lanes, &packed[m]);
    }
    Rows rows{reinterpret_cast<const char*>(weight.planes + begin * num_words), weight.plane_stride * 4, 0xffff};
    for (; begin + rows_per_vector <= end; begin += rows_per_vector) {
        Codes codes;
        load_codes<kWidth, false>(rows, &codes);
        rows.first += kWordsPerChunk * 4;
        const __m512 group_scale = load_halves(weight.scale + begin * num_groups, pair_mask);
        const __m512 group_offset =
            _mm512_fmadd_ps(group_scale, offset_factor, load_halves(weight.offset + begin * num_groups, pair_mask));
        const __m512 offset = _mm512_maskz_permutexvar_ps(group_lanes, offset_of_lane, group_offset);
        const __m512 scale = _mm512_permutexvar_ps(scale_of_lane, _mm512_mul_ps(group_scale, scale_factor));
        for (int64_t m = 0; m < x.tokens; ++m) {
            const __m512 total = _mm512_mul_ps(offset, packed[m].group_sum);
            const __m512 dot = dot_int8<kWidth>(codes, reinterpret_cast<const int8_t*>(packed[m].values));
            const __m512 sums =
                sum_rows(_mm512_fmadd_ps(dot, _mm512_mul_ps(packed[m].word_scale, scale), total), num_words);
            float lanes[16];
            _mm512_storeu_ps(lanes, sums);
            for (int64_t r = 0; r < rows_per_vector; ++r) y[m * y_stride + begin + r] = lanes[r * num_words];
        }
    }
    return begin;
}

template <int kMode, int kWidth, int kTokens>  // kTokens = 0: as many as x has
FQ_AVX512 void run_rows(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                        int64_t y_stride) {
    const int words_per_group = weight.group_size / 32;
    const int64_t num_groups = weight.num_words / words_per_group;
    const int64_t full_chunks = weight.num_words / kWordsPerChunk;
    const __mmask16 tail_mask = mask_of(weight.num_words % kWordsPerChunk);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i first_group = _mm512_srli_epi32(lane, static_cast<unsigned>(words_per_group / 2));  // lane / 1, 2, 4
    const __m512i groups_per_chunk = _mm512_set1_epi32(static_cast<int>(kWordsPerChunk) / words_per_group);
    const __m512 scale_factor = _mm512_set1_ps(top_aligned_factor(weight));
    const __m512 offset_factor = _mm512_set1_ps(weight.offset_factor);
    const int64_t tokens = kTokens ? kTokens : x.tokens;
    const int64_t row_bytes = weight.num_words * 4;
    Rows rows{reinterpret_cast<const char*>(weight.planes) + begin * row_bytes, weight.plane_stride * 4, tail_mask};

    for (int64_t row = begin; row < end; ++row) {
        const uint16_t* scales = weight.scale + row * num_groups;
        const uint16_t* offsets = weight.offset + row * num_groups;
        __m512 total[kTokens ? kTokens : kMaxTokens];
        for (int64_t m = 0; m < tokens; ++m) total[m] = _mm512_setzero_ps();
        // One vector of 16 group scales serves words_per_group chunks.
        for (int64_t group = 0, chunk = 0; group < num_groups; group += 16) {
            const __mmask16 mask = mask_of(num_groups - group);
            __m512 group_scale = load_halves(scales + group, mask);
            const __m512 offset = _mm512_fmadd_ps(group_scale, offset_factor, load_halves(offsets + group, mask));
            for (int64_t m = 0; m < tokens; ++m) {
                const __m512 sum = _mm512_load_ps(x.group_sum + m * (x.token_bytes / 4) + group);
                total[m] = _mm512_fmadd_ps(offset, sum, total[m]);
            }
            group_scale = _mm512_mul_ps(group_scale, scale_factor);
            __m512i group_of_word = first_group;
            const int64_t end_chunk = std::min(chunk + words_per_group, full_chunks);
            for (; chunk < end_chunk; ++chunk) {
                const __m512 scale = _mm512_permutexvar_ps(group_of_word, group_scale);
                add_chunk<kMode, kWidth, false>(rows, scale, x, chunk, tokens, total);
                group_of_word = _mm512_add_epi32(group_of_word, groups_per_chunk);
                rows.first += kWordsPerChunk * 4;
            }
            if (tail_mask != 0 && group + 16 >= num_groups) {
                const __m512 scale = _mm512_permutexvar_ps(group_of_word, group_scale);
                add_chunk<kMode, kWidth, true>(rows, scale, x, full_chunks, tokens, total);
                rows.first += row_bytes % (kWordsPerChunk * 4);
            }
        }
        for (int64_t m = 0; m < tokens; ++m) y[m * y_stride + row] = _mm512_cvtss_f32(sum_rows(total[m], 16));
    }
}

template <int kWidth>
FQ_AVX512 void run_int8(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                        int64_t y_stride) {
    if (weight.num_words == 4 || weight.num_words == 8) {
        begin = run_packed_rows<kWidth>(weight, x, begin, end, y, y_stride);
    }
    if (x.tokens == 1) run_rows<kFqInt8, kWidth, 1>(weight, x, begin, end, y, y_stride);
    else run_rows<kFqInt8, kWidth, 0>(weight, x, begin, end, y, y_stride);
}

template <int kWidth>
FQ_AVX512 void run_float(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                         int64_t y_stride) {
    run_rows<kFqFloat32, kWidth, 0>(weight, x, begin, end, y, y_stride);
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
