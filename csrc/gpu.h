// A call of the CUDA kernels: its device and stream, its plan, and memory from PyTorch's allocator.
#pragma once

#include <cstdint>

#include "plan.h"

namespace eca::gpu {

// On PyTorch's current stream of a CUDA device, which need not be the current one. mean and gate of
// `f` may be null. Throws std::runtime_error.
void forward(const Forward& f, int32_t device);
void backward(const Backward& b, int32_t device);

// A CUDA device's limits, asked for once.
const Gpu& description(int32_t device);

}  // namespace eca::gpu
