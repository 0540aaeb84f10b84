// The product's exported functions: argument checks, choice of the body, division into chunks of rows.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "bitplane_gemv.h"
#include "kernels_internal.h"
#include "thread_pool.h"

namespace fq {
namespace {

bool is_shape_valid(int64_t num_inputs, int64_t num_words, int32_t group_size, int32_t mode, int64_t tokens) {
    return (group_size == 32 || group_size == 64 || group_size == 128) && num_words > 0 && num_words % 4 == 0 &&
           num_inputs > 0 && num_inputs <= 32 * num_words && tokens >= 1 && tokens <= kMaxTokens &&
           (mode == kFqInt8 || mode == kFqFloat32);
}

bool is_weight_valid(const FqWeight& weight) {
    return weight.planes != nullptr && weight.scale != nullptr && weight.offset != nullptr && weight.num_outputs > 0 &&
           weight.bit_width >= 1 && weight.bit_width <= kNumPlanes &&
           (weight.bit_width == 1 || weight.plane_stride >= weight.num_outputs * weight.num_words);
}

struct GemvTask {
    const FqWeight* weight;
    Activations x;
    RowsKernel kernel;
    int64_t rows_per_chunk;
    float* y;
    int64_t y_stride;
};

void run_chunk(void* context, uint32_t chunk) {
    const GemvTask& task = *static_cast<const GemvTask*>(context);
    const int64_t begin = chunk * task.rows_per_chunk;
    const int64_t end = std::min(begin + task.rows_per_chunk, task.weight->num_outputs);
    task.kernel(*task.weight, task.x, begin, end, task.y, task.y_stride);
}

struct ReadTask {
    const char* data;
    int64_t num_bytes, chunk_bytes;
    ReadKernel kernel;
    uint64_t* sums;
};

void run_read(void* context, uint32_t chunk) {
    const ReadTask& task = *static_cast<const ReadTask*>(context);
    const int64_t begin = chunk * task.chunk_bytes;
    task.sums[chunk] = task.kernel(task.data + begin, std::min(task.chunk_bytes, task.num_bytes - begin));
}

// Activation scratch of this thread; grows to the largest product and stays.
struct FreeScratch {
    void operator()(void* data) const { std::free(data); }
};

void* scratch(int64_t num_bytes) {
    thread_local std::unique_ptr<void, FreeScratch> data;
    thread_local int64_t capacity = 0;
    if (num_bytes > capacity) {
        const int64_t wanted = round_up(num_bytes, 4096);
        data.reset(std::aligned_alloc(64, static_cast<size_t>(wanted)));
        capacity = data ? wanted : 0;
    }
    return data.get();
}

}  // namespace

const Body* body_of(int32_t isa) {
    if (!fq_isa_supported(isa)) return nullptr;
#if FQ_X86
    if (isa == kFqAvx512) return &avx512_body();
    if (isa == kFqAvx2) return &avx2_body();
#endif
    return &portable_body();
}

}  // namespace fq

using namespace fq;

extern "C" {

int32_t fq_abi_version(void) { return kAbiVersion; }

int64_t fq_activation_bytes(int64_t num_words, int64_t tokens, int32_t mode) {
    return activation_bytes(num_words, tokens, mode);
}

int32_t fq_prepare(const float* x, int64_t x_stride, int64_t tokens, int64_t num_inputs, int64_t num_words,
                   int32_t group_size, int32_t mode, int32_t isa, void* buffer) {
    if (x == nullptr || buffer == nullptr || !is_shape_valid(num_inputs, num_words, group_size, mode, tokens)) {
        return kFqBadArgument;
    }
    const Body* body = body_of(isa);
    if (body == nullptr) return kFqUnsupportedIsa;
    body->prepare[mode](x, x_stride, tokens, num_inputs, num_words, group_size, buffer);
    return kFqOk;
}

int32_t fq_gemv_prepared(const FqWeight* weight, const void* buffer, int64_t tokens, float* y, int64_t y_stride,
                         int32_t mode, int32_t isa, int32_t num_threads) {
    if (weight == nullptr || buffer == nullptr || y == nullptr || !is_weight_valid(*weight) || num_threads < 1 ||
        !is_shape_valid(weight->num_inputs, weight->num_words, weight->group_size, mode, tokens)) {
        return kFqBadArgument;
    }
    const Body* body = body_of(isa);
    if (body == nullptr) return kFqUnsupportedIsa;
    const RowsKernel kernel = body->rows[mode][weight->bit_width];
    Activations x = view_activations(buffer, weight->num_words, tokens, mode);
    const int64_t row_bytes = weight->num_words * 4 * weight->bit_width;
    const int threads = threads_for(row_bytes * weight->num_outputs * tokens, num_threads);
    x.fetches_far = gains_from_far(tokens, threads);
    if (threads == 1) {
        kernel(*weight, x, 0, weight->num_outputs, y, y_stride);
        return kFqOk;
    }
    const int64_t rows = rows_per_chunk(weight->num_outputs, row_bytes, threads);
    GemvTask task{weight, x, kernel, rows, y, y_stride};
    parallel_for(threads, static_cast<uint32_t>((weight->num_outputs + rows - 1) / rows), run_chunk, &task);
    return kFqOk;
}

int32_t fq_gemv(const FqWeight* weight, const float* x, int64_t x_stride, int64_t tokens, float* y, int64_t y_stride,
                int32_t mode, int32_t isa, int32_t num_threads) {
    if (weight == nullptr || (mode != kFqInt8 && mode != kFqFloat32) || tokens < 1 || tokens > kMaxTokens ||
        weight->num_words <= 0) {
        return kFqBadArgument;
    }
    void* buffer = scratch(fq_activation_bytes(weight->num_words, tokens, mode));
    if (buffer == nullptr) return kFqOutOfMemory;
    const int32_t status = fq_prepare(x, x_stride, tokens, weight->num_inputs, weight->num_words, weight->group_size,
                                      mode, isa, buffer);
    if (status != kFqOk) return status;
    return fq_gemv_prepared(weight, buffer, tokens, y, y_stride, mode, isa, num_threads);
}

uint64_t fq_read_bytes(const void* data, int64_t num_bytes, int32_t isa, int32_t num_threads) {
    const Body* body = body_of(isa);
    if (body == nullptr || num_bytes <= 0) return 0;
    constexpr int kMaxChunks = 256;
    uint64_t sums[kMaxChunks] = {};
    const int64_t num_chunks = num_threads > 1 ? kMaxChunks : 1;
    ReadTask task{static_cast<const char*>(data), num_bytes, round_up((num_bytes + num_chunks - 1) / num_chunks, 4096),
                  body->read, sums};
    const int64_t used = (num_bytes + task.chunk_bytes - 1) / task.chunk_bytes;
    parallel_for(num_threads, static_cast<uint32_t>(used), run_read, &task);
    uint64_t total = 0;
    for (uint64_t sum : sums) total += sum;
    return total;
}

}  // extern "C"
