// C ABI of the search for nested codes: the inner loops of engine/quantisation/gptq.py, which is the reference.
#pragma once

#include "bitplane_gemv.h"

namespace fq {

constexpr int64_t kMaxStoredWidths = 8;

}  // namespace fq

extern "C" {

// All arrays are stored by input and then by width, rows (outputs of the weight) adjacent.
//
// grids: [5, widths, rows]: scale, offset, values to steps (1 / scale, or 0), cost of a squared step, share in the wish.
// bit_widths: [widths], ascending, the last is 8. The search looks at `searched` cells of the second widest.
//
// Chooses the codes of one group from its first input to its last; the targets of later inputs make up for the errors.
// targets: [inputs, widths, rows], replaced by the errors over the diagonal of the factor. codes: [inputs, rows], result.
// factor: [inputs, inputs], upper triangular, `stride` floats from row to row.
FQ_EXPORT int32_t fq_feed_back(const float* grids, const int64_t* bit_widths, int64_t num_widths, int64_t searched,
                               float* targets, float* codes, const float* factor, int64_t stride, int64_t num_inputs,
                               int64_t num_rows, int32_t isa, int32_t num_threads);

// Chooses every code of one group once more, given all the others: a sweep of coordinate descent.
// weight: [inputs, rows]. errors: [inputs, widths, rows], weight less what the codes stand for, kept up to date.
// slopes: [inputs, widths, rows], hessian times the errors of all inputs. hessian: [inputs, inputs].
FQ_EXPORT int32_t fq_descend(const float* grids, const int64_t* bit_widths, int64_t num_widths, int64_t searched,
                             const float* weight, float* errors, float* slopes, float* codes, const float* hessian,
                             int64_t stride, int64_t num_inputs, int64_t num_rows, int32_t isa, int32_t num_threads);

}  // extern "C"
