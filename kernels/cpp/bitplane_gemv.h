// C ABI of the CPU matrix-vector product over bitplanes, and the types its parts share.
//
// kernels/native_structs.py has the same structs and constants and compares them (mirror.cpp).
//
// kernels/bitplane.py is the one description of the stored layout; in short: plane 0 is the most significant, a plane
// is row-major [outputs, words] int32, and bit 8c+t (byte c = 0..3, t = 0..7) of word w is input 32w + 4t + c.
//
// Weights are read exactly as stored. It is the activations that are permuted, once per call, so that the codes come
// out of a few shifts and selects in the order in which the activations already lie.
#pragma once

#include <cstddef>
#include <cstdint>

#define FQ_EXPORT __attribute__((visibility("default")))

extern "C" {

// One width of a nested weight.
struct FqWeight {
    const int32_t* planes;   // plane p, row n, word w at planes[p * plane_stride + n * num_words + w]
    const uint16_t* scale;   // fp16 [num_outputs, groups]
    const uint16_t* offset;  // fp16 [num_outputs, groups]
    int64_t plane_stride;    // words from one plane to the next; more than outputs * words in a slice of rows
    int64_t num_outputs;
    int64_t num_inputs;  // columns of the activations
    int64_t num_words;   // 32-input words of a padded row, a multiple of 4
    int32_t group_size;  // 32, 64 or 128
    int32_t bit_width;   // planes read, 1..8
    // The weight is (scale * scale_factor) * (code >> (8 - b)) + (offset + scale * offset_factor). A width that is
    // stored uses 1 and 0; one that is not is derived from the 8-bit pair with 2^(8-b) and (2^(8-b) - 1) / 2.
    float scale_factor;
    float offset_factor;
};

enum FqIsa { kFqPortable = 0, kFqAvx2 = 1, kFqAvx512 = 2 };
enum FqMode { kFqInt8 = 0, kFqFloat32 = 1 };  // kFqInt8: activations rounded to int8, one scale per 32 inputs
enum FqCpuFeature {
    kFqCpuAvx2 = 1,
    kFqCpuFma = 2,
    kFqCpuF16c = 4,
    kFqCpuAvx512f = 8,
    kFqCpuAvx512bw = 16,
    kFqCpuAvx512vl = 32,
    kFqCpuAvx512dq = 64,
    kFqCpuAvx512vnni = 128,
};
enum FqStatus { kFqOk = 0, kFqBadArgument = 1, kFqUnsupportedIsa = 2, kFqOutOfMemory = 3 };

// Raised with every change of a struct, a constant or a signature of the C ABI.
FQ_EXPORT int32_t fq_abi_version(void);

// What a caller in another language repeats of these headers, by name: constants, and size and place of every field of
// the structs that it fills in. Null behind the last name.
FQ_EXPORT const char* fq_mirror_name(int32_t index);
FQ_EXPORT double fq_mirror_value(int32_t index);

FQ_EXPORT int32_t fq_best_isa(void);
FQ_EXPORT int32_t fq_isa_supported(int32_t isa);

// The extensions of this machine that a body may need, FqCpuFeature bits, and whether a body runs where there are
// just these.
FQ_EXPORT uint32_t fq_cpu_features(void);
FQ_EXPORT int32_t fq_isa_runs_with(int32_t isa, uint32_t features);

// y[m, n] = sum_k x[m, k] * W[n, k] for m in 0..tokens-1; strides in floats. Bit for bit the same for any num_threads
// and any number of tokens.
FQ_EXPORT int32_t fq_gemv(const FqWeight* weight, const float* x, int64_t x_stride, int64_t tokens, float* y,
                          int64_t y_stride, int32_t mode, int32_t isa, int32_t num_threads);

// The two halves of fq_gemv, for callers that multiply several weights (q, k, v; gate, up) by the same activations.
// `buffer` holds fq_activation_bytes() bytes aligned to 64; all those weights share num_words and group_size.
FQ_EXPORT int64_t fq_activation_bytes(int64_t num_words, int64_t tokens, int32_t mode);
FQ_EXPORT int32_t fq_prepare(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                             int32_t group_size, int32_t mode, int32_t isa, void* buffer);
FQ_EXPORT int32_t fq_gemv_prepared(const FqWeight* weight, const void* buffer, int64_t tokens, float* y,
                                   int64_t y_stride, int32_t mode, int32_t isa, int32_t num_threads);

// Reads every byte once and returns their checksum: the bandwidth that the benchmark compares with.
FQ_EXPORT uint64_t fq_read_bytes(const void* data, int64_t num_bytes, int32_t isa, int32_t num_threads);

}  // extern "C"
