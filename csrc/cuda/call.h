// A call of the CUDA kernels: its device and stream, its plan, and memory from PyTorch's allocator.
#pragma once

#include <cstdint>

#include "../coefficients.h"
#include "../plan.h"

namespace eca::cuda_call {

// All functions run on PyTorch's current stream of `device`, which need not be the current device.
// mean and gate of `f` may be null. All throw std::runtime_error.
void forward(const Forward& f, int32_t device);
void backward(const Backward& b, int32_t device);

void reduce(const Reduce& r, int32_t device);
void scale(const Scale& s, int32_t device);

// The passes of a residual block's tail.
void moments(const Moments& t, int32_t device);
void tail(const Tail& t, int32_t device);
void tail_sums(const TailSums& t, int32_t device);
void tail_gradients(const TailGradients& t, int32_t device);
void block_tail(const BlockTail& b, int32_t device);
void block_tail_backward(const BlockTailBackward& b, int32_t device);

// The passes of attention after an activation.
void activated_sums(const ActivatedSums& t, int32_t device);
void gated(const Gated& t, int32_t device);
void gated_gradients(const GatedGradients& t, int32_t device);

// The arithmetic between them.
void batch_statistics(const BatchStatistics& t, int32_t device);
void coefficients(const Coefficients& t, int32_t device);
void totals(const Totals& t, int32_t device);
void gradient_coefficients(const GradientCoefficients& t, int32_t device);

// For tuning and tests: every later call of this process uses these sizes, or, after null, the
// planner's choice again. A call that cannot run so throws std::invalid_argument.
void force_plan(const Forced* forced);

// Zeros for memory on the device.
void set_to_zero(void* memory, int64_t bytes, int32_t device);

// A CUDA device's limits, asked for once.
const Gpu& description(int32_t device);

}  // namespace eca::cuda_call
