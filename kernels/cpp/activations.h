// Rounds and permutes activations. One text for every body: always inlined into a function that carries the body's
// target attribute, so each gets its own vector code and all get the same numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels_internal.h"

namespace fq {

// Where in a buffer of activations what is written of one token and one word goes.
template <class Value>
struct WordPlaces {
    Value* values;  // eight places of four, 64 values apart
    float* scale;
    float* sum;  // of the group that has the word's index
};

template <class Value>
FQ_INLINE WordPlaces<Value> places_of(const Activations& x, int64_t token, int64_t word) {
    const int64_t chunk = word / kWordsPerChunk, place = word % kWordsPerChunk;
    return {const_cast<Value*>(x.values_of<Value>(chunk, token)) + place * 4,
            const_cast<float*>(x.scales_of(chunk, token)) + place, const_cast<float*>(x.sums_of(word, token)) + place};
}

FQ_INLINE float round_word(const float* input, int8_t* values, int32_t* sum) {
    uint32_t largest = 0;  // bits of the largest magnitude: unlike a float maximum, this does not lose a NaN
    for (int i = 0; i < 32; ++i) {
        uint32_t bits;
        std::memcpy(&bits, input + i, 4);
        largest = std::max(largest, bits & 0x7fffffffu);
    }
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    const bool is_finite = largest < 0x7f800000u;
    // Below this 127 / magnitude would overflow; such a word contributes nothing a float32 sum could hold on to.
    const bool is_tiny = magnitude < 1e-35f;
    const float inverse = is_finite && !is_tiny ? 127.0f / magnitude : 0.0f;
    int32_t rounded[32];
    int32_t total = 0;
    for (int i = 0; i < 32; ++i) {
        // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even, in any vector unit. A NaN
        // input may not reach the conversion: the result is poisoned through the scale instead.
        const float scaled = is_finite ? input[i] * inverse : 0.0f;
        const float shifted = scaled + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &shifted, 4);
        rounded[i] = bits - 0x4b400000;
        total += rounded[i];
    }
    for (int t = 0; t < 8; ++t) {
        for (int c = 0; c < 4; ++c) values[t * 64 + c] = static_cast<int8_t>(rounded[4 * t + c]);
    }
    *sum = total;
    if (!is_finite) return std::nanf("");
    return is_tiny ? 0.0f : magnitude / 127.0f;
}

FQ_INLINE void prepare_int8(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                            int32_t group_size, void* buffer) {
    const int64_t padded_words = round_up(num_words, kWordsPerChunk);
    const int64_t words_per_group = group_size / 32;
    const Activations prepared = view_activations(buffer, num_words, tokens, kFqInt8);
    for (int64_t token = 0; token < tokens; ++token) {
        const float* row = x + token * x_stride;
        for (int64_t group = 0; group < padded_words; ++group) *places_of<int8_t>(prepared, token, group).sum = 0.0f;
        for (int64_t word = 0; word < padded_words; ++word) {
            const WordPlaces<int8_t> places = places_of<int8_t>(prepared, token, word);
            const int64_t left = num_inputs - 32 * word;
            int32_t sum = 0;
            if (left >= 32) {
                *places.scale = round_word(row + 32 * word, places.values, &sum);
            } else {
                float padded[32] = {};
                for (int64_t i = 0; i < left; ++i) padded[i] = row[32 * word + i];
                *places.scale = round_word(padded, places.values, &sum);
            }
            float* group_sum = places_of<int8_t>(prepared, token, word / words_per_group).sum;
            *group_sum += *places.scale * static_cast<float>(sum);
        }
    }
}

FQ_INLINE void prepare_float(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                             int32_t group_size, void* buffer) {
    const int64_t padded_words = round_up(num_words, kWordsPerChunk);
    const int64_t words_per_group = group_size / 32;
    const Activations prepared = view_activations(buffer, num_words, tokens, kFqFloat32);
    for (int64_t token = 0; token < tokens; ++token) {
        const float* row = x + token * x_stride;
        for (int64_t word = 0; word < padded_words; ++word) {
            const WordPlaces<float> places = places_of<float>(prepared, token, word);
            *places.scale = 1.0f;
            for (int t = 0; t < 8; ++t) {
                for (int c = 0; c < 4; ++c) {
                    const int64_t k = 32 * word + 4 * t + c;
                    places.values[t * 64 + c] = k < num_inputs ? row[k] : 0.0f;
                }
            }
        }
        for (int64_t group = 0; group < padded_words; ++group) {
            const int64_t begin = group * 32 * words_per_group;
            double sum = 0.0;
            for (int64_t k = begin; k < std::min(begin + 32 * words_per_group, num_inputs); ++k) sum += row[k];
            *places_of<float>(prepared, token, group).sum = static_cast<float>(sum);
        }
    }
}

}  // namespace fq
