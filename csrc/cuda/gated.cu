// Attention after an activation on CUDA: which dtype's kernels.
#include "cuda.h"
#include "visit.h"

namespace eca::cuda {

template <class T>
void run_activated_sums(const ActivatedSums& t, const TailSumPlan& plan, const Memory& memory);
template <class T>
void run_gated(const Gated& t, const TailPlan& plan, const Memory& memory);
template <class T>
void run_gated_gradients(const GatedGradients& t, const TailPlan& plan, const Memory& memory);

void activated_sums(const ActivatedSums& t, const TailSumPlan& plan, const Memory& memory) {
  visit(t.of.problem.dtype,
        [&](auto* type) { run_activated_sums<Pointee<decltype(type)>>(t, plan, memory); });
}

void gated(const Gated& t, const TailPlan& plan, const Memory& memory) {
  visit(t.of.problem.dtype,
        [&](auto* type) { run_gated<Pointee<decltype(type)>>(t, plan, memory); });
}

void gated_gradients(const GatedGradients& t, const TailPlan& plan, const Memory& memory) {
  visit(t.of.problem.dtype,
        [&](auto* type) { run_gated_gradients<Pointee<decltype(type)>>(t, plan, memory); });
}

}  // namespace eca::cuda
