// Signals and policy of one sequence: from the output of a step to the bit-widths of the next.
#include "control.h"

#include <algorithm>
#include <cmath>

#include "decoder_math.h"
#include "kernels_internal.h"
#include "signal_constants.h"

namespace fq {
namespace {

int64_t num_global(const FqControl& control) { return kNumTokenSignals + control.num_embedding_dims; }
int64_t num_per_unit(const FqControl& control) { return 2 * control.num_widths + kNumStepSignals; }

void observe(FqControl* control, const DecoderMath& math, const float* logits, const float* residual_update,
             const float* crest, int64_t token_id, bool is_first) {
    DistributionStatistics statistics;
    math.distribution(logits, control->vocab_size, kLogProbabilityFloor, is_first ? logits : control->logits,
                      is_first ? 0.0f : control->log_partition, &statistics);
    control->logits = logits;
    control->log_partition = statistics.log_partition;
    control->entropy = statistics.entropy;
    control->top1 = statistics.top1;
    control->top2 = statistics.top2;
    if (is_first) {
        control->entropy_ema = statistics.entropy;
        control->step_kl = 0.0f;
    } else {
        control->entropy_ema = kEmaDecay * control->entropy_ema + (1.0f - kEmaDecay) * statistics.entropy;
        control->step_kl = std::max(statistics.divergence, 0.0f);
    }
    control->surprisal = -std::max(logits[token_id] - statistics.log_partition, kLogProbabilityFloor);
    std::copy_n(residual_update, control->num_units, control->residual_update);
    std::copy_n(crest, control->num_units, control->crest);
    control->token_id = token_id;
}

bool is_valid(const FqControl& control, int64_t token_id) { return token_id >= 0 && token_id < control.vocab_size; }

float clamped(float value) { return std::min(std::max(value, -kSignalLimit), kSignalLimit); }

}  // namespace
}  // namespace fq

using namespace fq;

