// The CPU kernels for AVX-512 (F, BW, VL, DQ), whatever the compiler's default processor is.
#include "cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define ECA_AVX512
#define ECA_LANE_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace eca::cpu::avx512 {
#include "simd.h"
#include "kernels.h"
const Kernels kernels = all_kernels("avx512");
}  // namespace eca::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
