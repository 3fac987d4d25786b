// The CPU kernels for the processor that the compiler assumes: SSE2 on x86-64, NEON on 64-bit Arm.
#include "cpu.h"

#define ECA_LANE_BYTES 16

namespace eca::cpu::baseline {
#include "simd.h"
#include "kernels.h"
const Kernels kernels = all_kernels("baseline");
}  // namespace eca::cpu::baseline
