// One text for every instruction set, in vectors of 16 lanes: the same operations in the same order, so the same numbers
// on every machine; the statistics of the softmax but for rounding (FQ_FUSED).
#include "decoder_math.h"

#include <algorithm>
#include <cmath>

#include "signal_constants.h"
#include "vector_math.h"

namespace fq {
namespace {

template <class Vector>
FQ_INLINE void rms_norm_body(const float* x, const float* weight, float epsilon, int64_t size, float* y) {
    const float factor = 1.0f / std::sqrt(dot<Vector>(x, x, size) / static_cast<float>(size) + epsilon);
    for (int64_t i = 0; i < size; ++i) y[i] = weight[i] * (x[i] * factor);
}

FQ_INLINE void rotate_body(float* head, const float* cosine, const float* sine, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cosine[i] - second * sine[i];
        head[i + half] = second * cosine[i] + first * sine[i];
    }
}

// Exponentiates scores less their maximum, in place; returns one over their sum.
template <class Vector>
FQ_INLINE float softmax_weights(float* scores, int64_t length) {
    float largest = scores[0];
    for (int64_t i = 1; i < length; ++i) largest = std::max(largest, scores[i]);
    for (int64_t i = length; i % kLanes != 0; ++i) scores[i] = -INFINITY;
    Vector sum = Vector::all(0.0f);
    for (int64_t i = 0; i < length; i += kLanes) {
        const Vector score = Vector::load(scores + i) - largest;
        // `exponential` is not 0 there; what lies behind the end is.
        const Vector weight = if_less(score, Vector::all(-87.0f), Vector::all(0.0f), exponential(score));
        weight.store(scores + i);
        sum += weight;
    }
    return 1.0f / sum.sum();
}

// Where the value of a position lies.
FQ_INLINE const float* value_at(const float* cache, int64_t head_dim, int64_t position) {
    const int64_t place = position % kCacheBlock;
    return cache + (position - place) * 2 * head_dim + (kCacheBlock + place) * head_dim;
}

// out[0 .. 16 * kVectors) = sum over positions of weight * value; `cache` begins at the first of those dimensions.
template <class Vector, int kVectors>
FQ_INLINE void mix_values(const float* weights, const float* cache, int64_t head_dim, int64_t length, float factor,
                          float* out) {
    Vector sum[kVectors];
    for (Vector& part : sum) part = Vector::all(0.0f);
    for (int64_t first = 0; first < length; first += kCacheBlock) {
        const float* values = value_at(cache, head_dim, first);
        const int64_t count = std::min(kCacheBlock, length - first);
        for (int64_t i = 0; i < count; ++i) {
            for (int v = 0; v < kVectors; ++v) sum[v] += Vector::load(values + i * head_dim + v * kLanes) * weights[first + i];
        }
    }
    for (int v = 0; v < kVectors; ++v) (sum[v] * factor).store(out + v * kLanes);
}

// Products of one query with a block of 16 keys, which lie with their positions adjacent: [head_dim][16].
template <class Vector>
FQ_INLINE Vector block_scores(const float* query, const float* keys, int64_t head_dim) {
    Vector sum[2] = {Vector::all(0.0f), Vector::all(0.0f)};
    int64_t d = 0;
    for (; d + 2 <= head_dim; d += 2) {
        sum[0] += Vector::load(keys + d * kLanes) * query[d];
        sum[1] += Vector::load(keys + (d + 1) * kLanes) * query[d + 1];
    }
    return sum[0] + sum[1];
}

template <class Vector>
FQ_INLINE void attend_body(const float* queries, int64_t num_queries, int64_t head_dim, const float* cache,
                           int64_t length, float scale, float* scores, float* out) {
    for (int64_t query = 0; query < num_queries; ++query) {
        for (int64_t i = 0; i < length; i += kLanes) {
            const float* keys = cache + i * 2 * head_dim;
            (block_scores<Vector>(queries + query * head_dim, keys, head_dim) * scale).store(scores + i);
        }
        const float factor = softmax_weights<Vector>(scores, length);
        float* mixed = out + query * head_dim;
        int64_t d = 0;
        for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) {
            mix_values<Vector, 4>(scores, cache + d, head_dim, length, factor, mixed + d);
        }
        for (; d + kLanes <= head_dim; d += kLanes) {
            mix_values<Vector, 1>(scores, cache + d, head_dim, length, factor, mixed + d);
        }
        for (; d < head_dim; ++d) {
            float sum = 0.0f;
            for (int64_t i = 0; i < length; ++i) sum += scores[i] * value_at(cache, head_dim, i)[d];
            mixed[d] = sum * factor;
        }
    }
}

template <class Vector>
FQ_INLINE void swiglu_body(float* gate, const float* up, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes) {
        const Vector value = Vector::load(gate + i, size - i, 0.0f);
        const Vector result = value / (exponential(-value) + 1.0f) * Vector::load(up + i, size - i, 0.0f);
        result.store(gate + i, size - i);
    }
}

