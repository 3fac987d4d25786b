// The CPU kernels for AVX2, whatever the compiler's default processor is.
#include "cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define ECA_AVX2
#define ECA_LANE_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace eca::cpu::avx2 {
#include "simd.h"
#include "kernels.h"
const Kernels kernels = all_kernels("avx2");
}  // namespace eca::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
