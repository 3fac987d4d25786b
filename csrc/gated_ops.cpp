// The operators of attention after an activation: schema, checks, dispatch to the kernels. What they
// compute is in eca.h.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/call.h"
#include "maps.h"
#include "run.h"
#include "stable_abi.h"

namespace eca {
namespace {

// x, y and their gradients (N, C, *spatial); weight (1 or C, 1, k). Coefficients, in the dtype of
// the sums: `channels` (3, C) has p, q and centre.

Activation activation_of(int64_t number) {
  check(number >= 0 && number <= 4,
        "expected activation from 0 to 4 (none, ReLU, SiLU, GELU, hard swish), got ", number);
  return Activation(number);
}

// ---- the kernels for the device ----

void run(const ActivatedSums& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::activated_sums(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().activated_sums(t, thread_pool()); });
}

void run(const Gated& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::gated(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().gated(t, thread_pool()); });
}

void run(const GatedGradients& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::gated_gradients(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().gated_gradients(t, thread_pool()); });
}

Activated activated_of(const Maps& maps, Activation activation, const Tensor& channels) {
  const int64_t C = maps.problem.channels;
  return {maps.problem,           activation,     row_of(channels, 0, C), row_of(channels, 1, C),
          row_of(channels, 2, C), maps.of(maps.x)};
}

Tensor activated_sums(const OptionalTensor& dy, const Tensor& x, const Tensor& channels,
                      int64_t activation, bool for_norm) {
  const Problem p = problem_of(x);
  const Activation act = activation_of(activation);
  check_coefficients(channels, "channels", x, {3, p.channels});
  check(dy || !for_norm, "expected dy for the sums of a norm's gradients, got none");
  const Maps maps(x, {}, dy, p);
  Tensor sums = empty_doubles(x, for_norm ? 5 : 1);
  if (maps.is_empty()) return zeroed(sums);
  const ActivatedSums t{activated_of(maps, act, channels), maps.of(maps.dy), for_norm,
                        static_cast<double*>(sums.data_ptr())};
  run(t, device_of(x));
  return sums;
}

Tensor gated(const Tensor& x, const Tensor& gate, const Tensor& channels, int64_t activation) {
  const Problem p = problem_of(x);
  const Activation act = activation_of(activation);
  check_coefficients(gate, "gate", x, {p.samples, p.channels});
  check_coefficients(channels, "channels", x, {3, p.channels});
  const Maps maps(x, {}, {}, p);
  const Tensor y = empty_output(x, maps.view, p);
  if (maps.is_empty()) return y;
  const Gated t{activated_of(maps, act, channels), gate.data_ptr(), maps.of(y)};
  run(t, device_of(x));
  return y;
}

// planes (2, N, C) has gate and shift; gradient_channels (2, C) has slope and offset, which are not
// used without by_x.
Tensor gated_gradients(const Tensor& dy, const Tensor& x, const Tensor& planes,
                       const Tensor& channels, const Tensor& gradient_channels, int64_t activation,
                       bool by_x) {
  const Problem p = problem_of(x);
  const int64_t C = p.channels, NC = p.samples * C;
  const Activation act = activation_of(activation);
  check_coefficients(planes, "planes", x, {2, p.samples, C});
  check_coefficients(channels, "channels", x, {3, C});
  check_coefficients(gradient_channels, "gradient_channels", x, {2, C});
  const Maps maps(x, {}, dy, p);
  const Tensor dx = empty_output(x, maps.view, p);
  if (maps.is_empty()) return dx;
  const GatedGradients t{activated_of(maps, act, channels),
                         maps.of(maps.dy),
                         row_of(planes, 0, NC),
                         row_of(planes, 1, NC),
                         by_x ? row_of(gradient_channels, 0, C) : nullptr,
                         by_x ? row_of(gradient_channels, 1, C) : nullptr,
                         maps.of(dx)};
  run(t, device_of(x));
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> gated_block(const Tensor& x, const Tensor& weight,
                                               const Tensor& channels, bool circular,
                                               int64_t activation) {
  const Problem p = problem_of(x, weight, circular);
  const Activation act = activation_of(activation);
  check_coefficients(channels, "channels", x, {3, p.channels});
  const Maps maps(x, {}, {}, p);
  const Tensor y = empty_output(x, maps.view, p), mean = empty_channels(x),
               gate = empty_channels(x);
  if (maps.is_empty()) return {y, zeroed(mean), zeroed(gate)};
  const Tensor taps = as_contiguous(weight);
  const GatedBlock t{activated_of(maps, act, channels), taps.data_ptr(), maps.of(y),
                     mean.data_ptr(), gate.data_ptr()};
  on_cpu([&] { cpu::kernels().gated_block(t, thread_pool()); });
  return {y, mean, gate};
}

}  // namespace
}  // namespace eca

ECA_LIBRARY_FRAGMENT(m) {
  m.def(
      "activated_sums(Tensor? dy, Tensor x, Tensor channels, int activation, bool for_norm) -> "
      "Tensor");
  m.def("gated(Tensor x, Tensor gate, Tensor channels, int activation) -> Tensor");
  m.def(
      "gated_gradients(Tensor dy, Tensor x, Tensor planes, Tensor channels, Tensor "
      "gradient_channels, int activation, bool by_x) -> Tensor");
  m.def(
      "gated_block(Tensor x, Tensor weight, Tensor channels, bool circular, int activation) -> "
      "(Tensor y, Tensor mean, Tensor gate)");
}

template <class Library>
static void implement_passes(Library& m) {
  m.impl("activated_sums", TORCH_BOX(&eca::activated_sums));
  m.impl("gated", TORCH_BOX(&eca::gated));
  m.impl("gated_gradients", TORCH_BOX(&eca::gated_gradients));
}

ECA_LIBRARY_IMPL(CPU, m) {
  implement_passes(m);
  m.impl("gated_block", TORCH_BOX(&eca::gated_block));
}

#if defined(ECA_FUSED_WITH_CUDA)
ECA_LIBRARY_IMPL(CUDA, m) { implement_passes(m); }
#endif
