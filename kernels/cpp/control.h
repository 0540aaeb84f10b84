// C ABI of run-time control: from the output of a step to the bit-widths of the next, for one sequence.
//
// The signals are those of engine/control/signals.py and the network that of engine/control/policy.py, both of which are the reference;
// torch's overhead on vectors this small would cost more than a decode step of a small model.
#pragma once

#include "bitplane_gemv.h"

namespace fq {

// Limits of the policy network.
constexpr int64_t kPaddedWidths = 16;     // scores of a unit, those beyond its widths included
constexpr int64_t kHiddenAlignment = 16;  // hidden units are a multiple of it
constexpr int64_t kMaxHidden = 256;
constexpr int64_t kMaxInputs = 64;  // signals of the token, and signals of a unit

}  // namespace fq

extern "C" {

// Matrices by inputs: weight[input][output].
struct FqPolicyNet {
    const float* mean;  // [num_global + num_per_unit]
    const float* deviation;
    const float *global_weight, *global_bias;    // [num_global, hidden], [hidden]
    const float *context_weight, *unit_weight;   // the first layer in two: [hidden, hidden], [num_per_unit, hidden]
    const float* first_bias;                     // [hidden]
    const float *second_weight, *second_bias;    // [hidden, hidden], [hidden]
    const float *width_weight, *width_bias;      // [hidden, 16], [16], padded with zeros
    int64_t hidden;                              // a multiple of 16, at most 256
};

struct FqControl {
    const FqPolicyNet* net;         // null: signals alone
    const int64_t* bit_widths;      // [num_widths], ascending
    const float* embedding;         // [vocab_size, num_embedding_dims], projected
    const float* unit_constants;    // [num_units, 2 * num_widths]: log sensitivities, times saved
    const float* depth;             // [num_units]
    const float* weight_share;      // [num_units], share of all weights
    int64_t vocab_size, num_units, num_widths, num_embedding_dims;
    int64_t horizon;                // from this position on its signal stays the same
    float* signals;                 // scratch of fq_control_decide
    // State of the sequence: these arrays and, with everything behind it, `entropy`. The logits are the caller's, who
    // keeps them and writes to them no more.
    const float* logits;            // [vocab_size]
    float* recent_widths;           // [16]
    float *residual_update, *crest, *last_widths;  // [num_units]
    float entropy, entropy_ema, top1, top2, surprisal, step_kl, dial, log_partition;
    int64_t position, token_id;
};

// Starts a sequence after its prompt: logits [vocab_size], statistics [num_units]. `token_id` is what the first step
// will read.
FQ_EXPORT int32_t fq_control_reset(FqControl* control, const float* logits, const float* residual_update,
                                   const float* crest, int64_t token_id, float kl_weight, int32_t isa);

// Moves on by a step that ran at `bit_widths` [num_units].
FQ_EXPORT int32_t fq_control_update(FqControl* control, const float* logits, const float* residual_update,
                                    const float* crest, const int64_t* bit_widths, int64_t token_id, int32_t isa);

// Writes the signals, [num_global + num_units * num_per_unit].
FQ_EXPORT int32_t fq_control_signals(const FqControl* control, float* signals);

// The network's choice of widths, [num_units], given signals.
FQ_EXPORT int32_t fq_control_choose(const FqControl* control, const float* signals, int64_t* bit_widths, int32_t isa);

// Probability of the likeliest token, of logits [size].
FQ_EXPORT int32_t fq_top_probability(const float* logits, int64_t size, int32_t isa, float* probability);

// Signals and the network's choice in one call.
FQ_EXPORT int32_t fq_control_decide(const FqControl* control, int64_t* bit_widths, int32_t isa);

}  // extern "C"
