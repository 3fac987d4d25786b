// The operators of a residual block's tail: schema, checks, dispatch to the kernels. What they
// compute is in eca.h.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cuda/call.h"
#include "maps.h"
#include "run.h"
#include "stable_abi.h"
#include "tail_ops.h"

namespace eca {
namespace {

// x, identity, y and their gradients (N, C, *spatial); scale (N,); weight (1 or C, 1, k); mask
// bytes. Coefficients, in the dtype of the sums: `planes` (2, N, C) has p and q; `channels` (3, C)
// has centre, identity_scale and identity_centre.

Activation activation_of(int64_t number) {
  check(number >= 0 && number <= 3,
        "expected activation from 0 to 3 (none, ReLU, SiLU, GELU), got ", number);
  return Activation(number);
}

// Enough for either layout, so that the size does not depend on it.
int64_t mask_bytes(const Problem& p) {
  return p.samples * std::max(p.channels * ((p.pixels + 7) / 8), p.pixels * ((p.channels + 7) / 8));
}

// ---- the kernels for the device ----

void run(const Moments& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::moments(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().moments(t, thread_pool()); });
}

void run(const Tail& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::tail(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().tail(t, thread_pool()); });
}

void run(const TailSums& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::tail_sums(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().tail_sums(t, thread_pool()); });
}

void run(const TailGradients& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::tail_gradients(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().tail_gradients(t, thread_pool()); });
}

void run(const BlockTail& b, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::block_tail(b, device.index);
#endif
  on_cpu([&] { cpu::kernels().block_tail(b, thread_pool()); });
}

void run(const BlockTailBackward& b, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::block_tail_backward(b, device.index);
#endif
  on_cpu([&] { cpu::kernels().block_tail_backward(b, thread_pool()); });
}

void clear(void* memory, int64_t bytes, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::set_to_zero(memory, bytes, device.index);
#endif
  (void)device;
  std::memset(memory, 0, size_t(bytes));
}

// p has the layout of the kernels; bytes that they do not write are zero.
Tensor empty_mask(const Tensor& x, const Problem& p, bool needed) {
  const int64_t size = needed ? mask_bytes(p) : 0, stride = 1;
  const Tensor mask = empty(x, &size, &stride, 1, aoti_torch_dtype_uint8());
  const int64_t rows = p.layout == Layout::kPlanes ? p.channels : p.pixels;
  const int64_t written = p.samples * rows * mask_row_bytes(p);
  if (needed && size > written)
    clear(static_cast<char*>(mask.data_ptr()) + written, size - written, device_of(x));
  return mask;
}

uint8_t* bytes_of(const Tensor& mask) {
  return mask.numel() ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr;
}

void check_mask(const Tensor& mask, const Tensor& x, const Problem& p, Activation activation) {
  const int64_t size = activation == Activation::kRelu ? mask_bytes(p) : 0;
  const bool fits = mask.dim() == 1 && mask.size(0) == size && mask.is_contiguous() &&
                    dtype_code(mask) == aoti_torch_dtype_uint8() && device_of(mask) == device_of(x);
  check(fits, "expected mask as the forward operator returned it for x, ", size, " bytes, got ",
        shape{mask}, ", ", dtype{dtype_code(mask)});
}

TailCoefficients coefficients_of(const Tensor& planes, const Tensor& channels, const Problem& p) {
  const int64_t C = p.channels, NC = p.samples * C;
  return {row_of(planes, 0, NC), row_of(planes, 1, NC), row_of(channels, 0, C),
          row_of(channels, 1, C), row_of(channels, 2, C)};
}

}  // namespace

Tensor moments(const Tensor& x) {
  const Problem p = problem_of(x);
  const Maps maps(x, {}, {}, p);
  Tensor found = empty_doubles(x, 2);
  if (maps.is_empty()) return zeroed(found);
  double* const mean = static_cast<double*>(found.data_ptr());
  const Moments m{maps.problem, maps.of(maps.x), mean, mean + p.samples * p.channels};
  run(m, device_of(x));
  return found;
}

std::tuple<Tensor, Tensor> tail(const Tensor& x, const OptionalTensor& identity,
                                const Tensor& planes, const Tensor& channels, int64_t activation,
                                bool need_mask) {
  const Problem p = problem_of(x);
  const Activation act = activation_of(activation);
  check_coefficients(planes, "planes", x, {2, p.samples, p.channels});
  check_coefficients(channels, "channels", x, {3, p.channels});
  const Maps maps(x, identity, {}, p);
  const Tensor y = empty_output(x, maps.view, p),
               mask = empty_mask(x, maps.problem, need_mask && act == Activation::kRelu);
  if (maps.is_empty()) return {y, mask};
  const Tail t{maps.problem,
               act,
               coefficients_of(planes, channels, p),
               maps.of(maps.x),
               maps.of(maps.identity),
               maps.of(y),
               bytes_of(mask)};
  run(t, device_of(x));
  return {y, mask};
}

