// Rows that would leave lanes of a vector empty share vectors: the words of adjacent rows are adjacent in every plane.
#pragma once

#include "avx512_sums.h"

namespace fq {

// The activations of one token, repeated for each of the rows that share a vector.
struct ShortToken {
    __m512i values[8];
    __m512 word_scale;
    __m512 group_sum;  // in the first lanes of each row, as the offsets
};

FQ_INLINE FQ_AVX512 void repeat_token(const Activations& x, int64_t m, __m512i word_of_lane, __mmask16 group_lanes,
                                      ShortToken* repeated) {
    const int8_t* values = x.values_of<int8_t>(0, m);
    for (int t = 0; t < 8; ++t) {
        repeated->values[t] = _mm512_permutexvar_epi32(word_of_lane, _mm512_load_si512(values + 64 * t));
    }
    repeated->word_scale = _mm512_permutexvar_ps(word_of_lane, _mm512_load_ps(x.scales_of(0, m)));
    const __m512 sums = _mm512_load_ps(x.sums_of(0, m));
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
    const __m512i lane = lane_indices();
    const __m512i word_of_lane = _mm512_and_si512(lane, _mm512_set1_epi32(static_cast<int>(num_words - 1)));
    const __m512i row_of_lane = _mm512_srli_epi32(lane, num_words == 8 ? 3 : 2);
    const __m512i scale_of_lane = _mm512_srli_epi32(lane, static_cast<unsigned>(words_per_group / 2));
    const __m512i row_groups = _mm512_mullo_epi32(row_of_lane, _mm512_set1_epi32(static_cast<int>(num_groups)));
    const __m512i offset_of_lane = _mm512_add_epi32(row_groups, word_of_lane);
    const __mmask16 group_lanes =
        _mm512_cmplt_epi32_mask(word_of_lane, _mm512_set1_epi32(static_cast<int>(num_groups)));
    const __mmask16 pair_mask = mask_of(rows_per_vector * num_groups);
    const GroupFactors factors = group_factors(weight);
    ShortToken repeated[kMaxTokens];
    for (int64_t m = 0; m < x.tokens; ++m) {
        repeat_token(x, m, word_of_lane, group_lanes, &repeated[m]);
    }
    const char* first_row = reinterpret_cast<const char*>(weight.planes + begin * num_words);
    Rows rows{first_row, weight.plane_stride * 4, 0xffff, far_bytes(x)};
    for (; begin + rows_per_vector <= end; begin += rows_per_vector) {
        Codes codes;
        load_codes<kWidth, false>(rows, &codes);
        rows.first += kWordsPerChunk * 4;
        const int64_t first_group = begin * num_groups;
        const Groups groups = load_groups(weight.scale + first_group, weight.offset + first_group, pair_mask, factors);
        const __m512 offset = _mm512_maskz_permutexvar_ps(group_lanes, offset_of_lane, groups.offset);
        const __m512 scale = _mm512_permutexvar_ps(scale_of_lane, groups.scale);
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

constexpr int64_t kMaxJoinedChunks = 15;
constexpr int64_t kMaxPairedWords = 32;  // in two vectors, which one permutation reaches: repeating costs little
constexpr int kMaxJoinedTokens = 5;      // of four rows: the activations of more tokens leave the first cache
constexpr int64_t kMaxJoinedGroups = 32;  // of all the rows that are joined: two vectors

// How many rows, adjacent in every plane, make up whole vectors; 1 if joining them is not worth it or not possible. The
// activations of every token are repeated first: for several tokens that is done where a vector is half full or where
// it costs little.
FQ_INLINE int64_t num_joined_rows(const FqWeight& weight, int tokens) {
    const int64_t last_words = weight.num_words % kWordsPerChunk, count = last_words == 8 ? 2 : 4;
    const int64_t num_words = count * weight.num_words;
    const bool repeats_cheaply = tokens <= kMaxJoinedTokens && weight.num_words <= kMaxPairedWords;
    const bool fits = num_words <= kMaxJoinedChunks * kWordsPerChunk &&
                      num_words * 32 <= kMaxJoinedGroups * weight.group_size &&
                      weight.num_words * 32 <= 16 * weight.group_size;
    return last_words != 0 && fits && (tokens == 1 || count == 2 || repeats_cheaply) ? count : 1;
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
    const int8_t* values = x.values_of<int8_t>(0, m);
    const float *word_scale = x.scales_of(0, m), *group_sum = x.sums_of(0, m);
    const int32_t words_per_chunk = static_cast<int32_t>(x.stride * kWordsPerChunk);
    const int32_t places_per_chunk = static_cast<int32_t>(x.stride * kChunkInputs / 4);
    alignas(64) int32_t word[16], place[16];
    const bool is_pair = num_words <= kMaxPairedWords;
    const int64_t second = is_pair && num_words > kWordsPerChunk ? 1 : 0;  // a short row has no second vector
    const int8_t* next_values = x.values_of<int8_t>(second, m);
    const __m512 scales = _mm512_load_ps(word_scale), next_scales = _mm512_load_ps(x.scales_of(second, m));
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        for (int lane = 0; lane < 16; ++lane) {
            const int32_t index = static_cast<int32_t>((chunk * kWordsPerChunk + lane) % num_words);
            word[lane] = is_pair ? index : index / 16 * words_per_chunk + index % 16;
            place[lane] = index / 16 * places_per_chunk + index % 16;
        }
        const __m512i words = _mm512_load_si512(word), places = _mm512_load_si512(place);
        if (is_pair) {
            for (int t = 0; t < 8; ++t) {
                const __m512i next = _mm512_load_si512(next_values + 64 * t);
                joined->values[chunk][t] = _mm512_permutex2var_epi32(_mm512_load_si512(values + 64 * t), words, next);
            }
            joined->word_scale[chunk] = _mm512_permutex2var_ps(scales, words, next_scales);
        } else {
            for (int t = 0; t < 8; ++t) joined->values[chunk][t] = _mm512_i32gather_epi32(places, values + 64 * t, 4);
            joined->word_scale[chunk] = _mm512_i32gather_ps(words, word_scale, 4);
        }
    }
    for (int part = 0; part < 2; ++part) {
        for (int lane = 0; lane < 16; ++lane) place[lane] = static_cast<int32_t>((16 * part + lane) % num_groups);
        joined->group_sum[part] = _mm512_i32gather_ps(_mm512_load_si512(place), group_sum, 4);
    }
}

// Rows that would leave part of their last vector empty: kRows of them are read as one row of whole vectors. A vector
// in which one row ends and the next begins is unpacked once and added to both, by masks. Returns the first row that
// is left. kWords = 0: rows of any length; else of so many words, in groups of four.
template <int kWidth, int kRows, int kTokens, int kWords>
FQ_AVX512 int64_t run_joined_rows(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                                  int64_t y_stride) {
    const int64_t num_words = kWords ? kWords : weight.num_words;
    const int words_per_group = kWords ? 4 : weight.group_size / 32;
    const int64_t num_groups = num_words / words_per_group, all_groups = kRows * num_groups;
    const bool has_second = all_groups > 16;
    const __mmask16 pair_masks[2] = {mask_of(all_groups), has_second ? mask_of(all_groups - 16) : __mmask16{0}};
    const __m512i lane = lane_indices();
    const __m512i first_group = _mm512_srli_epi32(lane, static_cast<unsigned>(words_per_group / 2));
    const __m512i groups_per_chunk = _mm512_set1_epi32(16 / words_per_group);
    const GroupFactors factors = group_factors(weight);
    __m512i group_of_lane[kRows];  // of the joined rows, where the row's sum begins with its offsets
    __mmask16 group_mask[kRows];
    for (int row = 0; row < kRows; ++row) {
        const int64_t first = row * num_words % kWordsPerChunk;  // lane of the row's first word
        const __m512i group = _mm512_and_si512(_mm512_sub_epi32(lane, _mm512_set1_epi32(static_cast<int>(first))),
                                               _mm512_set1_epi32(15));
        group_mask[row] = _mm512_cmplt_epi32_mask(group, _mm512_set1_epi32(static_cast<int>(num_groups)));
        group_of_lane[row] = _mm512_add_epi32(group, _mm512_set1_epi32(static_cast<int>(row * num_groups)));
    }
    JoinedToken joined[kTokens];
#pragma GCC unroll 8
    for (int64_t m = 0; m < kTokens; ++m) {
        join_token(x, m, num_words, num_groups, kRows * num_words / kWordsPerChunk, &joined[m]);
    }
    const char* first_row = reinterpret_cast<const char*>(weight.planes + begin * num_words);
    Rows rows{first_row, weight.plane_stride * 4, 0xffff, far_bytes(x)};
    for (; begin + kRows <= end; begin += kRows) {
        TwoVectors scales{{}, has_second}, offsets{{}, has_second};
        for (int part = 0; part < 2; ++part) {
            if (part == 1 && !has_second) break;
            const int64_t first = begin * num_groups + 16 * part;
            const Groups groups = load_groups(weight.scale + first, weight.offset + first, pair_masks[part], factors);
            scales.parts[part] = groups.scale;
            offsets.parts[part] = groups.offset;
        }
        __m512 total[kTokens][kRows];
#pragma GCC unroll 8
        for (int64_t m = 0; m < kTokens; ++m) {
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
            if (first != 0) left -= kWordsPerChunk - first;
            for (; left > 0; left -= kWordsPerChunk) {
                Codes codes;
                load_codes<kWidth, false>(rows, &codes);
                rows.first += kWordsPerChunk * 4;
                const __m512 scale = scales.pick(group);
                const bool is_whole = left >= kWordsPerChunk;
                const __mmask16 in_row = mask_of(left), in_next = static_cast<__mmask16>(~in_row);
#pragma GCC unroll 8
                for (int64_t m = 0; m < kTokens; ++m) {
                    const auto* values = reinterpret_cast<const int8_t*>(joined[m].values[chunk]);
                    const __m512 dot = dot_int8<kWidth>(codes, values);
                    const __m512 factor = _mm512_mul_ps(joined[m].word_scale[chunk], scale);
                    __m512* sum = total[m] + row;
                    if (is_whole) {
                        sum[0] = _mm512_fmadd_ps(dot, factor, sum[0]);
                    } else {
                        sum[0] = _mm512_mask3_fmadd_ps(dot, factor, sum[0], in_row);
                        if (row + 1 < kRows) sum[1] = _mm512_mask3_fmadd_ps(dot, factor, sum[1], in_next);
                    }
                }
                group = _mm512_add_epi32(group, groups_per_chunk);
                ++chunk;
            }
        }
#pragma GCC unroll 8
        for (int64_t m = 0; m < kTokens; ++m) store_sums<kRows>(total[m], y + m * y_stride + begin);
    }
    return begin;
}

// The rows that share vectors, if any do; returns the first row that is left.
template <int kWidth, int kTokens>
FQ_INLINE FQ_AVX512 int64_t run_sharing_rows(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end,
                                             float* y, int64_t y_stride) {
    const int64_t num_words = weight.num_words, joined = num_joined_rows(weight, kTokens);
    if (num_words == 4 || num_words == 8) return run_short_rows<kWidth>(weight, x, begin, end, y, y_stride);
    // Loops of constant length are up to a quarter faster: for rows of 768, 896 and 1280 inputs in groups of 128.
    if constexpr (kTokens == 1) {
        const int64_t known_words = weight.group_size == 128 ? num_words : 0;
        if (known_words == 24) return run_joined_rows<kWidth, 2, 1, 24>(weight, x, begin, end, y, y_stride);
        if (known_words == 28) return run_joined_rows<kWidth, 4, 1, 28>(weight, x, begin, end, y, y_stride);
        if (known_words == 40) return run_joined_rows<kWidth, 2, 1, 40>(weight, x, begin, end, y, y_stride);
    }
    if constexpr (kTokens == 1 || pass_tokens(kWidth) == 8) {
        if (joined == 2) return run_joined_rows<kWidth, 2, kTokens, 0>(weight, x, begin, end, y, y_stride);
    }
    if constexpr (kTokens == 1 || (pass_tokens(kWidth) == 8 && kTokens <= kMaxJoinedTokens)) {
        if (joined == 4) return run_joined_rows<kWidth, 4, kTokens, 0>(weight, x, begin, end, y, y_stride);
    }
    return begin;
}

}  // namespace fq
