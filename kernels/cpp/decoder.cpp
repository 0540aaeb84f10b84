// The walk through the layers. Each step is a stage that all threads finish before the next begins; within a stage rows
// are independent, so the result does not depend on how they are shared out.
#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "decoder_math.h"
#include "kernels_internal.h"
#include "thread_pool.h"

namespace fq {
namespace {

constexpr int kMaxProducts = 3;

int64_t largest_input(const FqDecoder& model) {
    int64_t largest = std::max(model.hidden_size, model.num_heads * model.head_dim);
    for (int64_t i = 0; i < model.num_layers; ++i) largest = std::max(largest, model.layers[i].down.num_inputs);
    return largest;
}

int64_t num_words(int64_t num_inputs) { return round_up(num_inputs, kInputAlignment) / 32; }

// Where the intermediate results of a call lie; every part begins at a multiple of kWorkspaceAlignment bytes.
struct Workspace {
    float *hidden, *normed, *before, *queries, *mixed, *gate, *up, *projected, *scores;
    void* prepared;
    int64_t num_bytes;
};

Workspace lay_out(const FqDecoder& model, int32_t mode, void* base) {
    const int64_t width = largest_input(model);
    const int64_t attention = model.num_heads * model.head_dim;
    Workspace space{};
    char* next = static_cast<char*>(base);
    const auto take = [&](int64_t num_floats) {
        char* begin = next;
        next += round_up(num_floats * 4, kWorkspaceAlignment);
        return reinterpret_cast<float*>(begin);
    };
    space.hidden = take(kMaxTokens * model.hidden_size);
    space.normed = take(kMaxTokens * model.hidden_size);
    space.before = take(kMaxTokens * model.hidden_size);
    space.queries = take(kMaxTokens * attention);
    space.mixed = take(kMaxTokens * attention);
    space.gate = take(kMaxTokens * width);
    space.up = take(kMaxTokens * width);
    space.projected = take(kMaxTokens * model.hidden_size);
    // One row of scores for each key-value head, which may be attended to by different threads.
    space.scores = take(model.num_key_value_heads * model.cache_length);
    space.prepared = take(fq_activation_bytes(num_words(width), kMaxTokens, mode) / 4);
    space.num_bytes = next - static_cast<char*>(base);
    return space;
}

// Products of the same activations: q, k and v, or gate and up, share one preparation and one round of the pool.
struct Stage {
    const FqLinear* linears[kMaxProducts];
    float* results[kMaxProducts];
    int64_t strides[kMaxProducts];  // floats from one token's result to the next
    int64_t rows_per_chunk[kMaxProducts];
    int64_t num_chunks[kMaxProducts];
    int count;
    int32_t bit_width;
    const float* raw;  // [tokens, num_inputs]
    Activations x;
    const Body* body;
    const DecoderMath* math;
    int32_t mode;
};

void run_rows(const Stage& stage, int product, int64_t begin, int64_t end) {
    const FqLinear& linear = *stage.linears[product];
    float* y = stage.results[product];
    const int64_t stride = stage.strides[product];
    if (stage.bit_width == 0) {
        for (int64_t m = 0; m < stage.x.tokens; ++m) {
            stage.math->dense(stage.raw + m * linear.num_inputs, linear.dense, linear.num_inputs, linear.num_outputs,
                              begin, end, y + m * stride);
        }
    } else {
        stage.body->rows[stage.mode][stage.bit_width](linear.widths[stage.bit_width], stage.x, begin, end, y, stride);
    }
    if (linear.bias == nullptr) return;
    for (int64_t m = 0; m < stage.x.tokens; ++m) {
        stage.math->add(linear.bias + begin, end - begin, y + m * stride + begin);
    }
}

void run_stage_chunk(void* context, uint32_t chunk) {
    const Stage& stage = *static_cast<const Stage*>(context);
    int product = 0;
    int64_t index = chunk;
    while (index >= stage.num_chunks[product]) index -= stage.num_chunks[product++];
    const int64_t begin = index * stage.rows_per_chunk[product];
    const int64_t end = std::min(begin + stage.rows_per_chunk[product], stage.linears[product]->num_outputs);
    run_rows(stage, product, begin, end);
}

struct AttentionTask {
    const DecoderMath* math;
    const FqDecoder* model;
    const float *queries, *cache;
    float *mixed, *scores;
    int64_t num_tokens, position;
};

// One key-value head, all tokens and all the query heads that share it.
void run_attention_head(void* context, uint32_t head) {
    const AttentionTask& task = *static_cast<const AttentionTask*>(context);
    const FqDecoder& model = *task.model;
    const int64_t group = model.num_heads / model.num_key_value_heads;
    const int64_t stride = model.num_heads * model.head_dim;
    const float* cache = task.cache + head * model.cache_length * 2 * model.head_dim;
    float* scores = task.scores + head * model.cache_length;
    for (int64_t m = 0; m < task.num_tokens; ++m) {
        const int64_t first = m * stride + head * group * model.head_dim;
        task.math->attend(task.queries + first, group, model.head_dim, cache, task.position + m + 1,
                          model.attention_scale, scores, task.mixed + first);
    }
}

// One call of fq_decode.
class Step {
  public:
    Step(const FqDecoder& model, const Workspace& space, const Body& body, const DecoderMath& math, int64_t num_tokens,
         int64_t position, int32_t mode, int num_threads)
        : model_(model), space_(space), body_(body), math_(math), num_tokens_(num_tokens), position_(position),
          mode_(mode), num_threads_(num_threads) {}

