// What the bodies (portable, AVX2, AVX-512) share: the prepared activations and the signature of a row kernel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bitplane_gemv.h"

#define FQ_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define FQ_X86 1
#else
#define FQ_X86 0
#endif

namespace fq {

constexpr int64_t kWordsPerChunk = 16;  // one 64-byte vector of one plane: 512 inputs
constexpr int64_t kChunkInputs = 512;
constexpr int64_t kMaxTokens = 16;
constexpr int64_t kNumPlanes = 8;
constexpr int64_t kInputAlignment = 128;  // a row is padded to a multiple of it
constexpr int32_t kAbiVersion = 2;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int64_t value_bytes(int32_t mode) { return mode == kFqInt8 ? 1 : 4; }

// Activations permuted to the order of the bits: value [chunk][token][t][word 0..15][c] is input 32 * (16 * chunk +
// word) + 4 * t + c. Whatever lies beyond num_inputs is zero, so padded codes never matter. The tokens of a chunk are
// adjacent, so that a kernel that knows their number reaches all of them from one address.
struct Activations {
    const void* values;       // int8 or float, 512 per chunk and token
    const float* word_scale;  // int8 only: [chunk][token][16], one scale per 32 inputs
    const float* group_sum;   // [16 groups][token][16]: sum of the (rounded) activations of each group
    int64_t tokens;           // to compute
    int64_t stride;           // tokens from one chunk to the next: more than `tokens` in a slice
    bool fetches_far;         // fetch weights into the second cache from far ahead

    template <class Value>
    FQ_INLINE const Value* values_of(int64_t chunk, int64_t token) const {
        return static_cast<const Value*>(values) + (chunk * stride + token) * kChunkInputs;
    }
    FQ_INLINE const float* scales_of(int64_t chunk, int64_t token) const {
        return word_scale + (chunk * stride + token) * kWordsPerChunk;
    }
    FQ_INLINE const float* sums_of(int64_t group, int64_t token) const {  // of 16 groups from a multiple of 16 on
        return group_sum + (group / kWordsPerChunk * stride + token) * kWordsPerChunk;
    }
    // Tokens [first, first + count).
    Activations slice(int64_t first, int64_t count, int32_t mode) const {
        const char* begin = static_cast<const char*>(values) + first * kChunkInputs * value_bytes(mode);
        return {begin, scales_of(0, first), sums_of(0, first), count, stride, fetches_far};
    }
};

inline int64_t activation_bytes(int64_t num_words, int64_t tokens, int32_t mode) {
    const int64_t num_chunks = round_up(num_words, kWordsPerChunk) / kWordsPerChunk;
    return tokens * num_chunks * (kChunkInputs * value_bytes(mode) + 2 * kWordsPerChunk * 4);
}

inline Activations view_activations(const void* buffer, int64_t num_words, int64_t tokens, int32_t mode) {
    const int64_t num_chunks = round_up(num_words, kWordsPerChunk) / kWordsPerChunk;
    const char* values = static_cast<const char*>(buffer);
    const int64_t all_value_bytes = tokens * num_chunks * kChunkInputs * value_bytes(mode);
    const float* word_scale = reinterpret_cast<const float*>(values + all_value_bytes);
    return {values, word_scale, word_scale + tokens * num_chunks * kWordsPerChunk, tokens, tokens, false};
}

// Value of one unit of a code aligned to the top of a byte, where every body leaves it.
inline float top_aligned_factor(const FqWeight& weight) {
    return weight.scale_factor / static_cast<float>(1 << (8 - weight.bit_width));
}

// How many threads a product that reads `num_bytes` is worth: below this share a second thread takes longer to hear of
// the work than the work takes.
inline int threads_for(int64_t num_bytes, int num_threads) {
    constexpr int64_t kMinBytesPerThread = 32 * 1024;
    return static_cast<int>(std::clamp<int64_t>(num_bytes / kMinBytesPerThread, 1, num_threads));
}

// Whether weights are fetched from far ahead too. One thread that computes one token asks for them so fast that the
// hardware does it better (AMD Zen 4: 5 to 9% slower at 8 bits); several tokens or threads gain (14%, 4 to 10%).
constexpr bool gains_from_far(int64_t tokens, int threads) { return tokens > 1 || threads > 1; }

// Rows that one thread takes at a time: long enough for the prefetchers to get going, short enough to share out.
inline int64_t rows_per_chunk(int64_t num_rows, int64_t row_bytes, int num_threads) {
    constexpr int64_t kChunkBytes = 64 * 1024;
    const int64_t share = (num_rows + 2 * num_threads - 1) / (2 * num_threads);
    return std::max<int64_t>(1, std::min(share, kChunkBytes / row_bytes));
}

// Computes rows [begin, end) of y for all tokens.
using RowsKernel = void (*)(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y,
                            int64_t y_stride);
using PrepareKernel = void (*)(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                               int32_t group_size, void* buffer);
using ReadKernel = uint64_t (*)(const void* data, int64_t num_bytes);

struct Body {
    RowsKernel rows[2][kNumPlanes + 1];  // [mode][bit_width]
    PrepareKernel prepare[2];
    ReadKernel read;
};

// How many tokens at most a body has kernels for that know their number at compile time and keep their sums in
// registers. They take long to compile: widths at which drafts are seldom verified have fewer, and read their rows
// more often.
constexpr int64_t pass_tokens(int width) { return width == 5 || width == 6 || width == 8 ? 8 : 4; }

// Computes rows for any number of tokens with kernels for 1 to pass_tokens(kWidth), kernels[tokens - 1]. Rows that must
// be read more than once, which are one thread's chunk, are still in its second cache then.
template <int kWidth, int32_t kMode>
FQ_INLINE void run_passes(const RowsKernel* kernels, const FqWeight& weight, const Activations& x, int64_t begin,
                          int64_t end, float* y, int64_t y_stride) {
    for (int64_t first = 0; first < x.tokens; first += pass_tokens(kWidth)) {
        const int64_t tokens = std::min(pass_tokens(kWidth), x.tokens - first);
        kernels[tokens - 1](weight, x.slice(first, tokens, kMode), begin, end, y + first * y_stride, y_stride);
    }
}

// Null if this machine cannot run it.
const Body* body_of(int32_t isa);

const Body& portable_body();
#if FQ_X86
const Body& avx2_body();
const Body& avx512_body();
#endif

}  // namespace fq
