// The operations of tail.cpp.
#pragma once

#include "../../../csrc/cuda/cuda.h"

namespace eca::cuda {

void tail_forward(const Forward& f, const Map& identity, const Plan& plan, const Memory& memory);

void tail_backward(const Backward& b, const Map& result, const Map& d_identity, const Plan& plan,
                   const Memory& memory);

// r.result (2, samples, channels); the workspace is twice the plan's.
void tail_sums(const Reduce& r, const Map& result, const Plan& plan, const Memory& memory);

}  // namespace eca::cuda
