// The tail of a residual block on CUDA: which dtype's kernels.
#include "cuda.h"
#include "visit.h"

namespace eca::cuda {

template <class T>
void run_tail(const eca::Tail& t, const TailPlan& plan, const Memory& memory);
template <class T>
void run_tail_gradients(const TailGradients& t, const TailPlan& plan, const Memory& memory);
template <class T>
void run_moments(const eca::Moments& t, const TailSumPlan& plan, const Memory& memory);
template <class T>
void run_tail_sums(const TailSums& t, const TailSumPlan& plan, const Memory& memory);

void tail(const eca::Tail& t, const TailPlan& plan, const Memory& memory) {
  visit(t.problem.dtype, [&](auto* type) { run_tail<Pointee<decltype(type)>>(t, plan, memory); });
}

void tail_gradients(const TailGradients& t, const TailPlan& plan, const Memory& memory) {
  visit(t.problem.dtype,
        [&](auto* type) { run_tail_gradients<Pointee<decltype(type)>>(t, plan, memory); });
}

void moments(const eca::Moments& t, const TailSumPlan& plan, const Memory& memory) {
  visit(t.problem.dtype,
        [&](auto* type) { run_moments<Pointee<decltype(type)>>(t, plan, memory); });
}

void tail_sums(const TailSums& t, const TailSumPlan& plan, const Memory& memory) {
  visit(t.problem.dtype,
        [&](auto* type) { run_tail_sums<Pointee<decltype(type)>>(t, plan, memory); });
}

}  // namespace eca::cuda
