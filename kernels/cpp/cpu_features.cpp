// Which body this machine can run.
#include "bitplane_gemv.h"
#include "kernels_internal.h"

#if FQ_X86
#include <cpuid.h>
#endif

namespace fq {
namespace {

constexpr uint32_t kAvx2Needs = kFqCpuAvx2 | kFqCpuFma | kFqCpuF16c;
constexpr uint32_t kAvx512Needs =
    kAvx2Needs | kFqCpuAvx512f | kFqCpuAvx512bw | kFqCpuAvx512vl | kFqCpuAvx512dq | kFqCpuAvx512vnni;

#if FQ_X86
// Older compilers do not know "f16c" as a name for __builtin_cpu_supports.
bool has_f16c() {
    unsigned int eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

uint32_t detect() {
    uint32_t features = 0;
#if FQ_X86
    __builtin_cpu_init();
    // GCC and Clang both look at XCR0 as well, so AVX2 and AVX-512 are there only if the system saves their registers.
    // F16C is part of no answer without AVX2.
    if (__builtin_cpu_supports("avx2")) features |= kFqCpuAvx2;
    if (__builtin_cpu_supports("fma")) features |= kFqCpuFma;
    if (has_f16c()) features |= kFqCpuF16c;
    if (__builtin_cpu_supports("avx512f")) features |= kFqCpuAvx512f;
    if (__builtin_cpu_supports("avx512bw")) features |= kFqCpuAvx512bw;
    if (__builtin_cpu_supports("avx512vl")) features |= kFqCpuAvx512vl;
    if (__builtin_cpu_supports("avx512dq")) features |= kFqCpuAvx512dq;
    if (__builtin_cpu_supports("avx512vnni")) features |= kFqCpuAvx512vnni;
#endif
    return features;
}

}  // namespace
}  // namespace fq

using namespace fq;

extern "C" {

uint32_t fq_cpu_features(void) {
    static const uint32_t features = detect();  // once: a virtual machine takes microseconds over cpuid
    return features;
}

int32_t fq_isa_runs_with(int32_t isa, uint32_t features) {
    if (isa == kFqPortable) return 1;
#if FQ_X86
    if (isa == kFqAvx2) return (features & kAvx2Needs) == kAvx2Needs ? 1 : 0;
    if (isa == kFqAvx512) return (features & kAvx512Needs) == kAvx512Needs ? 1 : 0;
#endif
    return 0;
}

int32_t fq_isa_supported(int32_t isa) { return fq_isa_runs_with(isa, fq_cpu_features()); }

int32_t fq_best_isa(void) {
    for (int32_t isa : {kFqAvx512, kFqAvx2}) {
        if (fq_isa_supported(isa)) return isa;
    }
    return kFqPortable;
}

}  // extern "C"
