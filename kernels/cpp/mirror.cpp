// What Python repeats of this library, as names and numbers: constants, codes, and size and place of every field of the
// structs that it fills in. kernels/native_structs.py compares them with its own when it loads the library.
#include <cstddef>
#include <type_traits>

#include "control.h"
#include "decoder.h"
#include "decoder_math.h"
#include "kernels_internal.h"
#include "signal_constants.h"

namespace fq {
namespace {

struct Mirrored {
    const char* name;
    double value;
};

// Two fields of four bytes may change places unseen by sizes and offsets.
enum Kind { kInteger = 0, kFloat = 1, kPointer = 2, kStruct = 3 };

template <class Field>
constexpr Kind kind_of() {
    if (std::is_pointer<Field>::value) return kPointer;
    if (std::is_class<Field>::value) return kStruct;
    return std::is_floating_point<Field>::value ? kFloat : kInteger;
}

#define FQ_CONSTANT(name) {#name, name}
#define FQ_STRUCT(type) {#type " size", sizeof(type)}
#define FQ_FIELD(type, field)                              \
    {#type "." #field " offset", offsetof(type, field)},   \
        {#type "." #field " size", sizeof(type::field)},   \
        {#type "." #field " kind", kind_of<decltype(type::field)>()}

constexpr Mirrored kMirrored[] = {
    FQ_CONSTANT(kAbiVersion),
    FQ_CONSTANT(kMaxTokens),
    FQ_CONSTANT(kNumPlanes),
    FQ_CONSTANT(kInputAlignment),
    FQ_CONSTANT(kCacheBlock),
    FQ_CONSTANT(kWorkspaceAlignment),
    FQ_CONSTANT(kPaddedWidths),
    FQ_CONSTANT(kHiddenAlignment),
    FQ_CONSTANT(kMaxHidden),
    FQ_CONSTANT(kMaxInputs),
    FQ_CONSTANT(kFqPortable),
    FQ_CONSTANT(kFqAvx2),
    FQ_CONSTANT(kFqAvx512),
    FQ_CONSTANT(kFqInt8),
    FQ_CONSTANT(kFqFloat32),
    FQ_CONSTANT(kFqOk),
    FQ_CONSTANT(kFqBadArgument),
    FQ_CONSTANT(kFqUnsupportedIsa),
    FQ_CONSTANT(kFqOutOfMemory),

    FQ_CONSTANT(kSignalSchemaVersion),
    FQ_CONSTANT(kRecentTokens),
    FQ_CONSTANT(kNumTokenSignals),
    FQ_CONSTANT(kNumStepSignals),
    FQ_CONSTANT(kEmaDecay),
    FQ_CONSTANT(kLogProbabilityFloor),
    FQ_CONSTANT(kKlFloorNats),
    FQ_CONSTANT(kStatisticFloor),
    FQ_CONSTANT(kNormFloor),
    FQ_CONSTANT(kSignalLimit),
    FQ_CONSTANT(kNatsScale),
    FQ_CONSTANT(kDecadesScale),
    FQ_CONSTANT(kWidthScale),
    FQ_CONSTANT(kPositionScale),

    FQ_STRUCT(FqWeight),
    FQ_FIELD(FqWeight, planes),
    FQ_FIELD(FqWeight, scale),
    FQ_FIELD(FqWeight, offset),
    FQ_FIELD(FqWeight, plane_stride),
    FQ_FIELD(FqWeight, num_outputs),
    FQ_FIELD(FqWeight, num_inputs),
    FQ_FIELD(FqWeight, num_words),
    FQ_FIELD(FqWeight, group_size),
    FQ_FIELD(FqWeight, bit_width),
    FQ_FIELD(FqWeight, scale_factor),
    FQ_FIELD(FqWeight, offset_factor),

    FQ_STRUCT(FqLinear),
    FQ_FIELD(FqLinear, widths),
    FQ_FIELD(FqLinear, dense),
    FQ_FIELD(FqLinear, bias),
    FQ_FIELD(FqLinear, num_outputs),
    FQ_FIELD(FqLinear, num_inputs),

    FQ_STRUCT(FqLayer),
    FQ_FIELD(FqLayer, query),
    FQ_FIELD(FqLayer, key),
    FQ_FIELD(FqLayer, value),
    FQ_FIELD(FqLayer, output),
    FQ_FIELD(FqLayer, gate),
    FQ_FIELD(FqLayer, up),
    FQ_FIELD(FqLayer, down),
    FQ_FIELD(FqLayer, attention_norm),
    FQ_FIELD(FqLayer, mlp_norm),
    FQ_FIELD(FqLayer, query_norm),
    FQ_FIELD(FqLayer, key_norm),
    FQ_FIELD(FqLayer, attention_unit),
    FQ_FIELD(FqLayer, mlp_unit),

    FQ_STRUCT(FqDecoder),
    FQ_FIELD(FqDecoder, layers),
    FQ_FIELD(FqDecoder, embedding),
    FQ_FIELD(FqDecoder, final_norm),
    FQ_FIELD(FqDecoder, cosine),
    FQ_FIELD(FqDecoder, sine),
    FQ_FIELD(FqDecoder, head),
    FQ_FIELD(FqDecoder, num_layers),
    FQ_FIELD(FqDecoder, vocab_size),
    FQ_FIELD(FqDecoder, hidden_size),
    FQ_FIELD(FqDecoder, num_heads),
    FQ_FIELD(FqDecoder, num_key_value_heads),
    FQ_FIELD(FqDecoder, head_dim),
    FQ_FIELD(FqDecoder, max_length),
    FQ_FIELD(FqDecoder, cache_length),
    FQ_FIELD(FqDecoder, num_units),
    FQ_FIELD(FqDecoder, head_unit),
    FQ_FIELD(FqDecoder, group_size),
    FQ_FIELD(FqDecoder, norm_epsilon),
    FQ_FIELD(FqDecoder, attention_scale),

    FQ_STRUCT(FqPolicyNet),
    FQ_FIELD(FqPolicyNet, mean),
    FQ_FIELD(FqPolicyNet, deviation),
    FQ_FIELD(FqPolicyNet, global_weight),
    FQ_FIELD(FqPolicyNet, global_bias),
    FQ_FIELD(FqPolicyNet, context_weight),
    FQ_FIELD(FqPolicyNet, unit_weight),
    FQ_FIELD(FqPolicyNet, first_bias),
    FQ_FIELD(FqPolicyNet, second_weight),
    FQ_FIELD(FqPolicyNet, second_bias),
    FQ_FIELD(FqPolicyNet, width_weight),
    FQ_FIELD(FqPolicyNet, width_bias),
    FQ_FIELD(FqPolicyNet, hidden),

    FQ_STRUCT(FqControl),
    FQ_FIELD(FqControl, net),
    FQ_FIELD(FqControl, bit_widths),
    FQ_FIELD(FqControl, embedding),
    FQ_FIELD(FqControl, unit_constants),
    FQ_FIELD(FqControl, depth),
    FQ_FIELD(FqControl, weight_share),
    FQ_FIELD(FqControl, vocab_size),
    FQ_FIELD(FqControl, num_units),
    FQ_FIELD(FqControl, num_widths),
    FQ_FIELD(FqControl, num_embedding_dims),
    FQ_FIELD(FqControl, horizon),
    FQ_FIELD(FqControl, signals),
    FQ_FIELD(FqControl, logits),
    FQ_FIELD(FqControl, recent_widths),
    FQ_FIELD(FqControl, residual_update),
    FQ_FIELD(FqControl, crest),
    FQ_FIELD(FqControl, last_widths),
    FQ_FIELD(FqControl, entropy),
    FQ_FIELD(FqControl, entropy_ema),
    FQ_FIELD(FqControl, top1),
    FQ_FIELD(FqControl, top2),
    FQ_FIELD(FqControl, surprisal),
    FQ_FIELD(FqControl, step_kl),
    FQ_FIELD(FqControl, dial),
    FQ_FIELD(FqControl, log_partition),
    FQ_FIELD(FqControl, position),
    FQ_FIELD(FqControl, token_id),
};

constexpr int32_t kCount = sizeof(kMirrored) / sizeof(kMirrored[0]);

}  // namespace
}  // namespace fq

extern "C" {

const char* fq_mirror_name(int32_t index) {
    return index >= 0 && index < fq::kCount ? fq::kMirrored[index].name : nullptr;
}

double fq_mirror_value(int32_t index) { return index >= 0 && index < fq::kCount ? fq::kMirrored[index].value : 0.0; }

}  // extern "C"