    void embed(const int64_t* token_ids) {
        for (int64_t m = 0; m < num_tokens_; ++m) {
            std::memcpy(space_.hidden + m * model_.hidden_size, model_.embedding + token_ids[m] * model_.hidden_size,
                        static_cast<size_t>(model_.hidden_size) * 4);
        }
    }

    // residual_update, crest: [num_observed, num_units], of the last tokens.
    void run_layer(const FqLayer& layer, float* cache, const int64_t* bit_widths, int64_t num_observed,
                   float* residual_update, float* crest) {
        const int64_t size = model_.hidden_size;
        const float* after = space_.hidden + (num_tokens_ - num_observed) * size;
        std::memcpy(space_.before, after, static_cast<size_t>(num_observed * size) * 4);
        attention(layer, cache, static_cast<int32_t>(bit_widths[layer.attention_unit]));
        mlp(layer, static_cast<int32_t>(bit_widths[layer.mlp_unit]));
        const int32_t first = layer.attention_unit, second = layer.mlp_unit;
        for (int64_t i = 0; i < num_observed; ++i) {
            float* update_of_unit = residual_update + i * model_.num_units;
            float* crest_of_unit = crest + i * model_.num_units;
            math_.observe(space_.before + i * size, after + i * size, size, update_of_unit + first,
                          crest_of_unit + first);
            update_of_unit[second] = update_of_unit[first];
            crest_of_unit[second] = crest_of_unit[first];
        }
    }

    void head(int64_t num_logits, int32_t bit_width, float* logits) {
        const int64_t first = num_tokens_ - num_logits;
        norm(model_.final_norm, first);
        multiply(space_.normed + first * model_.hidden_size, num_logits, bit_width, {{&model_.head}},
                 {{logits}}, {{model_.vocab_size}}, 1);
    }

  private:
    void attention(const FqLayer& layer, float* cache, int32_t bit_width) {
        const int64_t head_dim = model_.head_dim;
        const int64_t cached_width = model_.num_key_value_heads * head_dim;
        norm(layer.attention_norm, 0);
        // Keys and values land in rows of one token; the cache holds blocks of one head.
        float *new_keys = space_.gate, *new_values = space_.up;
        multiply(space_.normed, num_tokens_, bit_width, {{&layer.query, &layer.key, &layer.value}},
                 {{space_.queries, new_keys, new_values}},
                 {{model_.num_heads * head_dim, cached_width, cached_width}}, 3);
        for (int64_t m = 0; m < num_tokens_; ++m) {
            rotate_heads(space_.queries + m * model_.num_heads * head_dim, model_.num_heads, layer.query_norm, m);
            rotate_heads(new_keys + m * cached_width, model_.num_key_value_heads, layer.key_norm, m);
            for (int64_t head = 0; head < model_.num_key_value_heads; ++head) {
                const int64_t source = m * cached_width + head * head_dim;
                const int64_t position = head * model_.cache_length + position_ + m, place = position % kCacheBlock;
                float* keys = cache + (position - place) * 2 * head_dim;
                float* values = keys + kCacheBlock * head_dim;
                for (int64_t d = 0; d < head_dim; ++d) keys[d * kCacheBlock + place] = new_keys[source + d];
                std::memcpy(values + place * head_dim, new_values + source, static_cast<size_t>(head_dim) * 4);
            }
        }
        AttentionTask task{&math_,       &model_,       space_.queries, cache,
                           space_.mixed, space_.scores, num_tokens_,    position_};
        const int64_t bytes = 8 * (position_ + num_tokens_) * cached_width * num_tokens_;
        parallel_for(threads_for(bytes, num_threads_), static_cast<uint32_t>(model_.num_key_value_heads),
                     run_attention_head, &task);
        project(layer.output, space_.mixed, bit_width);
    }

