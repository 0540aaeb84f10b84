// Nested codes for 16 rows of a weight at a time, one lane for each. Rows are independent: the result does not depend on
// how many there are or who works on them.
#include "code_search.h"

#include <algorithm>

#include "kernels_internal.h"
#include "thread_pool.h"
#include "vector_math.h"

namespace fq {
namespace {

constexpr int64_t kMaxGroup = 128;

struct Task {
    const float* grids;
    const int64_t* bit_widths;
    int64_t num_widths, searched;
    const float* weight;           // fq_descend
    float *targets, *errors;       // errors: fq_descend
    float* codes;
    const float* matrix;           // factor or hessian
    int64_t stride, num_inputs, num_rows;
};

// Nearest integer, halves to even; for |x| < 2^22.
template <class Vector>
FQ_INLINE Vector rounded(const Vector& x) {
    return x + 12582912.0f - 12582912.0f;
}

template <class Vector>
FQ_INLINE Vector floored(const Vector& x) {
    const Vector nearest = rounded(x);
    return nearest - if_less(x, nearest, Vector::all(1.0f), Vector::all(0.0f));
}

template <class Vector>
FQ_INLINE Vector clamped(const Vector& x, const Vector& low, const Vector& high) {
    return smaller(larger(x, low), high);
}

// The pairs of one group, of 16 rows.
template <class Vector>
struct Grid {
    Vector scale[kMaxStoredWidths], offset[kMaxStoredWidths], steps_per_value[kMaxStoredWidths];
    Vector cost[kMaxStoredWidths], wish_share[kMaxStoredWidths];
    float codes_per_cell[kMaxStoredWidths];  // 2^(8 - b)
    int64_t num_widths, searched;

    FQ_INLINE Grid(const Task& task, int64_t row, int64_t count) {
        num_widths = task.num_widths;
        searched = task.searched;
        Vector* parts[] = {scale, offset, steps_per_value, cost, wish_share};
        for (int64_t part = 0; part < 5; ++part) {
            for (int64_t v = 0; v < num_widths; ++v) {
                const float* address = task.grids + (part * num_widths + v) * task.num_rows + row;
                parts[part][v] = Vector::load(address, count, 0.0f);
            }
        }
        for (int64_t v = 0; v < num_widths; ++v) {
            codes_per_cell[v] = static_cast<float>(1 << (kNumPlanes - task.bit_widths[v]));
        }
    }

    FQ_INLINE Vector decode(const Vector& code, int64_t v) const {
        return floored(code * (1.0f / codes_per_cell[v])) * scale[v] + offset[v];
    }

