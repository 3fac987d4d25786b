// The launchers of the kernels of block_tail.h and block_tail_gradients.h. Instantiated once for each
// dtype but float64, which has passes.
#pragma once

#include "block_tail.h"
#include "block_tail_gradients.h"
#include "launch.h"

namespace eca::cuda {

template <class T>
void run_block_tail(const BlockTail& b, const Plan& plan, const Memory& memory) {
  const Forward f{b.problem, b.x, b.y, b.weight, nullptr, b.gate};
  const Workspace work = arrange(b.problem, Pass::kTailForward, plan, memory);
  run_in_registers<T>(f, plan, memory, work, BlockTailStep{b, int(mask_row_bytes(b.problem))});
}

template <class T>
void run_block_tail_backward(const BlockTailBackward& b, const Plan& plan, const Memory& memory) {
  const BlockTail& f = b.forward;
  const Problem& p = f.problem;
  const Backward gradients{p, b.dy, f.x, b.dx, f.weight, f.distance, f.gate, b.dweight};
  const Workspace work = arrange(p, Pass::kTailBackward, plan, memory);
  const bool planes = p.layout == Layout::kPlanes;
  const int channels = int(p.channels), pixels = int(p.pixels), row_bytes = int(mask_row_bytes(p));
  const TailShape shape{planes, channels, planes ? channels : pixels, planes ? pixels : channels,
                        row_bytes};
  run_in_registers<T>(
      gradients, plan, memory, work,
      BlockTailGradientStep{b, shape, p.samples * shape.rows_of_sample * row_bytes - 1});
  run_dweight<T>(gradients, plan, memory, work);
}

}  // namespace eca::cuda
