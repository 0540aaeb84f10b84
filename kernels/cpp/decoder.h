// C ABI of the decode step: one call reads one to sixteen tokens of one sequence through a whole Llama-family model.
//
// Every pointer is borrowed from the caller, matrices are float32 and row-major, and nothing is allocated: what a call
// needs beyond its arguments lies in `workspace`.
#pragma once

#include "bitplane_gemv.h"

namespace fq {

constexpr int64_t kWorkspaceAlignment = 64;

}  // namespace fq

extern "C" {

// y = W x + bias. Bit-width 0 stands for the unquantised matrix.
struct FqLinear {
    const FqWeight* widths;  // [9]: the weight at each width; planes are null at a width that may not be read
    const float* dense;      // [num_inputs, num_outputs], the unquantised matrix by columns, or null
    const float* bias;       // [num_outputs] or null
    int64_t num_outputs;
    int64_t num_inputs;
};

struct FqLayer {
    FqLinear query, key, value, output, gate, up, down;
    const float* attention_norm;  // [hidden_size]
    const float* mlp_norm;        // [hidden_size]
    const float* query_norm;      // [head_dim] or null: RMS norm of each head before the rotation
    const float* key_norm;        // [head_dim] or null
    int32_t attention_unit;       // index into `bit_widths`
    int32_t mlp_unit;
};

struct FqDecoder {
    const FqLayer* layers;
    const float* embedding;   // [vocab_size, hidden_size]
    const float* final_norm;  // [hidden_size]
    const float* cosine;      // [max_length, head_dim / 2]
    const float* sine;        // [max_length, head_dim / 2]
    FqLinear head;
    int64_t num_layers, vocab_size, hidden_size, num_heads, num_key_value_heads, head_dim;
    int64_t max_length;    // positions that may be used
    int64_t cache_length;  // positions in the layout of the cache: max_length rounded up to a multiple of 16
    int64_t num_units;
    int32_t head_unit;  // -1: the head is read at width 0
    int32_t group_size;
    float norm_epsilon;
    float attention_scale;
};

FQ_EXPORT int64_t fq_decoder_workspace_bytes(const FqDecoder* decoder, int32_t mode);

// Appends `num_tokens` tokens at `position` to the cache and computes logits and statistics of the last `num_logits` of
// them. Bit for bit the same for any num_threads, and for the same tokens in several calls.
//   cache            [num_layers, num_key_value_heads, cache_length / 16, 2, 16 * head_dim]: the keys of 16 positions,
//                    [head_dim, 16], then their values, [16, head_dim], so that one head is one run of memory
//   bit_widths       [num_units]
//   workspace        fq_decoder_workspace_bytes() bytes aligned to 64
//   logits           [num_logits, vocab_size]
//   residual_update  [num_logits, num_units] |layer output - layer input| / |layer input| of the unit's layer; 0: head
//   crest            [num_logits, num_units] largest magnitude over root mean square of that layer's input; 0: head
FQ_EXPORT int32_t fq_decode(const FqDecoder* decoder, float* cache, const int64_t* token_ids, int64_t num_tokens,
                            int64_t position, const int64_t* bit_widths, int32_t mode, int32_t isa, int32_t num_threads,
                            void* workspace, float* logits, int64_t num_logits, float* residual_update, float* crest);

}  // extern "C"