template <class Vector, int kBlocks>
FQ_INLINE void dense_block(const float* x, const float* weight, int64_t num_inputs, int64_t num_outputs, float* y) {
    Vector sum[kBlocks];
    for (Vector& part : sum) part = Vector::all(0.0f);
    for (int64_t k = 0; k < num_inputs; ++k) {
        for (int block = 0; block < kBlocks; ++block) {
            sum[block] += Vector::load(weight + k * num_outputs + block * kLanes) * x[k];
        }
    }
    for (int block = 0; block < kBlocks; ++block) sum[block].store(y + block * kLanes);
}

template <class Vector>
FQ_INLINE void dense_body(const float* x, const float* weight, int64_t num_inputs, int64_t num_outputs, int64_t begin,
                          int64_t end, float* y) {
    int64_t n = begin;
    for (; n + 4 * kLanes <= end; n += 4 * kLanes) dense_block<Vector, 4>(x, weight + n, num_inputs, num_outputs, y + n);
    for (; n + kLanes <= end; n += kLanes) dense_block<Vector, 1>(x, weight + n, num_inputs, num_outputs, y + n);
    for (; n < end; ++n) {
        float sum = 0.0f;
        for (int64_t k = 0; k < num_inputs; ++k) sum += weight[k * num_outputs + n] * x[k];
        y[n] = sum;
    }
}

FQ_INLINE void add_body(const float* x, int64_t size, float* y) {
    for (int64_t i = 0; i < size; ++i) y[i] += x[i];
}

FQ_INLINE void observe_body(const float* before, const float* after, int64_t size, float* residual_update,
                            float* crest) {
    float largest = 0.0f;
    double squares = 0.0, difference = 0.0;
    for (int64_t i = 0; i < size; ++i) {
        const float delta = after[i] - before[i];
        largest = std::max(largest, std::fabs(before[i]));
        squares += static_cast<double>(before[i]) * before[i];
        difference += static_cast<double>(delta) * delta;
    }
    const double norm = std::max(std::sqrt(squares), static_cast<double>(kNormFloor));
    *residual_update = static_cast<float>(std::sqrt(difference) / norm);
    *crest = static_cast<float>(largest * std::sqrt(static_cast<double>(size)) / norm);
}

constexpr int64_t kDistributionBlock = 2048;  // logits that are read again while they are in the nearest cache

// One exponential per token: with weights w = e^(logit - largest), the entropy and the divergence from the distribution
// before are sums of w times a difference of logits. Logits come from far away, so they are read once: block by block,
// and what was summed is scaled down when a block has a larger one.
template <class Vector>
FQ_INLINE void distribution_body(const float* logits, int64_t size, float floor, const float* previous,
                                 float previous_log_partition, DistributionStatistics* statistics) {
    float largest = -INFINITY, runner_up = -INFINITY, base = 0.0f, anchor = 0.0f;
    Vector sum = Vector::all(0.0f), below = sum, moved = sum;
    for (int64_t begin = 0; begin < size; begin += kDistributionBlock) {
        const int64_t end = std::min(begin + kDistributionBlock, size);
        Vector first = Vector::all(-INFINITY), second = first;  // the two largest of each lane
        for (int64_t i = begin; i < end; i += kLanes) {
            const Vector value = Vector::load(logits + i, end - i, -INFINITY);
            second = larger(second, smaller(first, value));
            first = larger(first, value);
        }
        float firsts[kLanes], seconds[kLanes];
        const float before = largest;
        first.store(firsts);
        second.store(seconds);
        for (int lane = 0; lane < kLanes; ++lane) {
            runner_up = std::max(std::max(runner_up, seconds[lane]), std::min(largest, firsts[lane]));
            largest = std::max(largest, firsts[lane]);
        }
        if (largest == -INFINITY) continue;  // nothing has a probability yet
        if (before == -INFINITY) {
            base = largest;
            // Any constant does; one token's keeps the terms small, so that little is lost when it is taken away again.
            anchor = std::max(logits[begin] - largest, floor) -
                     std::max(previous[begin] - previous_log_partition, floor);
        } else if (largest > before) {
            const float fall = before - largest, factor = std::exp(fall);
            below = (below + sum * fall) * factor;
            moved = moved * factor;
            sum = sum * factor;
        }
        const float shift = largest - base - anchor;
        for (int64_t i = begin; i < end; i += kLanes) {
            const Vector distance = larger(Vector::load(logits + i, end - i, -INFINITY) - largest, Vector::all(floor));
            const Vector log_before =
                larger(Vector::load(previous + i, end - i, 0.0f) - previous_log_partition, Vector::all(floor));
            const Vector weight = exponential(distance);
            sum += weight;
            below += weight * distance;
            moved += weight * (distance - log_before + shift);
        }
    }
    const float total = sum.sum(), log_total = std::log(total);
    statistics->log_partition = largest + log_total;
    statistics->entropy = log_total - below.sum() / total;
    statistics->divergence = moved.sum() / total + (anchor + base - largest - log_total);
    statistics->top1 = 1.0f / total;
    statistics->top2 = std::exp(std::max(runner_up - largest - log_total, floor));
}

