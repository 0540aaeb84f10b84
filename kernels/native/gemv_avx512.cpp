// AVX-512 body. The eight byte vectors of a chunk are the codes of inputs 4t..4t+3 (t = 0..7) of every word, so eight
// VNNI dot products add up inside the word's own lane, which then takes the word's activation scale and its group's
// scale.
#include "kernels_internal.h"

#if FQ_X86
#include "activations.h"
#include "avx512_codes.h"

namespace fq {
namespace {

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

// Sums of the lanes of each row, in every lane of that row: 16, 8 or 4 lanes belong to one row. One tree for all (lanes
// 8 apart, then 4, 2 and 1), so that a row has the same sum whether it shared vectors with others or not.
FQ_INLINE FQ_AVX512 __m512 sum_rows(__m512 lanes, int64_t lanes_per_row) {
    if (lanes_per_row == 16) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4E));
    if (lanes_per_row >= 8) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xB1));
    lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0x4E));
    return _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0xB1));
}

// The activations of one token, repeated for each of the rows that share a vector.
struct ShortToken {
    __m512i values[8];
    __m512 word_scale;
    __m512 group_sum;  // in the first lanes of each row, as the offsets
};

FQ_INLINE FQ_AVX512 void repeat_token(const Activations& x, int64_t m, __m512i word_of_lane, __mmask16 group_lanes,
                                      ShortToken* repeated) {
    const char* base = static_cast<const char*>(x.values) + m * x.token_bytes;
    for (int t = 0; t < 8; ++t) {
        repeated->values[t] = _mm512_permutexvar_epi32(word_of_lane, _mm512_load_si512(base + 64 * t));
    }
    repeated->word_scale = _mm512_permutexvar_ps(word_of_lane, _mm512_load_ps(x.word_scale + m * (x.token_bytes / 4)));
    const __m512 sums = _mm512_load_ps(x.group_sum + m * (x.token_bytes / 4));
    repeated->group_sum = _mm512_maskz_permutexvar_ps(group_lanes, word_of_lane, sums);
}

// Rows of 4 or 8 words would leave most of a vector empty: four or two of them, adjacent in every plane, share one.
// Returns the first row that is left.
template <int kWidth>
FQ_AVX512 int64_t run_short_rows(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
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
    ShortToken repeated[kMaxTokens];
    for (int64_t m = 0; m < x.tokens; ++m) {
        repeat_token(x, m, word_of_lane, group_lanes, &repeated[m]);
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
            const __m512 total = _mm512_mul_ps(offset, repeated[m].group_sum);
            const __m512 dot = dot_int8<kWidth>(codes, reinterpret_cast<const int8_t*>(repeated[m].values));
            const __m512 sums =
                sum_rows(_mm512_fmadd_ps(dot, _mm512_mul_ps(repeated[m].word_scale, scale), total), num_words);
            float lanes[16];
            _mm512_storeu_ps(lanes, sums);
            for (int64_t r = 0; r < rows_per_vector; ++r) y[m * y_stride + begin + r] = lanes[r * num_words];
        }
    }
    return begin;
}

// The same tree for two or four rows at once. Where in its vectors a row began does not matter: a rotation by a multiple
// of four lanes only swaps the operands of additions.
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

constexpr int64_t kMaxJoinedChunks = 15;
constexpr int64_t kMaxJoinedGroups = 32;  // of all the rows that are joined: two vectors

// How many rows, adjacent in every plane, make up whole vectors; 1 if joining them is not worth it or not possible.
FQ_INLINE int64_t num_joined_rows(const FqWeight& weight) {
    const int64_t last_words = weight.num_words % kWordsPerChunk, count = last_words == 8 ? 2 : 4;
    const int64_t num_words = count * weight.num_words;
    const bool fits = num_words <= kMaxJoinedChunks * kWordsPerChunk &&
                      num_words * 32 <= kMaxJoinedGroups * weight.group_size &&
                      weight.num_words * 32 <= 16 * weight.group_size;
    return last_words != 0 && fits ? count : 1;
}

