// The contract on CUDA: which dtype's kernels, and what the planner needs to know of a call.
#include "cuda.h"

#include "device.h"

namespace eca::cuda {

template <class T>
void run_forward(Forward f, const Plan& plan, const Memory& memory);
template <class T>
void run_backward(const Backward& b, const Plan& plan, const Memory& memory);

void forward(const Forward& f, const Plan& plan, const Memory& memory) {
  switch (f.problem.dtype) {
    case Dtype::kFloat32: return run_forward<float>(f, plan, memory);
    case Dtype::kFloat64: return run_forward<double>(f, plan, memory);
    case Dtype::kFloat16: return run_forward<half>(f, plan, memory);
    case Dtype::kBFloat16: return run_forward<bfloat16>(f, plan, memory);
  }
}

void backward(const Backward& b, const Plan& plan, const Memory& memory) {
  switch (b.problem.dtype) {
    case Dtype::kFloat32: return run_backward<float>(b, plan, memory);
    case Dtype::kFloat64: return run_backward<double>(b, plan, memory);
    case Dtype::kFloat16: return run_backward<half>(b, plan, memory);
    case Dtype::kBFloat16: return run_backward<bfloat16>(b, plan, memory);
  }
}

namespace {

Access access_of(const Problem& p, const Map& map) {
  const int64_t size = size_of(p.dtype), rows = p.layout == Layout::kPlanes ? p.channels : p.pixels,
                length = p.layout == Layout::kPlanes ? p.pixels : p.channels;
  const auto whole = [&](int64_t elements) { return elements * size % 16 == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && whole(length) &&
                       (rows <= 1 || whole(map.row_stride)) &&
                       (p.samples <= 1 || whole(map.sample_stride));
  return {aligned, rows <= 1 || map.row_stride == length, false};
}

Access both(const Access& a, const Access& b) {
  return {a.aligned && b.aligned, a.dense && b.dense, a.in_place || b.in_place};
}

}  // namespace

Access access_of(const Forward& f) {
  Access access = both(access_of(f.problem, f.x), access_of(f.problem, f.y));
  access.in_place = f.x.data == f.y.data;
  return access;
}

Access access_of(const Backward& b) {
  const Access sources = both(access_of(b.problem, b.dy), access_of(b.problem, b.x));
  return b.dx.data ? both(sources, access_of(b.problem, b.dx)) : sources;
}

}  // namespace eca::cuda
