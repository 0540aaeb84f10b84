// Portable body: plain C++, one 32-bit word at a time. For machines without AVX2 and as the text to read first.
#include <cstring>

#include "activations.h"
#include "kernels_internal.h"

namespace fq {
namespace {

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = half >> 10 & 31u;
    const uint32_t mantissa = half & 1023u;
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) * 5.9604644775390625e-08f;  // subnormal: units of 2^-24
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112u) << 23) | mantissa << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Four codes of kWidth bits, aligned to the top of their byte: inputs 4t..4t+3 of the word.
template <int kWidth>
FQ_INLINE uint32_t codes_at(const uint32_t* planes, int t) {
    uint32_t codes = 0;
    for (int p = 0; p < kWidth; ++p) codes |= (planes[p] >> t & 0x01010101u) << (7 - p);
    return codes;
}

// Of one word: its codes, unpacked once for all tokens, and 32 activations.
FQ_INLINE float dot_int8(const uint32_t* codes, const int8_t* values) {
    int32_t sum = 0;
    for (int t = 0; t < 8; ++t) {
        for (int c = 0; c < 4; ++c) sum += static_cast<int32_t>(codes[t] >> 8 * c & 255u) * values[64 * t + c];
    }
    return static_cast<float>(sum);
}

FQ_INLINE float dot_float(const uint32_t* codes, const float* values) {
    float sum[4] = {};
    for (int t = 0; t < 8; ++t) {
        for (int c = 0; c < 4; ++c) sum[c] += static_cast<float>(codes[t] >> 8 * c & 255u) * values[64 * t + c];
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <int kMode, int kWidth, int kTokens>  // kTokens = 0: as many as x has
void run_tokens(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
    const int64_t words_per_group = weight.group_size / 32;
    const int64_t num_groups = weight.num_words / words_per_group;
    const float factor = top_aligned_factor(weight);
    const int64_t tokens = kTokens ? kTokens : x.tokens;
    for (int64_t row = begin; row < end; ++row) {
        const int32_t* words = weight.planes + row * weight.num_words;
        float total[kTokens ? kTokens : kMaxTokens] = {};
        for (int64_t group = 0; group < num_groups; ++group) {
            const float scale = half_to_float(weight.scale[row * num_groups + group]);
            const float offset = half_to_float(weight.offset[row * num_groups + group]) + scale * weight.offset_factor;
            float dot[kTokens ? kTokens : kMaxTokens] = {};
            for (int64_t word = group * words_per_group; word < (group + 1) * words_per_group; ++word) {
                uint32_t planes[kWidth];
                for (int p = 0; p < kWidth; ++p) {
                    planes[p] = static_cast<uint32_t>(words[p * weight.plane_stride + word]);
                }
                uint32_t codes[8];
                for (int t = 0; t < 8; ++t) codes[t] = codes_at<kWidth>(planes, t);
                const int64_t chunk = word / kWordsPerChunk, place = word % kWordsPerChunk;
                for (int64_t m = 0; m < tokens; ++m) {
                    if constexpr (kMode == kFqInt8) {
                        const float word_scale = x.scales_of(chunk, m)[place];
                        const int8_t* values = x.values_of<int8_t>(chunk, m) + 4 * place;
                        dot[m] += word_scale * dot_int8(codes, values);
                    } else {
                        const float* values = x.values_of<float>(chunk, m) + 4 * place;
                        dot[m] += dot_float(codes, values);
                    }
                }
            }
            for (int64_t m = 0; m < tokens; ++m) {
                const float sum = x.sums_of(group, m)[group % kWordsPerChunk];
                total[m] += scale * factor * dot[m] + offset * sum;
            }
        }
        for (int64_t m = 0; m < tokens; ++m) y[m * y_stride + row] = total[m];
    }
}

template <int kMode, int kWidth>
void run_rows(const FqWeight& weight, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
    if (x.tokens == 1) run_tokens<kMode, kWidth, 1>(weight, x, begin, end, y, y_stride);
    else run_tokens<kMode, kWidth, 0>(weight, x, begin, end, y, y_stride);
}

template <int kWidth>
constexpr RowsKernel kInt8 = run_rows<kFqInt8, kWidth>;
template <int kWidth>
constexpr RowsKernel kFloat = run_rows<kFqFloat32, kWidth>;

void run_prepare_int8(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                      int32_t group_size, void* buffer) {
    prepare_int8(x, x_stride, tokens, num_inputs, num_words, group_size, buffer);
}

void run_prepare_float(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                       int32_t group_size, void* buffer) {
    prepare_float(x, x_stride, tokens, num_inputs, num_words, group_size, buffer);
}

uint64_t read_bytes(const void* data, int64_t num_bytes) {
    const char* bytes = static_cast<const char*>(data);
    uint64_t sum[8] = {};
    for (int64_t i = 0; i + 64 <= num_bytes; i += 64) {
        uint64_t line[8];
        std::memcpy(line, bytes + i, 64);
        for (int j = 0; j < 8; ++j) sum[j] ^= line[j];
    }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

}  // namespace

const Body& portable_body() {
    static const Body body = {
        {{nullptr, kInt8<1>, kInt8<2>, kInt8<3>, kInt8<4>, kInt8<5>, kInt8<6>, kInt8<7>, kInt8<8>},
         {nullptr, kFloat<1>, kFloat<2>, kFloat<3>, kFloat<4>, kFloat<5>, kFloat<6>, kFloat<7>, kFloat<8>}},
        {run_prepare_int8, run_prepare_float},
        read_bytes,
    };
    return body;
}

}  // namespace fq