// Up to 32 floats and the lanes picked from them.
struct TwoVectors {
    __m512 parts[2];
    bool has_second;

    FQ_INLINE FQ_AVX512 __m512 pick(__m512i lanes) const {
        return has_second ? _mm512_permutex2var_ps(parts[0], lanes, parts[1]) : _mm512_permutexvar_ps(lanes, parts[0]);
    }
};

// The activations of one token, repeated for every row that is joined.
struct JoinedToken {
    __m512i values[kMaxJoinedChunks][8];
    __m512 word_scale[kMaxJoinedChunks];
    __m512 group_sum[2];
};

FQ_INLINE FQ_AVX512 void join_token(const Activations& x, int64_t m, int64_t num_words, int64_t num_groups,
                                    int64_t num_chunks, JoinedToken* joined) {
    const char* base = static_cast<const char*>(x.values) + m * x.token_bytes;
    const float* word_scale = x.word_scale + m * (x.token_bytes / 4);
    const float* group_sum = x.group_sum + m * (x.token_bytes / 4);
    alignas(64) int32_t word[16], place[16];
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        for (int lane = 0; lane < 16; ++lane) {
            word[lane] = static_cast<int32_t>((chunk * kWordsPerChunk + lane) % num_words);
            place[lane] = word[lane] / 16 * static_cast<int32_t>(kChunkInputs / 4) + word[lane] % 16;
        }
        for (int t = 0; t < 8; ++t) {
            joined->values[chunk][t] = _mm512_i32gather_epi32(_mm512_load_si512(place), base + 64 * t, 4);
        }
        joined->word_scale[chunk] = _mm512_i32gather_ps(_mm512_load_si512(word), word_scale, 4);
    }
    for (int part = 0; part < 2; ++part) {
        for (int lane = 0; lane < 16; ++lane) place[lane] = static_cast<int32_t>((16 * part + lane) % num_groups);
        joined->group_sum[part] = _mm512_i32gather_ps(_mm512_load_si512(place), group_sum, 4);
    }
}

