// The kernels with the step of tail.h, for runner.cpp.
#include "tail.h"

#include <stdexcept>

#include "../../../csrc/cuda/launch.h"
#include "run_tail.h"

namespace eca::cuda {

namespace {

template <class F>
void visit(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) return f(float());
  if (dtype == Dtype::kBFloat16) return f(bfloat16());
  throw std::runtime_error("the tail is for float32 and bfloat16");
}

}  // namespace

void tail_forward(const Forward& f, const Map& identity, const Plan& plan, const Memory& memory) {
  visit(f.problem.dtype, [&](auto zero) {
    run_forward<decltype(zero)>(f, plan, memory, Tail{{}, identity, {}, {}});
  });
}

void tail_backward(const Backward& b, const Map& result, const Map& d_identity, const Plan& plan,
                   const Memory& memory) {
  visit(b.problem.dtype, [&](auto zero) {
    run_backward<decltype(zero)>(b, plan, memory, Tail{{}, {}, result, d_identity});
  });
}

void tail_sums(const Reduce& r, const Map& result, const Plan& plan, const Memory& memory) {
  const Problem& p = r.problem;
  const Tiling& t = plan.tiling;
  const Workspace work = arrange(p, Pass::kBackward, plan, memory);
  visit(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_chunk<T>(p, t, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
      sum<T, SumsOfGradient>(how, p, r.x, r.dy, t, chunk, work, Tail{{}, {}, result, {}});
    });
  });
  const auto* const parts = static_cast<const float*>(work.sums);
  auto* const sums = static_cast<float*>(r.result);
  const int64_t in_sum = p.samples * p.channels;
  for (int64_t i = 0; i < SumsOfGradient::kSums * in_sum; ++i) {
    sums[i] = 0;
    for (int part = 0; part < t.parts; ++part)
      sums[i] += parts[(i / in_sum * t.parts + part) * in_sum + i % in_sum];
  }
}

}  // namespace eca::cuda