    // The code of least cost; candidates are cells of the second widest width, the best code inside each is known.
    FQ_INLINE Vector nearest(const Vector* targets) const {
        // A target that is farther away than this is as far away for every code.
        const Vector far = Vector::all(1 << 20);
        const Vector last_code = Vector::all(static_cast<float>((1 << kNumPlanes) - 1));
        Vector steps[kMaxStoredWidths];
        for (int64_t v = 0; v < num_widths; ++v) {
            steps[v] = clamped((targets[v] - offset[v]) * steps_per_value[v], -far, far);
        }
        const Vector widest = rounded(steps[num_widths - 1]);
        if (num_widths == 1) return clamped(widest, Vector::all(0.0f), last_code);
        // Where each width would put the code, as the 8-bit code in the middle of its cell.
        Vector centre = Vector::all(0.0f);
        for (int64_t v = 0; v < num_widths; ++v) {
            centre += ((steps[v] + 0.5f) * codes_per_cell[v] - 0.5f) * wish_share[v];
        }
        const float cell = codes_per_cell[num_widths - 2];
        const float last_first = static_cast<float>((1 << kNumPlanes) / cell) - static_cast<float>(searched);
        const Vector beginning = (centre + 0.5f) * (1.0f / cell) - 0.5f * static_cast<float>(searched);
        const Vector first = clamped(rounded(clamped(beginning, -far, far)), Vector::all(0.0f), Vector::all(last_first));
        Vector best_code, best_cost;
        for (int64_t candidate = 0; candidate < searched; ++candidate) {
            const Vector index = first + static_cast<float>(candidate);
            Vector total = Vector::all(0.0f);
            for (int64_t v = 0; v < num_widths - 1; ++v) {
                const Vector distance = steps[v] - floored(index * (cell / codes_per_cell[v]));
                total += distance * distance * cost[v];
            }
            const Vector low = index * cell;
            const Vector code = clamped(widest, low, low + (cell - 1.0f));
            const Vector distance = steps[num_widths - 1] - code;
            total += distance * distance * cost[num_widths - 1];
            best_code = candidate == 0 ? code : if_less(total, best_cost, code, best_code);
            best_cost = candidate == 0 ? total : smaller(total, best_cost);
        }
        return best_code;
    }
};

// y[k][v] -= matrix[k] * step[v] for the inputs behind one.
template <class Vector>
FQ_INLINE void subtract(const float* matrix_row, int64_t begin, int64_t end, int64_t num_widths, const Vector* step,
                        float* y) {
    for (int64_t k = begin; k < end; ++k) {
        for (int64_t v = 0; v < num_widths; ++v) {
            float* address = y + (k * num_widths + v) * kLanes;
            (Vector::load(address) - step[v] * matrix_row[k]).store(address);
        }
    }
}

// 16 rows of an array [inputs * widths, rows] to and from adjacent memory.
template <class Vector>
FQ_INLINE void gather(const float* from, int64_t num_vectors, int64_t num_rows, int64_t count, float* to) {
    for (int64_t i = 0; i < num_vectors; ++i) Vector::load(from + i * num_rows, count, 0.0f).store(to + i * kLanes);
}

template <class Vector>
FQ_INLINE void scatter(const float* from, int64_t num_vectors, int64_t num_rows, int64_t count, float* to) {
    for (int64_t i = 0; i < num_vectors; ++i) Vector::load(from + i * kLanes).store(to + i * num_rows, count);
}

template <class Vector>
FQ_INLINE void feed_back_body(const Task& task, uint32_t chunk) {
    const int64_t row = static_cast<int64_t>(chunk) * kLanes, count = std::min<int64_t>(kLanes, task.num_rows - row);
    const int64_t num_widths = task.num_widths, num_vectors = task.num_inputs * num_widths;
    const Grid<Vector> grid(task, row, count);
    alignas(64) float block[kMaxGroup * kMaxStoredWidths * kLanes];
    gather<Vector>(task.targets + row, num_vectors, task.num_rows, count, block);
    for (int64_t j = 0; j < task.num_inputs; ++j) {
        const float* matrix_row = task.matrix + j * task.stride;
        float* own = block + j * num_widths * kLanes;
        Vector error[kMaxStoredWidths];
        for (int64_t v = 0; v < num_widths; ++v) error[v] = Vector::load(own + v * kLanes);
        const Vector code = grid.nearest(error);
        code.store(task.codes + j * task.num_rows + row, count);
        for (int64_t v = 0; v < num_widths; ++v) {
            error[v] = (error[v] - grid.decode(code, v)) / Vector::all(matrix_row[j]);
            error[v].store(own + v * kLanes);
        }
        subtract(matrix_row, j + 1, task.num_inputs, num_widths, error, block);
    }
    scatter<Vector>(block, num_vectors, task.num_rows, count, task.targets + row);
}

template <class Vector>
FQ_INLINE void descend_body(const Task& task, uint32_t chunk) {
    const int64_t row = static_cast<int64_t>(chunk) * kLanes, count = std::min<int64_t>(kLanes, task.num_rows - row);
    const int64_t num_widths = task.num_widths, num_vectors = task.num_inputs * num_widths;
    const Grid<Vector> grid(task, row, count);
    alignas(64) float block[kMaxGroup * kMaxStoredWidths * kLanes];
    gather<Vector>(task.targets + row, num_vectors, task.num_rows, count, block);
    for (int64_t j = 0; j < task.num_inputs; ++j) {
        const float* matrix_row = task.matrix + j * task.stride;
        const Vector weight = Vector::load(task.weight + j * task.num_rows + row, count, 0.0f);
        Vector decoded[kMaxStoredWidths], target[kMaxStoredWidths];
        for (int64_t v = 0; v < num_widths; ++v) {
            const int64_t place = (j * num_widths + v) * task.num_rows + row;
            decoded[v] = weight - Vector::load(task.errors + place, count, 0.0f);
            const Vector slope = Vector::load(block + (j * num_widths + v) * kLanes);
            target[v] = decoded[v] + slope / Vector::all(matrix_row[j]);
        }
        const Vector code = grid.nearest(target);
        code.store(task.codes + j * task.num_rows + row, count);
        Vector step[kMaxStoredWidths];
        for (int64_t v = 0; v < num_widths; ++v) {
            float* address = task.errors + (j * num_widths + v) * task.num_rows + row;
            const Vector moved = decoded[v] - grid.decode(code, v);
            (Vector::load(address, count, 0.0f) + moved).store(address, count);
            step[v] = -moved;
        }
        subtract(matrix_row, j + 1, task.num_inputs, num_widths, step, block);
    }
}

#define FQ_CODE_SEARCH(name, part_bytes, target)                                         \
    namespace name {                                                                     \
    target void feed_back(void* context, uint32_t chunk) {                               \
        feed_back_body<Lanes<part_bytes>>(*static_cast<const Task*>(context), chunk);    \
    }                                                                                    \
    target void descend(void* context, uint32_t chunk) {                                 \
        descend_body<Lanes<part_bytes>>(*static_cast<const Task*>(context), chunk);      \
    }                                                                                    \
    }

FQ_CODE_SEARCH(portable, 16, )
#if FQ_X86
FQ_CODE_SEARCH(avx2, 32, __attribute__((target("avx2,fma"))))
FQ_CODE_SEARCH(avx512, 64, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))))
#endif

