// 16-lane vectors in the compiler's own terms, and the few functions of them that both decoding and control need. One
// text for every instruction set: always inlined into a function that carries the target attribute.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels_internal.h"

namespace fq {

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(64)));
typedef int32_t IntVector __attribute__((vector_size(64)));

FQ_INLINE Vector load(const float* address) {
    Vector vector;
    std::memcpy(&vector, address, sizeof vector);
    return vector;
}

FQ_INLINE void store(float* address, const Vector& vector) { std::memcpy(address, &vector, sizeof vector); }

FQ_INLINE float sum_lanes(const Vector& vector) {
    float lanes[kLanes];
    store(lanes, vector);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

FQ_INLINE float dot(const float* a, const float* b, int64_t size) {
    Vector sum = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) sum += load(a + i) * load(b + i);
    float total = sum_lanes(sum);
    for (; i < size; ++i) total += a[i] * b[i];
    return total;
}

// e^x to 2 units in the last place for x <= 0 (and up to 80); below -87 the result is the smallest normal float, not 0.
// Range reduction by the nearest integer multiple of ln 2, held in two parts, then a polynomial (Cephes expf).
FQ_INLINE void exponential(Vector* x) {
    Vector value = *x;
    value = value < -87.0f ? (Vector{} - 87.0f) : value;
    value = value > 80.0f ? (Vector{} + 80.0f) : value;
    const Vector shifted = value * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
    const Vector exponent = shifted - 12582912.0f;
    value = value - exponent * 0.693359375f;
    value = value + exponent * 2.12194440e-4f;
    Vector polynomial = value * 1.9875691500e-4f + 1.3981999507e-3f;
    polynomial = polynomial * value + 8.3334519073e-3f;
    polynomial = polynomial * value + 4.1665795894e-2f;
    polynomial = polynomial * value + 1.6666665459e-1f;
    polynomial = polynomial * value + 5.0000001201e-1f;
    polynomial = polynomial * value * value + value + 1.0f;
    IntVector bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4b400000 + 127) << 23;
    Vector power;
    std::memcpy(&power, &bits, sizeof power);
    *x = polynomial * power;
}

FQ_INLINE Vector larger(const Vector& a, const Vector& b) { return a > b ? a : b; }

FQ_INLINE Vector smaller(const Vector& a, const Vector& b) { return a < b ? a : b; }

// Hyperbolic tangent, to about 1e-7.
FQ_INLINE void tangent(Vector* x) {
    const Vector value = *x;
    const Vector magnitude = larger(value, -value);
    Vector decay = magnitude * -2.0f;
    exponential(&decay);
    const Vector result = (1.0f - decay) / (1.0f + decay);
    *x = value < 0.0f ? -result : result;
}

}  // namespace fq