Tensor tail_sums(const Tensor& dy, const Tensor& x, const OptionalTensor& identity,
                 const Tensor& mask, const Tensor& planes, const Tensor& channels,
                 int64_t activation, bool identity_sum) {
  const Problem p = problem_of(x);
  const Activation act = activation_of(activation);
  check_mask(mask, x, p, act);
  check_coefficients(planes, "planes", x, {2, p.samples, p.channels});
  check_coefficients(channels, "channels", x, {3, p.channels});
  check(identity || !identity_sum, "expected identity for its sum, got none");
  const Maps maps(x, identity, dy, p);
  Tensor sums = empty_doubles(x, identity_sum ? 3 : 2);
  if (maps.is_empty()) return zeroed(sums);
  const TailSums t{maps.problem,
                   act,
                   coefficients_of(planes, channels, p),
                   maps.of(maps.dy),
                   maps.of(maps.x),
                   maps.of(maps.identity),
                   bytes_of(mask),
                   static_cast<double*>(sums.data_ptr()),
                   identity_sum};
  run(t, device_of(x));
  return sums;
}

// gradient_planes (2, N, C) has p and r; gradient_channels (4, C) has q and the identity's p, q
// and r. Without by_x, q is not used, and without by_identity, the identity's q and r.
std::tuple<Tensor, Tensor> tail_gradients(const Tensor& dy, const Tensor& x,
                                          const OptionalTensor& identity, const Tensor& mask,
                                          const Tensor& planes, const Tensor& channels,
                                          const Tensor& gradient_planes,
                                          const Tensor& gradient_channels, int64_t activation,
                                          bool by_x, bool by_identity, bool need_dx,
                                          bool need_d_identity) {
  const Problem p = problem_of(x);
  const int64_t C = p.channels, NC = p.samples * C;
  const Activation act = activation_of(activation);
  check_mask(mask, x, p, act);
  check_coefficients(planes, "planes", x, {2, p.samples, C});
  check_coefficients(channels, "channels", x, {3, C});
  check_coefficients(gradient_planes, "gradient_planes", x, {2, p.samples, C});
  check_coefficients(gradient_channels, "gradient_channels", x, {4, C});
  check(identity || !by_identity, "expected identity for a gradient that it is part of, got none");
  const Maps maps(x, identity, dy, p);
  const Tensor dx = need_dx ? empty_output(x, maps.view, p) : empty_unused(x),
               d_identity = need_d_identity ? empty_output(x, maps.view, p) : empty_unused(x);
  if (maps.is_empty() || !(need_dx || need_d_identity)) return {dx, d_identity};
  const auto channel = [&](int64_t k) { return row_of(gradient_channels, k, C); };
  const TailGradients t{maps.problem,
                        act,
                        coefficients_of(planes, channels, p),
                        maps.of(maps.dy),
                        maps.of(maps.x),
                        maps.of(maps.identity),
                        bytes_of(mask),
                        need_dx ? maps.of(dx) : Map{nullptr, 0, 0},
                        need_d_identity ? maps.of(d_identity) : Map{nullptr, 0, 0},
                        row_of(gradient_planes, 0, NC),
                        by_x ? channel(0) : nullptr,
                        row_of(gradient_planes, 1, NC),
                        channel(1),
                        by_identity ? channel(2) : nullptr,
                        by_identity ? channel(3) : nullptr};
  run(t, device_of(x));
  return {dx, d_identity};
}

// ---- with ECA's gate, in one pass; channels (6, C) has shift, alpha, beta, centre,
// identity_scale and identity_centre ----

