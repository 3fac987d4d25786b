// Runs the CUDA kernels of a residual block's tail on the host, for tests/helpers/gpu_host_tails.py.
// As runner.cpp: every buffer has exactly the size that the kernels may touch, and what they write
// starts as NaN.
#include <stdexcept>

#include "passes.h"

using namespace eca;

namespace {

enum Operation : int64_t { kMoments, kTail, kTailSums, kTailGradients };

// The fields of tests/helpers/gpu_host_tails.py's request, in its order.
struct Request {
  int64_t operation;  // an Operation
  int64_t dtype, layout, samples, channels, pixels, activation;
  int64_t has_identity, want_mask, identity_sum, by_x, by_identity, want_dx, want_d_identity;
  int64_t seed, count, multiprocessors, misplaced;  // coefficients begin so many numbers later
  MapRequest x, identity, dy, result;
};

bool answer_one() {
  Request r;
  read_all(&r, sizeof r);
  const Problem p{Dtype(r.dtype), Layout(r.layout), r.samples, r.channels,
                  r.pixels,       Dtype(r.dtype),   1,         false,
                  false};
  const int64_t size = size_of(p.dtype), wide = accumulator_size(p.dtype), C = p.channels,
                planes = p.samples * C;
  const auto activation = Activation(r.activation);
  simt::settings.seed = uint64_t(r.seed);
  simt::settings.count = r.count != 0;
  simt::forget_buffers();
  simt::reset_traffic();

  const int64_t rows = p.layout == Layout::kPlanes ? planes : p.samples * p.pixels;
  MapBuffer x("x", r.x, size), identity("identity", r.identity, size), dy("dy", r.dy, size);
  MapBuffer first("first", r.result, size), second("second", r.result, size);
  Buffer mask("mask", rows * mask_row_bytes(p)), sums("sums", 3 * planes * 8);
  for (MapBuffer* map : {&x, &identity, &dy}) map->memory.read();
  const bool backward = r.operation > kTail;
  if (backward) mask.read();
  const Rows k("planes", 2, planes, wide, r.misplaced), c("channels", 3, C, wide, r.misplaced),
      gk("gradient_planes", 2, planes, wide, r.misplaced),
      gc("gradient_channels", 4, C, wide, r.misplaced);
  const TailCoefficients coefficients{k.row(0), k.row(1), c.row(0), c.row(1), c.row(2)};
  const Map none{nullptr, 0, 0}, other = r.has_identity ? identity.map : none;
  uint8_t* const bits = reinterpret_cast<uint8_t*>(mask.data());
  double* const found = reinterpret_cast<double*>(sums.data());
  Passes passes(r.multiprocessors, {&x.memory, &identity.memory, &dy.memory});
  try {
    if (r.operation == kMoments) {
      passes.sum(Moments{p, x.map, found, found + planes}, cuda::moments);
    } else if (r.operation == kTail) {
      passes.write(
          Tail{p, activation, coefficients, x.map, other, first.map, r.want_mask ? bits : nullptr},
          cuda::tail);
    } else if (r.operation == kTailSums) {
      passes.sum(TailSums{p, activation, coefficients, dy.map, x.map, other, bits, found,
                          r.identity_sum != 0},
                 cuda::tail_sums);
    } else {
      passes.write(
          TailGradients{p, activation, coefficients, dy.map, x.map, other, bits,
                        r.want_dx ? first.map : none, r.want_d_identity ? second.map : none,
                        gk.row(0), r.by_x ? gc.row(0) : nullptr, gk.row(1), gc.row(1),
                        r.by_identity ? gc.row(2) : nullptr, r.by_identity ? gc.row(3) : nullptr},
          cuda::tail_gradients);
    }
    write_text("ok");
    write_text(passes.plan());
    write_text(describe(simt::traffic()));
    for (const Buffer* b : {&first.memory, &second.memory, &mask, &sums}) b->write();
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
