// A call of the CUDA kernels: its device and stream, its plan, and memory from PyTorch's allocator.
#pragma once

#include <cstdint>

#include "plan.h"

namespace eca::gpu {

// On PyTorch's current stream of a CUDA device, which need not be the current one. mean and gate of
// `f` may be null. Throws std::runtime_error.
void forward(const Forward& f, int32_t device);
void backward(const Backward& b, int32_t device);

void reduce(const Reduce& r, int32_t device);
void scale(const Scale& s, int32_t device);

// Sizes that every call of this process uses from now on instead of the planner's choice, or null
// for that choice: for tuning and for tests. A call that cannot run so throws std::invalid_argument.
// Throws the same for sizes with which no kernel can be launched.
void force_plan(const Forced* forced);

// A CUDA device's limits, asked for once.
const Gpu& description(int32_t device);

// cuda::active_clusters() of a device.
int active_clusters(int32_t device, int blocks, int threads, int64_t shared_bytes);

}  // namespace eca::gpu
