// The CPU kernels for the processor that the compiler assumes: SSE2 on x86-64, NEON on 64-bit Arm.
#include "cpu.h"

#define ECA_LANE_BYTES 16

namespace eca::cpu::baseline {
#include "simd.h"
#include "kernels.h"
const Kernels kernels{"baseline",
                      forward,
                      backward,
                      reduce,
                      scale,
                      moments,
                      tail,
                      tail_sums,
                      tail_gradients,
                      block_tail,
                      block_tail_backward,
                      batch_statistics,
                      coefficients,
                      totals,
                      gradient_coefficients,
                      activated_sums,
                      gated,
                      gated_gradients,
                      gated_block};
}  // namespace eca::cpu::baseline