extern "C" {

int32_t fq_control_reset(FqControl* control, const float* logits, const float* residual_update, const float* crest,
                         int64_t token_id, float kl_weight, int32_t isa) {
    if (!is_valid(*control, token_id)) return kFqBadArgument;
    const DecoderMath* math = fq_isa_supported(isa) ? decoder_math_of(isa) : nullptr;
    if (math == nullptr) return kFqUnsupportedIsa;
    const float top = static_cast<float>(control->bit_widths[control->num_widths - 1]);
    std::fill_n(control->recent_widths, kRecentTokens, top);
    std::fill_n(control->last_widths, control->num_units, top);
    control->position = 0;
    control->dial = std::log10(kl_weight);
    observe(control, *math, logits, residual_update, crest, token_id, true);
    return kFqOk;
}

int32_t fq_control_update(FqControl* control, const float* logits, const float* residual_update, const float* crest,
                          const int64_t* bit_widths, int64_t token_id, int32_t isa) {
    if (control->logits == nullptr || !is_valid(*control, token_id)) return kFqBadArgument;
    const DecoderMath* math = fq_isa_supported(isa) ? decoder_math_of(isa) : nullptr;
    if (math == nullptr) return kFqUnsupportedIsa;
    float mean_width = 0.0f;
    for (int64_t unit = 0; unit < control->num_units; ++unit) {
        control->last_widths[unit] = static_cast<float>(bit_widths[unit]);
        mean_width += control->weight_share[unit] * control->last_widths[unit];
    }
    control->recent_widths[control->position % kRecentTokens] = mean_width;
    ++control->position;
    observe(control, *math, logits, residual_update, crest, token_id, false);
    return kFqOk;
}

int32_t fq_control_signals(const FqControl* control, float* signals) {
    const FqControl& c = *control;
    float recent = 0.0f;
    for (int64_t i = 0; i < kRecentTokens; ++i) recent += c.recent_widths[i];
    const float row[kNumTokenSignals] = {
        c.entropy / kNatsScale,
        c.entropy_ema / kNatsScale,
        std::log1p(std::exp(c.entropy_ema)) / kNatsScale,
        c.top1,
        c.top1 - c.top2,
        c.surprisal / kNatsScale,
        std::log10(std::max(c.step_kl, kKlFloorNats)) / kDecadesScale,
        std::log10(kKlFloorNats) / kDecadesScale,  // no probe is taken at run time,
        1.0f,                                      // so the last one is as long ago as can be said
        recent / kRecentTokens / kWidthScale,
        std::log1p(static_cast<float>(std::min(c.position, c.horizon))) / kPositionScale,
        c.dial,
    };
    for (float value : row) *signals++ = clamped(value);
    const float* embedding = c.embedding + c.token_id * c.num_embedding_dims;
    for (int64_t i = 0; i < c.num_embedding_dims; ++i) *signals++ = clamped(embedding[i]);
    for (int64_t unit = 0; unit < c.num_units; ++unit) {
        const float* constants = c.unit_constants + unit * 2 * c.num_widths;
        for (int64_t i = 0; i < 2 * c.num_widths; ++i) *signals++ = clamped(constants[i]);
        *signals++ = clamped(std::log10(std::max(c.residual_update[unit], kStatisticFloor)));
        *signals++ = clamped(std::log10(std::max(c.crest[unit], kStatisticFloor)));
        *signals++ = c.last_widths[unit] / kWidthScale;
        *signals++ = c.depth[unit];
    }
    return kFqOk;
}

int32_t fq_control_choose(const FqControl* control, const float* signals, int64_t* bit_widths, int32_t isa) {
    if (control->net == nullptr) return kFqBadArgument;
    const FqPolicyNet& net = *control->net;
    const DecoderMath* math = fq_isa_supported(isa) ? decoder_math_of(isa) : nullptr;
    if (math == nullptr) return kFqUnsupportedIsa;
    const int64_t globals = num_global(*control), own = num_per_unit(*control), hidden = net.hidden;
    if (hidden > kMaxHidden || hidden % kHiddenAlignment != 0 || globals > kMaxInputs || own > kMaxInputs ||
        control->num_widths > kPaddedWidths) {
        return kFqBadArgument;
    }
    float inputs[kMaxInputs], context[kMaxHidden], shared[kMaxHidden], first[kMaxHidden], second[kMaxHidden];
    for (int64_t i = 0; i < globals; ++i) inputs[i] = (signals[i] - net.mean[i]) / net.deviation[i];
    math->dense(inputs, net.global_weight, globals, hidden, 0, hidden, context);
    math->add(net.global_bias, hidden, context);
    math->tanh(context, hidden);
    // What the first layer makes of the context is the same for every unit.
    math->dense(context, net.context_weight, hidden, hidden, 0, hidden, shared);
    math->add(net.first_bias, hidden, shared);
    for (int64_t unit = 0; unit < control->num_units; ++unit) {
        const float* unit_signals = signals + globals + unit * own;
        for (int64_t i = 0; i < own; ++i) {
            inputs[i] = (unit_signals[i] - net.mean[globals + i]) / net.deviation[globals + i];
        }
        math->dense(inputs, net.unit_weight, own, hidden, 0, hidden, first);
        math->add(shared, hidden, first);
        math->tanh(first, hidden);
        math->dense(first, net.second_weight, hidden, hidden, 0, hidden, second);
        math->add(net.second_bias, hidden, second);
        math->tanh(second, hidden);
        float scores[kPaddedWidths];
        math->dense(second, net.width_weight, hidden, kPaddedWidths, 0, kPaddedWidths, scores);
        math->add(net.width_bias, kPaddedWidths, scores);
        const float* best = std::max_element(scores, scores + control->num_widths);
        bit_widths[unit] = control->bit_widths[best - scores];
    }
    return kFqOk;
}

int32_t fq_top_probability(const float* logits, int64_t size, int32_t isa, float* probability) {
    const DecoderMath* math = fq_isa_supported(isa) ? decoder_math_of(isa) : nullptr;
    if (math == nullptr) return kFqUnsupportedIsa;
    *probability = math->top_probability(logits, size);
    return kFqOk;
}

int32_t fq_control_decide(const FqControl* control, int64_t* bit_widths, int32_t isa) {
    fq_control_signals(control, control->signals);
    return fq_control_choose(control, control->signals, bit_widths, isa);
}

}  // extern "C"
