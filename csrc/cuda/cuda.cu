// The contract on CUDA: which dtype's kernels, and what the planner needs to know of a call.
#include <limits>

#include "cuda.h"
#include "visit.h"

namespace eca::cuda {

template <class T>
void run_forward(Forward f, const Plan& plan, const Memory& memory);
template <class T>
void run_backward(const Backward& b, const Plan& plan, const Memory& memory);
template <class T>
void run_reduce(const Reduce& r, const Plan& plan, const Memory& memory);
template <class T>
void run_scale(const Scale& s, const Plan& plan, const Memory& memory);

void forward(const Forward& f, const Plan& plan, const Memory& memory) {
  visit(f.problem.dtype,
        [&](auto* type) { run_forward<Pointee<decltype(type)>>(f, plan, memory); });
}

void backward(const Backward& b, const Plan& plan, const Memory& memory) {
  visit(b.problem.dtype,
        [&](auto* type) { run_backward<Pointee<decltype(type)>>(b, plan, memory); });
}

void reduce(const Reduce& r, const Plan& plan, const Memory& memory) {
  visit(r.problem.dtype, [&](auto* type) { run_reduce<Pointee<decltype(type)>>(r, plan, memory); });
}

void scale(const Scale& s, const Plan& plan, const Memory& memory) {
  visit(s.problem.dtype, [&](auto* type) { run_scale<Pointee<decltype(type)>>(s, plan, memory); });
}

Access access_of(const Forward& f) {
  Access access = both(access_of(f.problem, f.x), access_of(f.problem, f.y));
  access.in_place = f.x.data == f.y.data;
  return access;
}

Access access_of(const Backward& b) {
  const Access sources = both(access_of(b.problem, b.dy), access_of(b.problem, b.x));
  return both(sources, b.dx.data ? access_of(b.problem, b.dx) : sources);
}

namespace {

// Chunks are for maps that are read twice. Others are one chunk, as with an endless L2 cache.
Plan in_passes(const Problem& p, Pass pass, const Access& access, Gpu gpu, bool twice) {
  if (!twice) gpu.l2 = std::numeric_limits<int64_t>::max();
  const Forced two_passes{'C'};
  return make_plan(p, pass, access, gpu, &two_passes);
}

}  // namespace

Plan plan_of(const Reduce& r, const Gpu& gpu) {
  Access access = access_of(r.problem, r.x);
  if (r.dy.data) access = both(access, access_of(r.problem, r.dy));
  if (r.dx.data) access = both(access, access_of(r.problem, r.dx));
  return in_passes(r.problem, reduce_pass(r), access, gpu, r.dx.data != nullptr);
}

Plan plan_of(const Scale& s, const Gpu& gpu) {
  const Access access = both(access_of(s.problem, s.x), access_of(s.problem, s.y));
  return in_passes(s.problem, Pass::kForward, access, gpu, false);
}

}  // namespace eca::cuda
