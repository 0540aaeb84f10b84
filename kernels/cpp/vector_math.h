// Vectors of 16 floats and the few functions of them that decoding and control need. One text for every instruction set:
// always inlined into a function that carries the target attribute.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels_internal.h"

namespace fq {

constexpr int kLanes = 16;

// 16 lanes in the target's own vectors: one of 64 bytes, two of 32 or four of 16. Comparisons of vectors that are wider
// than the target's would be taken apart lane by lane.
template <int kPartBytes>
struct Lanes {
    typedef float Part __attribute__((vector_size(kPartBytes)));
    typedef int32_t IntPart __attribute__((vector_size(kPartBytes)));
    static constexpr int kParts = kLanes * 4 / kPartBytes;
    static constexpr int kPartLanes = kPartBytes / 4;

    Part parts[kParts];

    static FQ_INLINE Lanes all(float value) {
        Lanes result;
        for (Part& part : result.parts) part = Part{} + value;
        return result;
    }
    static FQ_INLINE Lanes load(const float* address) {
        Lanes result;
        // Part by part: copied whole, a struct stays in memory.
        for (int i = 0; i < kParts; ++i) std::memcpy(&result.parts[i], address + i * kPartLanes, kPartBytes);
        return result;
    }
    // A vector of which only `count` lanes may lie in memory; the others are `fill`.
    static FQ_INLINE Lanes load(const float* address, int64_t count, float fill) {
        if (count >= kLanes) return load(address);
        float lanes[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane < count ? address[lane] : fill;
        return load(lanes);
    }
    FQ_INLINE void store(float* address) const {
        for (int i = 0; i < kParts; ++i) std::memcpy(address + i * kPartLanes, &parts[i], kPartBytes);
    }
    FQ_INLINE void store(float* address, int64_t count) const {
        if (count >= kLanes) return store(address);
        float lanes[kLanes];
        store(lanes);
        std::memcpy(address, lanes, static_cast<size_t>(count) * 4);
    }

    FQ_INLINE float sum() const {
        float lanes[kLanes];
        store(lanes);
        for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
        }
        return lanes[0];
    }

#define FQ_LANES_OPERATOR(op)                                                            \
    friend FQ_INLINE Lanes operator op(const Lanes& a, const Lanes& b) {                 \
        Lanes result;                                                                    \
        for (int i = 0; i < kParts; ++i) result.parts[i] = a.parts[i] op b.parts[i];     \
        return result;                                                                   \
    }                                                                                    \
    friend FQ_INLINE Lanes operator op(const Lanes& a, float b) { return a op all(b); }  \
    friend FQ_INLINE Lanes operator op(float a, const Lanes& b) { return all(a) op b; }  \
    FQ_INLINE Lanes& operator op##=(const Lanes& other) { return *this = *this op other; }
    FQ_LANES_OPERATOR(+)
    FQ_LANES_OPERATOR(-)
    FQ_LANES_OPERATOR(*)
    FQ_LANES_OPERATOR(/)
#undef FQ_LANES_OPERATOR

    friend FQ_INLINE Lanes operator-(const Lanes& a) {
        Lanes result;
        for (int i = 0; i < kParts; ++i) result.parts[i] = -a.parts[i];
        return result;
    }
    // a < b ? yes : no
    friend FQ_INLINE Lanes if_less(const Lanes& a, const Lanes& b, const Lanes& yes, const Lanes& no) {
        Lanes result;
        for (int i = 0; i < kParts; ++i) result.parts[i] = a.parts[i] < b.parts[i] ? yes.parts[i] : no.parts[i];
        return result;
    }
    friend FQ_INLINE Lanes smaller(const Lanes& a, const Lanes& b) { return if_less(a, b, a, b); }
    friend FQ_INLINE Lanes larger(const Lanes& a, const Lanes& b) { return if_less(b, a, a, b); }

    // e^x to 2 units in the last place for x <= 0 (and up to 80); below -87 the result is the smallest normal float, not
    // 0. Range reduction by the nearest integer multiple of ln 2, held in two parts, then a polynomial (Cephes expf).
    friend FQ_INLINE Lanes exponential(const Lanes& x) {
        Lanes value = if_less(x, all(-87.0f), all(-87.0f), x);  // a NaN stays one
        value = if_less(all(80.0f), value, all(80.0f), value);
        const Lanes shifted = value * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
        const Lanes exponent = shifted - 12582912.0f;
        value = value - exponent * 0.693359375f;
        value = value + exponent * 2.12194440e-4f;
        Lanes polynomial = value * 1.9875691500e-4f + 1.3981999507e-3f;
        polynomial = polynomial * value + 8.3334519073e-3f;
        polynomial = polynomial * value + 4.1665795894e-2f;
        polynomial = polynomial * value + 1.6666665459e-1f;
        polynomial = polynomial * value + 5.0000001201e-1f;
        polynomial = polynomial * value * value + value + 1.0f;
        Lanes power;
        for (int i = 0; i < kParts; ++i) {
            IntPart bits;
            std::memcpy(&bits, &shifted.parts[i], sizeof bits);
            bits = (bits - 0x4b400000 + 127) << 23;
            std::memcpy(&power.parts[i], &bits, sizeof bits);
        }
        return polynomial * power;
    }
    // Hyperbolic tangent, to about 1e-7.
    friend FQ_INLINE Lanes tangent(const Lanes& x) {
        const Lanes decay = exponential(larger(x, -x) * -2.0f);
        const Lanes result = (1.0f - decay) / (1.0f + decay);
        return if_less(x, all(0.0f), -result, result);
    }
};

template <class Vector>
FQ_INLINE float dot(const float* a, const float* b, int64_t size) {
    Vector sum = Vector::all(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) sum += Vector::load(a + i) * Vector::load(b + i);
    float total = sum.sum();
    for (; i < size; ++i) total += a[i] * b[i];
    return total;
}

}  // namespace fq