    void mlp(const FqLayer& layer, int32_t bit_width) {
        norm(layer.mlp_norm, 0);
        const int64_t size = layer.gate.num_outputs;
        multiply(space_.normed, num_tokens_, bit_width, {{&layer.gate, &layer.up}}, {{space_.gate, space_.up}},
                 {{size, size}}, 2);
        math_.swiglu(space_.gate, space_.up, num_tokens_ * size);
        project(layer.down, space_.gate, bit_width);
    }

    // Adds W x to the residual stream.
    void project(const FqLinear& linear, const float* x, int32_t bit_width) {
        multiply(x, num_tokens_, bit_width, {{&linear}}, {{space_.projected}}, {{model_.hidden_size}}, 1);
        math_.add(space_.projected, num_tokens_ * model_.hidden_size, space_.hidden);
    }

    void norm(const float* weight, int64_t first) {
        for (int64_t m = first; m < num_tokens_; ++m) {
            math_.rms_norm(space_.hidden + m * model_.hidden_size, weight, model_.norm_epsilon, model_.hidden_size,
                           space_.normed + m * model_.hidden_size);
        }
    }

    void rotate_heads(float* heads, int64_t num_heads, const float* weight, int64_t token) {
        const int64_t half = model_.head_dim / 2;
        for (int64_t head = 0; head < num_heads; ++head) {
            float* values = heads + head * model_.head_dim;
            if (weight != nullptr) {
                math_.rms_norm(values, weight, model_.norm_epsilon, model_.head_dim, values);
            }
            math_.rotate(values, model_.cosine + (position_ + token) * half, model_.sine + (position_ + token) * half,
                         model_.head_dim);
        }
    }

    struct Linears { const FqLinear* items[kMaxProducts]; };
    struct Results { float* items[kMaxProducts]; };
    struct Strides { int64_t items[kMaxProducts]; };

    void multiply(const float* x, int64_t num_tokens, int32_t bit_width, const Linears& linears, const Results& results,
                  const Strides& strides, int count) {
        const int64_t num_inputs = linears.items[0]->num_inputs;
        Stage stage{};
        stage.count = count;
        stage.bit_width = bit_width;
        stage.raw = x;
        stage.body = &body_;
        stage.math = &math_;
        stage.mode = mode_;
        stage.x.tokens = num_tokens;
        if (bit_width != 0) {
            const int64_t words = num_words(num_inputs);
            body_.prepare[mode_](x, num_inputs, num_tokens, num_inputs, words, model_.group_size, space_.prepared);
            stage.x = view_activations(space_.prepared, words, num_tokens, mode_);
        }
        int64_t total_chunks = 0, total_bytes = 0;
        for (int i = 0; i < count; ++i) {
            const FqLinear& linear = *linears.items[i];
            const int64_t row_bytes = bit_width == 0 ? num_inputs * 4 : num_words(num_inputs) * 4 * bit_width;
            stage.linears[i] = &linear;
            stage.results[i] = results.items[i];
            stage.strides[i] = strides.items[i];
            total_bytes += row_bytes * linear.num_outputs * num_tokens;
            stage.rows_per_chunk[i] = rows_per_chunk(linear.num_outputs, row_bytes, num_threads_);
            stage.num_chunks[i] = (linear.num_outputs + stage.rows_per_chunk[i] - 1) / stage.rows_per_chunk[i];
            total_chunks += stage.num_chunks[i];
        }
        const int threads = threads_for(total_bytes, num_threads_);
        stage.x.fetches_far = gains_from_far(num_tokens, threads);
        if (threads == 1) {
            for (int i = 0; i < count; ++i) run_rows(stage, i, 0, linears.items[i]->num_outputs);
        } else {
            parallel_for(threads, static_cast<uint32_t>(total_chunks), run_stage_chunk, &stage);
        }
    }