// Rows that would leave part of their last vector empty: kRows of them are read as one row of whole vectors. A vector in
// which one row ends and the next begins is unpacked once and added to both, by masks. Returns the first row that is
// left.
template <int kWidth, int kRows, int kTokens>  // kTokens = 0: as many as x has
FQ_AVX512 int64_t run_joined_rows(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                                  int64_t y_stride) {
    constexpr int kHeld = kTokens ? kTokens : kMaxTokens;
    const int64_t num_words = weight.num_words, tokens = kTokens ? kTokens : x.tokens;
    const int words_per_group = weight.group_size / 32;
    const int64_t num_groups = num_words / words_per_group, all_groups = kRows * num_groups;
    const bool has_second = all_groups > 16;
    const __mmask16 pair_masks[2] = {mask_of(all_groups), has_second ? mask_of(all_groups - 16) : __mmask16{0}};
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i first_group = _mm512_srli_epi32(lane, static_cast<unsigned>(words_per_group / 2));
    const __m512i groups_per_chunk = _mm512_set1_epi32(16 / words_per_group);
    const __m512 scale_factor = _mm512_set1_ps(top_aligned_factor(weight));
    const __m512 offset_factor = _mm512_set1_ps(weight.offset_factor);
    __m512i group_of_lane[kRows];  // of the joined rows, where the row's sum begins with its offsets
    __mmask16 group_mask[kRows];
    for (int row = 0; row < kRows; ++row) {
        const int64_t first = row * num_words % kWordsPerChunk;  // lane of the row's first word
        const __m512i group = _mm512_and_si512(_mm512_sub_epi32(lane, _mm512_set1_epi32(static_cast<int>(first))),
                                               _mm512_set1_epi32(15));
        group_mask[row] = _mm512_cmplt_epi32_mask(group, _mm512_set1_epi32(static_cast<int>(num_groups)));
        group_of_lane[row] = _mm512_add_epi32(group, _mm512_set1_epi32(static_cast<int>(row * num_groups)));
    }
    JoinedToken joined[kHeld];
    for (int64_t m = 0; m < tokens; ++m) {
        join_token(x, m, num_words, num_groups, kRows * num_words / kWordsPerChunk, &joined[m]);
    }
    Rows rows{reinterpret_cast<const char*>(weight.planes + begin * num_words), weight.plane_stride * 4, 0xffff};
    for (; begin + kRows <= end; begin += kRows) {
        TwoVectors scales{{}, has_second}, offsets{{}, has_second};
        for (int part = 0; part < 2; ++part) {
            if (part == 1 && !has_second) break;
            const int64_t pair = begin * num_groups + 16 * part;
            const __m512 group_scale = load_halves(weight.scale + pair, pair_masks[part]);
            offsets.parts[part] =
                _mm512_fmadd_ps(group_scale, offset_factor, load_halves(weight.offset + pair, pair_masks[part]));
            scales.parts[part] = _mm512_mul_ps(group_scale, scale_factor);
        }
        __m512 total[kHeld][kRows], dot[kHeld], factor[kHeld];
        for (int64_t m = 0; m < tokens; ++m) {
            TwoVectors products{{}, has_second};
            products.parts[0] = _mm512_mul_ps(offsets.parts[0], joined[m].group_sum[0]);
            if (has_second) products.parts[1] = _mm512_mul_ps(offsets.parts[1], joined[m].group_sum[1]);
            for (int row = 0; row < kRows; ++row) {
                total[m][row] = _mm512_maskz_mov_ps(group_mask[row], products.pick(group_of_lane[row]));
            }
        }
        __m512i group = first_group;
        int64_t chunk = 0;
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
            const int64_t first = row * num_words % kWordsPerChunk;
            int64_t left = num_words;
            if (first != 0) {
                for (int64_t m = 0; m < tokens; ++m) {
                    const __mmask16 in_row = static_cast<__mmask16>(0xffff << first);
                    total[m][row] = _mm512_mask3_fmadd_ps(dot[m], factor[m], total[m][row], in_row);
                }
                left -= kWordsPerChunk - first;
            }
            for (; left > 0; left -= kWordsPerChunk) {
                Codes codes;
                load_codes<kWidth, false>(rows, &codes);
                rows.first += kWordsPerChunk * 4;
                const __m512 scale = scales.pick(group);
                for (int64_t m = 0; m < tokens; ++m) {
                    dot[m] = dot_int8<kWidth>(codes, reinterpret_cast<const int8_t*>(joined[m].values[chunk]));
                    factor[m] = _mm512_mul_ps(joined[m].word_scale[chunk], scale);
                    total[m][row] = _mm512_mask3_fmadd_ps(dot[m], factor[m], total[m][row], mask_of(left));
                }
                group = _mm512_add_epi32(group, groups_per_chunk);
                ++chunk;
            }
        }
        for (int64_t m = 0; m < tokens; ++m) store_sums<kRows>(total[m], y + m * y_stride + begin);
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

template <int kWidth, int kTokens>
FQ_INLINE FQ_AVX512 void run_int8_tokens(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end,
                                         float* y, int64_t y_stride) {
    const int64_t joined = num_joined_rows(weight);
    if (weight.num_words == 4 || weight.num_words == 8) {
        begin = run_short_rows<kWidth>(weight, x, begin, end, y, y_stride);
    } else if (joined == 2) {
        begin = run_joined_rows<kWidth, 2, kTokens>(weight, x, begin, end, y, y_stride);
    } else if (joined == 4) {
        begin = run_joined_rows<kWidth, 4, kTokens>(weight, x, begin, end, y, y_stride);
    }
    run_rows<kFqInt8, kWidth, kTokens>(weight, x, begin, end, y, y_stride);
}

template <int kWidth>
FQ_AVX512 void run_int8(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                        int64_t y_stride) {
    if (x.tokens == 1) run_int8_tokens<kWidth, 1>(weight, x, begin, end, y, y_stride);
    else run_int8_tokens<kWidth, 0>(weight, x, begin, end, y, y_stride);
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