static BlockTail block_tail_of(const Maps& maps, Activation activation, const Tensor& weight,
                               const OptionalTensor& scale, const Tensor& channels,
                               const Tensor& mask, const Tensor& distance, const Tensor& gate) {
  const int64_t C = maps.problem.channels;
  const auto channel = [&](int64_t k) { return row_of(channels, k, C); };
  return {maps.problem,        activation,
          weight.data_ptr(),   scale ? scale->data_ptr() : nullptr,
          channel(1),          channel(2),
          channel(0),          {nullptr, nullptr, channel(3), channel(4), channel(5)},
          maps.of(maps.x),     maps.of(maps.identity),
          {nullptr, 0, 0},     bytes_of(mask),
          distance.data_ptr(), gate.data_ptr()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> block_tail(const Tensor& x,
                                                      const OptionalTensor& identity,
                                                      const Tensor& weight,
                                                      const OptionalTensor& scale,
                                                      const Tensor& channels, bool circular,
                                                      int64_t activation, bool need_mask) {
  const Problem p = problem_of(x, weight, circular);
  const Activation act = activation_of(activation);
  if (scale) check_coefficients(*scale, "scale", x, {p.samples});
  check_coefficients(channels, "channels", x, {6, p.channels});
  const Maps maps(x, identity, {}, p);
  const Tensor y = empty_output(x, maps.view, p), distance = empty_channels(x),
               gate = empty_channels(x),
               mask = empty_mask(x, maps.problem, need_mask && act == Activation::kRelu);
  if (maps.is_empty()) return {y, mask, zeroed(distance), zeroed(gate)};
  const Tensor taps = as_contiguous(weight);
  BlockTail b = block_tail_of(maps, act, taps, scale, channels, mask, distance, gate);
  b.y = maps.of(y);
  run(b, device_of(x));
  return {y, mask, distance, gate};
}

// The gradients of x, the identity and the taps; the sums of TailSums; the gradient of mean.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> block_tail_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& identity, const Tensor& mask,
    const Tensor& weight, const OptionalTensor& scale, const Tensor& channels,
    const Tensor& distance, const Tensor& gate, bool circular, int64_t activation,
    bool identity_sum, bool need_dx, bool need_d_identity, bool need_dweight) {
  const Problem p = problem_of(x, weight, circular);
  const Activation act = activation_of(activation);
  check_mask(mask, x, p, act);
  if (scale) check_coefficients(*scale, "scale", x, {p.samples});
  check_coefficients(channels, "channels", x, {6, p.channels});
  check_saved(distance, "distance", x);
  check_saved(gate, "gate", x);
  check(identity || !identity_sum, "expected identity for its sum, got none");
  const Maps maps(x, identity, dy, p);
  const Tensor dx = need_dx ? empty_output(x, maps.view, p) : empty_unused(x),
               d_identity = need_d_identity ? empty_output(x, maps.view, p) : empty_unused(x);
  const int64_t k = weight.size(2), strides[] = {k, k, 1};
  Tensor dweight = need_dweight
                       ? empty(weight, weight.sizes().data(), strides, 3, dtype_code(weight))
                       : empty_unused(weight);
  Tensor sums = empty_doubles(x, identity_sum ? 3 : 2), dmean = empty_channels(x);
  if (maps.is_empty()) return {dx, d_identity, zeroed(sums), zeroed(dmean), zeroed(dweight)};
  const Tensor taps = as_contiguous(weight), means = as_contiguous(distance),
               gates = in_lines(gate), numbers = in_lines(channels);
  const BlockTailBackward b{block_tail_of(maps, act, taps, scale, numbers, mask, means, gates),
                            maps.of(maps.dy),
                            need_dx ? maps.of(dx) : Map{nullptr, 0, 0},
                            need_d_identity ? maps.of(d_identity) : Map{nullptr, 0, 0},
                            static_cast<double*>(sums.data_ptr()),
                            identity_sum,
                            dmean.data_ptr(),
                            need_dweight ? dweight.data_ptr() : nullptr};
  run(b, device_of(x));
  return {dx, d_identity, sums, dmean, dweight};
}

}  // namespace eca

ECA_LIBRARY_FRAGMENT(m) {
  m.def("moments(Tensor x) -> Tensor");
  m.def(
      "tail(Tensor x, Tensor? identity, Tensor planes, Tensor channels, int activation, bool "
      "need_mask) -> (Tensor y, Tensor mask)");
  m.def(
      "tail_sums(Tensor dy, Tensor x, Tensor? identity, Tensor mask, Tensor planes, Tensor "
      "channels, int activation, bool identity_sum) -> Tensor");
  m.def(
      "tail_gradients(Tensor dy, Tensor x, Tensor? identity, Tensor mask, Tensor planes, Tensor "
      "channels, Tensor gradient_planes, Tensor gradient_channels, int activation, bool by_x, bool "
      "by_identity, bool need_dx, bool need_d_identity) -> (Tensor dx, Tensor d_identity)");
  m.def(
      "block_tail(Tensor x, Tensor? identity, Tensor weight, Tensor? scale, Tensor channels, bool "
      "circular, int activation, bool need_mask) -> (Tensor y, Tensor mask, Tensor distance, "
      "Tensor gate)");
  m.def(
      "block_tail_backward(Tensor dy, Tensor x, Tensor? identity, Tensor mask, Tensor weight, "
      "Tensor? scale, Tensor channels, Tensor distance, Tensor gate, bool circular, int "
      "activation, "
      "bool identity_sum, bool need_dx, bool need_d_identity, bool need_dweight) -> (Tensor dx, "
      "Tensor d_identity, Tensor sums, Tensor dmean, Tensor dweight)");
}

template <class Library>
static void implement_passes(Library& m) {
  m.impl("moments", TORCH_BOX(&eca::moments));
  m.impl("tail", TORCH_BOX(&eca::tail));
  m.impl("tail_sums", TORCH_BOX(&eca::tail_sums));
  m.impl("tail_gradients", TORCH_BOX(&eca::tail_gradients));
  m.impl("block_tail", TORCH_BOX(&eca::block_tail));
  m.impl("block_tail_backward", TORCH_BOX(&eca::block_tail_backward));
}

ECA_LIBRARY_IMPL(CPU, m) { implement_passes(m); }

#if defined(ECA_FUSED_WITH_CUDA)
ECA_LIBRARY_IMPL(CUDA, m) { implement_passes(m); }
#endif