    const FqDecoder& model_;
    const Workspace& space_;
    const Body& body_;
    const DecoderMath& math_;
    const int64_t num_tokens_, position_;
    const int32_t mode_;
    const int num_threads_;
};

bool is_readable(const FqLinear& linear, int64_t bit_width) {
    if (bit_width == 0) return linear.dense != nullptr;
    return bit_width >= 1 && bit_width <= kNumPlanes && linear.widths != nullptr &&
           linear.widths[bit_width].planes != nullptr;
}

// Whether every linear holds the width that its unit asks for.
bool are_widths_readable(const FqDecoder& model, const int64_t* bit_widths) {
    for (int64_t i = 0; i < model.num_layers; ++i) {
        const FqLayer& layer = model.layers[i];
        if (layer.attention_unit < 0 || layer.attention_unit >= model.num_units || layer.mlp_unit < 0 ||
            layer.mlp_unit >= model.num_units) {
            return false;
        }
        const int64_t attention = bit_widths[layer.attention_unit], mlp = bit_widths[layer.mlp_unit];
        for (const FqLinear* linear : {&layer.query, &layer.key, &layer.value, &layer.output}) {
            if (!is_readable(*linear, attention)) return false;
        }
        for (const FqLinear* linear : {&layer.gate, &layer.up, &layer.down}) {
            if (!is_readable(*linear, mlp)) return false;
        }
    }
    if (model.head_unit >= model.num_units) return false;
    return is_readable(model.head, model.head_unit < 0 ? 0 : bit_widths[model.head_unit]);
}

}  // namespace
}  // namespace fq

using namespace fq;

extern "C" {

int64_t fq_decoder_workspace_bytes(const FqDecoder* decoder, int32_t mode) {
    return decoder == nullptr ? 0 : lay_out(*decoder, mode, nullptr).num_bytes;
}

int32_t fq_decode(const FqDecoder* decoder, float* cache, const int64_t* token_ids, int64_t num_tokens, int64_t position,
                  const int64_t* bit_widths, int32_t mode, int32_t isa, int32_t num_threads, void* workspace,
                  float* logits, int64_t num_logits, float* residual_update, float* crest) {
    if (decoder == nullptr || cache == nullptr || token_ids == nullptr || bit_widths == nullptr ||
        workspace == nullptr || logits == nullptr || residual_update == nullptr || crest == nullptr ||
        (mode != kFqInt8 && mode != kFqFloat32) || num_threads < 1 || decoder->cache_length % kCacheBlock != 0 ||
        decoder->cache_length < decoder->max_length || num_tokens < 1 || num_tokens > kMaxTokens || position < 0 ||
        position + num_tokens > decoder->max_length || num_logits < 1 || num_logits > num_tokens ||
        !are_widths_readable(*decoder, bit_widths)) {
        return kFqBadArgument;
    }
    for (int64_t m = 0; m < num_tokens; ++m) {
        if (token_ids[m] < 0 || token_ids[m] >= decoder->vocab_size) return kFqBadArgument;
    }
    const Body* body = body_of(isa);
    const DecoderMath* math = decoder_math_of(isa);
    if (body == nullptr || math == nullptr) return kFqUnsupportedIsa;
    const Workspace space = lay_out(*decoder, mode, workspace);
    std::fill_n(residual_update, num_logits * decoder->num_units, 0.0f);
    std::fill_n(crest, num_logits * decoder->num_units, 0.0f);
    Step step(*decoder, space, *body, *math, num_tokens, position, mode, num_threads);
    step.embed(token_ids);
    const int64_t layer_size = decoder->num_key_value_heads * decoder->cache_length * 2 * decoder->head_dim;
    for (int64_t i = 0; i < decoder->num_layers; ++i) {
        step.run_layer(decoder->layers[i], cache + i * layer_size, bit_widths, num_logits, residual_update, crest);
    }
    step.head(num_logits, static_cast<int32_t>(decoder->head_unit < 0 ? 0 : bit_widths[decoder->head_unit]), logits);
    return kFqOk;
}

}  // extern "C"