// 1 / sum of e^(logit - largest): the same sum as above up to rounding, without all that is not needed for it.
template <class Vector>
FQ_INLINE float top_probability_body(const float* logits, int64_t size) {
    float largest = -INFINITY;
    Vector sum = Vector::all(0.0f);
    for (int64_t begin = 0; begin < size; begin += kDistributionBlock) {
        const int64_t end = std::min(begin + kDistributionBlock, size);
        Vector first = Vector::all(-INFINITY);
        for (int64_t i = begin; i < end; i += kLanes) first = larger(first, Vector::load(logits + i, end - i, -INFINITY));
        float lanes[kLanes];
        const float before = largest;
        first.store(lanes);
        for (float lane : lanes) largest = std::max(largest, lane);
        if (largest == -INFINITY) continue;  // nothing has a probability yet
        if (largest > before) sum = sum * std::exp(before - largest);
        for (int64_t i = begin; i < end; i += kLanes) {
            sum += exponential(Vector::load(logits + i, end - i, -INFINITY) - largest);
        }
    }
    return 1.0f / sum.sum();
}

template <class Vector>
FQ_INLINE void tanh_body(float* x, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes) {
        tangent(Vector::load(x + i, size - i, 0.0f)).store(x + i, size - i);
    }
}

// Signals may fuse products with sums, which takes a third off their time. What a pass computes may not: its bits are
// those of any other pass (-ffp-contract=off).
#if defined(__clang__)
#define FQ_FUSED
#else
#define FQ_FUSED __attribute__((optimize("fp-contract=fast")))
#endif

// The same table for each target; a body is inlined into a function that carries the attribute.
#define FQ_DECODER_MATH(name, part_bytes, target)                                                                      \
    namespace name {                                                                                                   \
    target void rms_norm(const float* x, const float* weight, float epsilon, int64_t size, float* y) {                 \
        rms_norm_body<Lanes<part_bytes>>(x, weight, epsilon, size, y);                                                 \
    }                                                                                                                  \
    target void rotate(float* head, const float* cosine, const float* sine, int64_t head_dim) {                        \
        rotate_body(head, cosine, sine, head_dim);                                                                     \
    }                                                                                                                  \
    target void attend(const float* queries, int64_t num_queries, int64_t head_dim, const float* cache,                \
                       int64_t length, float scale, float* scores, float* out) {                                       \
        attend_body<Lanes<part_bytes>>(queries, num_queries, head_dim, cache, length, scale, scores, out);             \
    }                                                                                                                  \
    target void swiglu(float* gate, const float* up, int64_t size) { swiglu_body<Lanes<part_bytes>>(gate, up, size); } \
    target void dense(const float* x, const float* weight, int64_t num_inputs, int64_t num_outputs, int64_t begin,     \
                      int64_t end, float* y) {                                                                         \
        dense_body<Lanes<part_bytes>>(x, weight, num_inputs, num_outputs, begin, end, y);                              \
    }                                                                                                                  \
    target void add(const float* x, int64_t size, float* y) { add_body(x, size, y); }                                  \
    target void observe(const float* before, const float* after, int64_t size, float* residual_update, float* crest) { \
        observe_body(before, after, size, residual_update, crest);                                                     \
    }                                                                                                                  \
    target FQ_FUSED void distribution(const float* logits, int64_t size, float floor, const float* previous,           \
                                      float previous_log_partition, DistributionStatistics* statistics) {              \
        distribution_body<Lanes<part_bytes>>(logits, size, floor, previous, previous_log_partition, statistics);       \
    }                                                                                                                  \
    target FQ_FUSED float top_probability(const float* logits, int64_t size) {                                         \
        return top_probability_body<Lanes<part_bytes>>(logits, size);                                                  \
    }                                                                                                                  \
    target void tanh(float* x, int64_t size) { tanh_body<Lanes<part_bytes>>(x, size); }                                \
    const DecoderMath table = {rms_norm, rotate,  attend,       swiglu,          dense,                                \
                               add,      observe, distribution, top_probability, tanh};                                \
    }

FQ_DECODER_MATH(portable, 16, )
#if FQ_X86
FQ_DECODER_MATH(avx2, 32, __attribute__((target("avx2,fma"))))
FQ_DECODER_MATH(avx512, 64, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))))
#endif

}  // namespace

const DecoderMath* decoder_math_of(int32_t isa) {
#if FQ_X86
    if (isa == kFqAvx512) return &avx512::table;
    if (isa == kFqAvx2) return &avx2::table;
#endif
    return isa == kFqPortable ? &portable::table : nullptr;
}

}  // namespace fq
