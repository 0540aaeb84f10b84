// What decoding and control do between matrix products, one table of functions for each instruction set.
#pragma once

#include <cstdint>

namespace fq {

struct DistributionStatistics {
    float log_partition;  // what taken from the logits makes them log-probabilities
    float entropy;     // nats
    float divergence;  // KL(new || previous), nats
    float top1, top2;  // the two largest probabilities
};

constexpr int64_t kCacheBlock = 16;  // positions of the cache that lie together: one vector of scores

struct DecoderMath {
    // y = x / rms(x) * weight
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t size, float* y);
    // Rotates the pairs (i, i + head_dim / 2) of one head in place.
    void (*rotate)(float* head, const float* cosine, const float* sine, int64_t head_dim);
    // Attention of the `num_queries` query heads that share one key-value head, over `length` positions.
    // queries, out: [num_queries, head_dim]; cache: blocks of kCacheBlock positions, each with keys [head_dim, 16] and
    // values [16, head_dim]; scores: room for length + 15 floats.
    void (*attend)(const float* queries, int64_t num_queries, int64_t head_dim, const float* cache, int64_t length,
                   float scale, float* scores, float* out);
    // gate = gate * sigmoid(gate) * up
    void (*swiglu)(float* gate, const float* up, int64_t size);
    // Outputs [begin, end) of y = W x, W by columns: weight[k * num_outputs + n].
    void (*dense)(const float* x, const float* weight, int64_t num_inputs, int64_t num_outputs, int64_t begin,
                  int64_t end, float* y);
    // y += x
    void (*add)(const float* x, int64_t size, float* y);
    // See residual_update and crest of fq_decode.
    void (*observe)(const float* before, const float* after, int64_t size, float* residual_update, float* crest);
    // What logits say of the next token, and how far its log-probabilities, none below `floor`, moved from those of the
    // previous logits.
    void (*distribution)(const float* logits, int64_t size, float floor, const float* previous,
                         float previous_log_partition, DistributionStatistics* statistics);
    // Probability of the likeliest token.
    float (*top_probability)(const float* logits, int64_t size);
    void (*tanh)(float* x, int64_t size);
};

// Null if this machine cannot run it.
const DecoderMath* decoder_math_of(int32_t isa);

}  // namespace fq