using Kernel = void (*)(void* context, uint32_t chunk);

struct Kernels {
    Kernel feed_back, descend;
};

Kernels kernels_of(int32_t isa) {
    if (body_of(isa) == nullptr) return {nullptr, nullptr};
#if FQ_X86
    if (isa == kFqAvx512) return {avx512::feed_back, avx512::descend};
    if (isa == kFqAvx2) return {avx2::feed_back, avx2::descend};
#endif
    return {portable::feed_back, portable::descend};
}

int32_t run(Task& task, Kernel kernel, int32_t num_threads) {
    bool is_valid = task.grids != nullptr && task.bit_widths != nullptr && task.num_widths >= 1 &&
                    task.num_widths <= kMaxStoredWidths && task.codes != nullptr && task.targets != nullptr &&
                    task.matrix != nullptr && task.num_inputs >= 1 && task.num_inputs <= kMaxGroup &&
                    task.stride >= task.num_inputs && task.num_rows >= 1 && num_threads >= 1;
    for (int64_t v = 0; is_valid && v < task.num_widths; ++v) {
        is_valid = task.bit_widths[v] >= 1 && task.bit_widths[v] <= kNumPlanes &&
                   (v == 0 || task.bit_widths[v - 1] < task.bit_widths[v]);
    }
    if (!is_valid || task.bit_widths[task.num_widths - 1] != kNumPlanes) return kFqBadArgument;
    if (task.num_widths > 1 && (task.searched < 1 || task.searched > 1 << task.bit_widths[task.num_widths - 2])) {
        return kFqBadArgument;
    }
    if (kernel == nullptr) return kFqUnsupportedIsa;
    parallel_for(num_threads, static_cast<uint32_t>((task.num_rows + kLanes - 1) / kLanes), kernel, &task);
    return kFqOk;
}

}  // namespace
}  // namespace fq

using namespace fq;

extern "C" {

int32_t fq_feed_back(const float* grids, const int64_t* bit_widths, int64_t num_widths, int64_t searched,
                     float* targets, float* codes, const float* factor, int64_t stride, int64_t num_inputs,
                     int64_t num_rows, int32_t isa, int32_t num_threads) {
    Task task{grids,   bit_widths, num_widths, searched, nullptr, targets, nullptr,
              codes,   factor,     stride,     num_inputs, num_rows};
    return run(task, kernels_of(isa).feed_back, num_threads);
}

int32_t fq_descend(const float* grids, const int64_t* bit_widths, int64_t num_widths, int64_t searched,
                   const float* weight, float* errors, float* slopes, float* codes, const float* hessian,
                   int64_t stride, int64_t num_inputs, int64_t num_rows, int32_t isa, int32_t num_threads) {
    if (weight == nullptr || errors == nullptr) return kFqBadArgument;
    Task task{grids,   bit_widths, num_widths, searched, weight, slopes, errors,
              codes,   hessian,    stride,     num_inputs, num_rows};
    return run(task, kernels_of(isa).descend, num_threads);
}

}  // extern "C"
