// The contract on CUDA: asynchronous, on a stream of the current device.
#pragma once

#include <cstdint>

#include "../coefficients.h"
#include "../plan.h"
#include "tail_plan.h"

namespace eca::cuda {

// A cudaStream_t.
using StreamHandle = void*;

// The current device.
Gpu current_gpu();

// What a call needs beside its tensors.
struct Memory {
  void* workspace;     // Plan::workspace bytes, from an address that is a multiple of 16
  uint32_t* counters;  // Plan::counters words of zeros, which no other stream uses meanwhile
  StreamHandle stream;
};

// mean and gate may be null, where nothing needs them. Throws std::runtime_error.
void forward(const Forward& f, const Plan& plan, const Memory& memory);
void backward(const Backward& b, const Plan& plan, const Memory& memory);
void reduce(const Reduce& r, const Plan& plan, const Memory& memory);
void scale(const Scale& s, const Plan& plan, const Memory& memory);

// Plans for pooling or rescaling alone: the kernels of two_pass, which do them one by one.
Plan plan_of(const Reduce& r, const Gpu& gpu);
Plan plan_of(const Scale& s, const Gpu& gpu);

// The planner's pass for a reduction: dy is a second map to read, as backward.
inline Pass reduce_pass(const Reduce& r) { return r.dy.data ? Pass::kBackward : Pass::kForward; }

// The passes of a residual block's tail.
void moments(const eca::Moments& t, const TailSumPlan& plan, const Memory& memory);
void tail(const eca::Tail& t, const TailPlan& plan, const Memory& memory);
void tail_sums(const TailSums& t, const TailSumPlan& plan, const Memory& memory);
void tail_gradients(const TailGradients& t, const TailPlan& plan, const Memory& memory);

// The passes of attention after an activation.
void activated_sums(const ActivatedSums& t, const TailSumPlan& plan, const Memory& memory);
void gated(const Gated& t, const TailPlan& plan, const Memory& memory);
void gated_gradients(const GatedGradients& t, const TailPlan& plan, const Memory& memory);

// The arithmetic between them.
void batch_statistics(const BatchStatistics& t, const Memory& memory);
void coefficients(const Coefficients& t, const Memory& memory);
void totals(const Totals& t, const Memory& memory);
void gradient_coefficients(const GradientCoefficients& t, const Memory& memory);

// The tail with ECA's gate. `plan` has it on chip: it is of Pass::kTailForward or kTailBackward, and
// not of strategy C, which stands for the passes above. They take all calls.
bool fits_on_chip(const BlockTail& b);
bool fits_on_chip(const BlockTailBackward& b);
void block_tail(const BlockTail& b, const Plan& plan, const Memory& memory);
void block_tail_backward(const BlockTailBackward& b, const Plan& plan, const Memory& memory);

struct TailPasses {
  TailSumPlan sums;
  TailPlan maps;
  int64_t workspace;  // bytes
};
TailPasses passes_of(const BlockTail& b, const Gpu& gpu);
TailPasses passes_of(const BlockTailBackward& b, const Gpu& gpu);
void block_tail(const BlockTail& b, const TailPasses& passes, const Memory& memory);
void block_tail_backward(const BlockTailBackward& b, const TailPasses& passes,
                         const Memory& memory);

// Bytes of Memory::workspace.
int64_t workspace_of(const Totals& t);

// How a call's maps lie, for make_plan().
Access access_of(const Forward& f);
Access access_of(const Backward& b);
Access access_of(const BlockTail& b);
Access access_of(const BlockTailBackward& b);

// Words of zeros of the current device, which belong to the module and not to an allocator.
constexpr int64_t kSlabWords = 1 << 17;
uint32_t* counter_slab();

// Of the CUDA graph into which the stream is being captured, 0 for none.
uint64_t capture_id(StreamHandle stream);
void set_to_zero(void* memory, int64_t bytes, StreamHandle stream);

}  // namespace eca::cuda
