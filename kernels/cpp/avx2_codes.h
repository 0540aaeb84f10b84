// How the AVX2 body turns words of the planes into codes, and codes into dot products. One vector is 8 words of one
// plane: 256 inputs, half a chunk of activations, one int32 lane per word.
//
// Planes are merged pairwise, planes -> 2-bit fields -> nibbles -> bytes, as in the AVX-512 body. What differs is
// that vpmaddubsw adds products in pairs to int16: two of a byte of 8 bits could overflow (255 * 127 * 2), so 8 bits
// stay two nibbles. What fits is added up in int16 before it is widened.
#pragma once

#include "kernels_internal.h"

#include <immintrin.h>

#define FQ_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace fq {
namespace {  // of the one file that includes this: the AVX-512 body has parts of the same names

constexpr int64_t kWordsPerVector = 8;
// How far ahead each plane is fetched: the hardware prefetchers alone follow eight streams badly. 1 KiB and more was
// up to 1.5 times slower on 4096 x 4096 weights (AMD Zen 4).
constexpr int64_t kPrefetchBytes = 256;

struct Rows {  // the words of one half chunk in each plane
    const char* first;
    int64_t plane_bytes;
    __m256i mask;
};

FQ_INLINE FQ_AVX2 __m256i every_byte(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

// How codes lie in vectors of bytes for vpmaddubsw. Up to 4 bits a vector holds nibbles, those of t = r in the low
// half of each byte, of t = r + 4 in the high half, r = 0..3; from 5 to 7 bits, bytes of t = 0..7. 8 bits are two
// parts of 4.
template <int kWidth>
struct Layout {
    static constexpr bool kHasNibbles = kWidth <= 4 || kWidth == 8;
    static constexpr int kParts = kWidth == 8 ? 2 : 1;
    static constexpr int kVectors = kHasNibbles ? 4 : 8;
    // How many vectors of int16 products of the largest code, or nibble, and activations of 127 add up without
    // overflow: 15 * 127 * 2 * 8, 31 * 127 * 2 * 4, 63 * 127 * 2 * 2 and 127 * 127 * 2 are all below 2^15.
    static constexpr int kSummands = kHasNibbles ? 8 : 1 << (7 - kWidth);
    // What a part's unit is worth among codes that are aligned to the top of a byte.
    static constexpr int unit(int part) { return kWidth == 8 ? (part == 0 ? 16 : 1) : 1 << (8 - kWidth); }
    // Inputs 4t..4t+3 of every word, from the vectors of a part.
    static FQ_INLINE FQ_AVX2 __m256i bytes_at(const __m256i* codes, int t) {
        if constexpr (!kHasNibbles) return codes[t];
        return _mm256_and_si256(t < 4 ? codes[t] : _mm256_srli_epi32(codes[t - 4], 4), every_byte(0x0F));
    }
};

// Fetches the line of each plane that will be read in a while; needed once for every two vectors.
template <int kWidth>
FQ_INLINE FQ_AVX2 void fetch_ahead(const Rows& rows) {
    for (int plane = 0; plane < kWidth; ++plane) {
        _mm_prefetch(rows.first + plane * rows.plane_bytes + kPrefetchBytes, _MM_HINT_T0);
    }
}

template <bool kTail>
FQ_INLINE FQ_AVX2 __m256i load_plane(const Rows& rows, int plane) {
    const char* address = rows.first + plane * rows.plane_bytes;
    __m256i words;
    if constexpr (kTail) words = _mm256_maskload_epi32(reinterpret_cast<const int*>(address), rows.mask);
    else words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
    // Keeps the compiler from loading the words anew for each use.
    asm("" : "+x"(words));
    return words;
}

// From fields a (more significant) and b of S bits: even takes the fields at even positions, odd those at odd ones.
// The difference of the two is moved instead of the fields themselves, which saves two of eight operations.
template <int S>
FQ_INLINE FQ_AVX2 void merge(__m256i lower, __m256i a, __m256i b, __m256i* even, __m256i* odd) {
    const __m256i change = _mm256_and_si256(_mm256_xor_si256(a, _mm256_srli_epi32(b, S)), lower);
    *odd = _mm256_xor_si256(a, change);
    *even = _mm256_xor_si256(b, _mm256_slli_epi32(change, S));
}

// The same where the more significant fields are zero.
template <int S>
FQ_INLINE FQ_AVX2 void spread(__m256i lower, __m256i b, __m256i* even, __m256i* odd) {
    *even = _mm256_and_si256(b, lower);
    *odd = _mm256_and_si256(_mm256_srli_epi32(b, S), lower);
}

// Codes of kCount planes from kFirst, kCount = 1..4, as nibbles: nibbles[r] holds t = r in the low half of each byte
// and t = r + 4 in the high half.
template <int kFirst, int kCount, bool kTail>
FQ_INLINE FQ_AVX2 void load_nibbles(const Rows& rows, __m256i* nibbles) {
    const __m256i lower1 = every_byte(0x55), lower2 = every_byte(0x33);
    __m256i high[2], low[2];
    const __m256i first = load_plane<kTail>(rows, kFirst);
    if constexpr (kCount == 1 || kCount == 3) {
        spread<1>(lower1, first, &high[0], &high[1]);
    } else {
        merge<1>(lower1, first, load_plane<kTail>(rows, kFirst + 1), &high[0], &high[1]);
    }
    if constexpr (kCount <= 2) {
        for (int r = 0; r < 2; ++r) spread<2>(lower2, high[r], &nibbles[r], &nibbles[r + 2]);
    } else {
        const __m256i next = load_plane<kTail>(rows, kFirst + kCount - 2);
        merge<1>(lower1, next, load_plane<kTail>(rows, kFirst + kCount - 1), &low[0], &low[1]);
        for (int r = 0; r < 2; ++r) merge<2>(lower2, high[r], low[r], &nibbles[r], &nibbles[r + 2]);
    }
}

// The codes of one part.
template <int kWidth, int kPart, bool kTail>
FQ_INLINE FQ_AVX2 void load_codes(const Rows& rows, __m256i* codes) {
    if constexpr (Layout<kWidth>::kHasNibbles) {
        load_nibbles<4 * kPart, kWidth < 4 ? kWidth : 4, kTail>(rows, codes);
    } else {
        __m256i top[4], bottom[4];
        load_nibbles<0, kWidth - 4, kTail>(rows, top);
        load_nibbles<kWidth - 4, 4, kTail>(rows, bottom);
        for (int r = 0; r < 4; ++r) merge<4>(every_byte(0x0F), top[r], bottom[r], &codes[r], &codes[r + 4]);
    }
}

// Sums of pairs of products, of token m and inputs 4t..4t+3 of every word.
FQ_INLINE FQ_AVX2 __m256i multiply(__m256i bytes, const int8_t* values, int m, int t) {
    const int8_t* address = values + m * kChunkInputs + 64 * t;
    return _mm256_maddubs_epi16(bytes, _mm256_load_si256(reinterpret_cast<const __m256i*>(address)));
}

// For each token the sums, one per word, of code * activation over its 32 inputs, of kParts parts of the codes from
// kPart on, added to `dots` or, of the first part, put there. `values` are the first token's.
template <int kWidth, int kTokens, int kPart, int kParts, bool kTail>
FQ_INLINE FQ_AVX2 void dot_parts(const Rows& rows, const int8_t* values, __m256i* dots) {
    using Codes = Layout<kWidth>;
    __m256i codes[kParts][Codes::kVectors];
    load_codes<kWidth, kPart, kTail>(rows, codes[0]);
    if constexpr (kParts == 2) load_codes<kWidth, kPart + 1, kTail>(rows, codes[1]);
    __m256i sums[kParts][kTokens];
    // The asm statements: what is added at once holds one register, what the compiler would put off holds many.
    if constexpr (Codes::kSummands == 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const int t = i / 2 + i % 2 * 4;  // in turn the two halves of a vector
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) {
                const __m256i bytes = Codes::bytes_at(codes[part], t);
#pragma GCC unroll 8
                for (int m = 0; m < kTokens; ++m) {
                    const __m256i product = multiply(bytes, values, m, t);
                    sums[part][m] = i == 0 ? product : _mm256_add_epi16(sums[part][m], product);
                    asm("" : "+x"(sums[part][m]));
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int first = 0; first < 8; first += Codes::kSummands) {
#pragma GCC unroll 8
        for (int m = 0; m < kTokens; ++m) {
            if constexpr (Codes::kSummands < 8) {
#pragma GCC unroll 4
                for (int t = first; t < first + Codes::kSummands; ++t) {
                    const __m256i product = multiply(codes[0][t], values, m, t);
                    sums[0][m] = t == first ? product : _mm256_add_epi16(sums[0][m], product);
                }
            }
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) {
                const __m256i unit = _mm256_set1_epi16(Codes::unit(kPart + part));
                const __m256i dot = _mm256_madd_epi16(sums[part][m], unit);
                const bool is_first = kPart + part == 0 && first == 0;
                dots[m] = is_first ? dot : _mm256_add_epi32(dots[m], dot);
            }
            asm("" : "+x"(dots[m]));
        }
    }
}

// The same over whole codes, in units of codes that are aligned to the top of a byte.
template <int kWidth, int kTokens, bool kTail>
FQ_INLINE FQ_AVX2 void dot_int8(const Rows& rows, const int8_t* values, __m256i* dots) {
    // The sums of both parts of up to 4 tokens fit into registers; of more, one part's.
    constexpr int kAtOnce = kTokens <= 4 ? Layout<kWidth>::kParts : 1;
    dot_parts<kWidth, kTokens, 0, kAtOnce, kTail>(rows, values, dots);
    if constexpr (kAtOnce < Layout<kWidth>::kParts) dot_parts<kWidth, kTokens, 1, 1, kTail>(rows, values, dots);
}

}  // namespace
}  // namespace fq
