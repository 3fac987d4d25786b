// Runs the CUDA kernels of attention after an activation on the host, for
// tests/helpers/gpu_host_gating.py. As runner.cpp: every buffer has exactly the size that the
// kernels may touch, and what they write starts as NaN.
#include <stdexcept>

#include "passes.h"

using namespace eca;

namespace {

enum Operation : int64_t { kActivatedSums, kGated, kGatedGradients };

// The fields of tests/helpers/gpu_host_gating.py's request, in its order.
struct Request {
  int64_t operation;  // an Operation
  int64_t dtype, layout, samples, channels, pixels, activation;
  int64_t has_dy, for_norm, by_x;
  int64_t seed, count, multiprocessors, misplaced;  // coefficients begin so many numbers later
  MapRequest x, dy, result;
};

bool answer_one() {
  Request r;
  read_all(&r, sizeof r);
  const Problem p{Dtype(r.dtype), Layout(r.layout), r.samples, r.channels,
                  r.pixels,       Dtype(r.dtype),   1,         false,
                  false};
  const int64_t size = size_of(p.dtype), wide = accumulator_size(p.dtype), C = p.channels,
                planes = p.samples * C;
  simt::settings.seed = uint64_t(r.seed);
  simt::settings.count = r.count != 0;
  simt::forget_buffers();
  simt::reset_traffic();

  MapBuffer x("x", r.x, size), dy("dy", r.dy, size), result("result", r.result, size);
  Buffer sums("sums", (r.for_norm ? 5 : 1) * planes * 8);
  for (MapBuffer* map : {&x, &dy}) map->memory.read();
  const Rows k("planes", 2, planes, wide, r.misplaced), c("channels", 3, C, wide, r.misplaced),
      gc("gradient_channels", 2, C, wide, r.misplaced);
  const Activated of{p, Activation(r.activation), c.row(0), c.row(1), c.row(2), x.map};
  Passes passes(r.multiprocessors, {&x.memory, &dy.memory});
  try {
    if (r.operation == kActivatedSums) {
      passes.sum(ActivatedSums{of, r.has_dy ? dy.map : Map{nullptr, 0, 0}, r.for_norm != 0,
                               reinterpret_cast<double*>(sums.data())},
                 cuda::activated_sums);
    } else if (r.operation == kGated) {
      passes.write(Gated{of, k.row(0), result.map}, cuda::gated);
    } else {
      passes.write(GatedGradients{of, dy.map, k.row(0), k.row(1), r.by_x ? gc.row(0) : nullptr,
                                  r.by_x ? gc.row(1) : nullptr, result.map},
                   cuda::gated_gradients);
    }
    write_text("ok");
    write_text(passes.plan());
    write_text(describe(simt::traffic()));
    for (const Buffer* b : {&result.memory, &sums}) b->write();
  } catch (const std::exception& error) {
    write_text(std::string("error: ") + error.what());
  }
  std::fflush(stdout);
  return true;
}

}  // namespace

int main() {
  while (answer_one()) {
  }
}
